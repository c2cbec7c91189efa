"""What the agents of nodes know of members' processes, and what the lighthouse asks of them.

An agent started its workers: that one of them has ended is certain when it says so, and opens a round at once. When a
member is silent on an open link, its agent is asked whether the process lives: one that does (a C call holds the GIL)
is not dead, however long it is silent; whether it is stuck is the ProgressJudge's question. One that is stopped is
suspected at once; one whose agent does not answer either is judged as without an agent. Who is left out for any of
this is ended by its agent.

A worker's name is its agent's word for one start of one process. A member's Hello names those of all its ranks; nothing
is believed of a worker that no member has named, but that it has ended: its Hello may be on the way.
"""

import dataclasses
from collections.abc import Callable, Iterable

import msgspec

from everstep.core.admission import Admission
from everstep.core.failure_detector import FailureDetector
from everstep.core.lighthouse_state import JobState
from everstep.core.messages import Activity, Cause, Close, Effect, Heartbeat, Log, SendToNodes
from everstep.core.node_messages import Fence, FromAgent, Vouched, VouchFor, WorkerEnded, WorkersRunning
from everstep.core.reconfiguration import Reconfigurer
from everstep.core.roster import Peer, Roster
from everstep.core.types import MemberId
from everstep.core.worker_book import DETAIL_CHARS_MAX, NAME_CHARS_MAX, WORKERS_MAX, WorkerBook

ALIVE = ("R", "S", "D")
STOPPED = ("T",)  # by a signal; not t, by a debugger: that is no answer
GONE = ("", "Z", "X", "x")
NOT_FENCED = (Cause.LEFT, Cause.BROKEN_PATH)  # it goes by itself; it waits until it is let in again


@dataclasses.dataclass(frozen=True)
class AgentMessage:
    """Links of agents are numbered with those of members."""

    link: int
    message: FromAgent


@dataclasses.dataclass(frozen=True)
class AgentLinkClosed:
    link: int


class AgentDesk:
    """Acts on the shared JobState. `judge` is told what a silent member would say of itself, as far as is known."""

    def __init__(
        self,
        state: JobState,
        roster: Roster,
        joiners: dict[MemberId, None],
        detector: FailureDetector,
        changes: Reconfigurer,
        admission: Admission,
        book: WorkerBook,
        judge: Callable[[Peer, Heartbeat, float], list[Effect]],
    ) -> None:
        self._state = state
        self._roster = roster
        self._joiners = joiners
        self._detector = detector
        self._changes = changes
        self._admission = admission
        self._book = book
        self._judge = judge

    def receive(self, event: AgentMessage | AgentLinkClosed, now: float) -> list[Effect]:
        if isinstance(event, AgentLinkClosed):
            self._book.agent_gone(event.link)
            return []
        named = event.message.workers if isinstance(event.message, WorkersRunning) else (event.message.worker,)
        if len(named) > WORKERS_MAX or max(map(len, named), default=0) > NAME_CHARS_MAX:
            bounds = f"{WORKERS_MAX} workers of one agent, names of {NAME_CHARS_MAX} characters"
            return [Close(event.link, f"beyond the bounds: {bounds}")]
        match event.message:
            case WorkersRunning(workers):
                self._book.runs(event.link, workers)
                return self._fence(self._book.to_fence(workers))
            case WorkerEnded():
                return self._worker_ended(event.message, now)
            case Vouched(worker, process_state):
                return self._vouched(worker, process_state, now)

    # ---- it has ended

    def _worker_ended(self, report: WorkerEnded, now: float) -> list[Effect]:
        if not self._book.ended(report.worker, report.detail[:DETAIL_CHARS_MAX]):
            return []  # said before
        peer = self._roster.running_as(report.worker)
        fields: dict[str, object] = {"worker": report.worker, "cause": self._book.cause_of(report.worker)}
        out: list[Effect] = [Log("worker ended", fields | {"member": str(peer.member) if peer is not None else "none"})]
        if peer is None or peer.leaving:
            return out
        if report.is_clean and peer.link is not None:
            return out + self._ended_clean(peer, now)
        return out + self.end(peer, now)

    def _ended_clean(self, peer: Peer, now: float) -> list[Effect]:
        """Its Goodbye may be on the way, on another connection. In a group of several ranks it is the leader's."""
        if len(peer.hello.workers) == 1:
            self._detector.watch(peer.member, now)
            # As long as that: its link ends when all that it said has come, unless a forked child keeps it open.
            goes_at = now + self._state.config.leave_grace_s
            self._detector.link_closed(peer.member, "it ended without a Goodbye", goes_at)
        return []

    def end(self, peer: Peer, now: float) -> list[Effect]:
        """A process of this member is gone: so is the member."""
        member, why = peer.member, self._book.why_ended(peer.hello.workers)
        out: list[Effect] = []
        if peer.link is not None:  # a forked child may keep it open
            out.append(Close(peer.link, f"the process has ended: {why}"))
            self._roster.disconnect(peer.link)
        self._detector.forget(member)
        if member not in self._state.known_members:
            self._joiners.pop(member, None)
            self._roster.forget(member)
        elif member not in self._state.departed:
            out += self._changes.suspect(member, Cause.PROCESS_EXITED, why, now)
            out += self._changes.try_grant(now)
        return out + self._admission.admit_contenders_of(member.replica_id, now)

    def has_ended(self, member: MemberId) -> Peer | None:
        """It, if one of its processes is known to have ended."""
        peer = self._roster.of(member)
        return peer if peer is not None and not peer.leaving and self._book.why_ended(peer.hello.workers) else None

    # ---- it is silent

    def ask_about(self, member: MemberId) -> list[Effect]:
        """All of its processes' agents; nobody, where that of one is not here: it could not be vouched for."""
        peer = self._roster.of(member)
        if peer is None or peer.link is None or not peer.hello.workers:
            return []
        agents = [self._book.agent_of(worker) for worker in peer.hello.workers]
        if None in agents:
            return []
        peer.unvouched = dict.fromkeys(peer.hello.workers)
        pairs = zip(peer.hello.workers, agents, strict=True)
        return [SendToNodes(VouchFor(worker), (link,)) for worker, link in pairs if link is not None]

    def _vouched(self, worker: str, process_state: str, now: float) -> list[Effect]:
        peer = self._roster.running_as(worker)
        if peer is None or peer.link is None or worker not in peer.unvouched:
            return []
        if not self._detector.is_doubted(peer.member):
            return []  # it has been heard of meanwhile, or it is too late
        if process_state in ALIVE:
            del peer.unvouched[worker]
            return self._all_live(peer, now) if not peer.unvouched else []
        if process_state in STOPPED:
            self._detector.forget(peer.member)
            why = f"nothing is heard, and its process is stopped (state {process_state})"
            out = self._changes.suspect(peer.member, Cause.SILENT, why, now)
            return out + self._admission.admit_contenders_of(peer.member.replica_id, now)
        if process_state in GONE:
            return self._worker_ended(WorkerEnded(worker, "its process is gone"), now)
        return []

    def _all_live(self, peer: Peer, now: float) -> list[Effect]:
        """Silent, and alive. What it last said of itself is taken to go on: that it computes, for so long."""
        self._detector.heard(peer.member, now)
        beat = peer.heartbeat
        silent_s = now - peer.heard_at
        before_s = beat.activity_s if beat.activity is Activity.COMPUTING else 0.0
        goes_on = msgspec.structs.replace(beat, activity=Activity.COMPUTING, activity_s=before_s + silent_s)
        return self._judge(peer, goes_on, now)

    # ---- it was left out

    def fence_left_out(self) -> list[Effect]:
        """Order the end of what the last Grant went on without, unless its process is already somebody else."""
        out: list[Effect] = []
        for member, cause in self._state.left_out.items():
            peer = self._roster.of(member)
            if peer is not None and cause not in NOT_FENCED:
                theirs = [w for w in peer.hello.workers if w and self._roster.running_as(w) is peer]
                out += self._fence(self._book.condemn(theirs))
        self._state.left_out.clear()
        return out

    def _fence(self, workers: Iterable[str]) -> list[Effect]:
        out: list[Effect] = []
        for worker in workers:
            link = self._book.agent_of(worker)
            if link is not None:
                out += [SendToNodes(Fence(worker), (link,)), Log("worker fenced", {"worker": worker})]
        return out
