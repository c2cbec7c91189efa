"""The lighthouse's side of the protocol for one job (rules G1 to G8 of DESIGN 4.4).

It never takes part in a step. It learns of failures, opens numbered rounds, decides them from the members' answers,
and proposes growing or shrinking quorums. What must survive its own death is returned as Persist before the messages
that rest on it.
"""

import dataclasses

from everstep.core.admission import Admission
from everstep.core.agents import AgentDesk, AgentLinkClosed, AgentMessage
from everstep.core.crash_loop import CrashDesk
from everstep.core.events import EventKind, JobEvent, of_member
from everstep.core.failure_detector import Doubt, FailureDetector, Suspicion
from everstep.core.founding import GONE_FOR_CERTAIN, FoundingDesk
from everstep.core.ledger import Books
from everstep.core.lighthouse_state import JobConfig, JobState
from everstep.core.messages import (
    Activity,
    Adopted,
    Cause,
    Close,
    Drain,
    Effect,
    Failed,
    Goodbye,
    Heartbeat,
    Hello,
    JournalRecord,
    Log,
    Probe,
    Publish,
    Ready,
    Refused,
    ToLighthouse,
)
from everstep.core.overview import overview
from everstep.core.progress import ProgressJudge
from everstep.core.reconfiguration import Reconfigurer
from everstep.core.recovery_book import RecoveryBook
from everstep.core.roster import Peer, Roster
from everstep.core.types import MemberId, QuorumId, RefusalCode
from everstep.core.worker_book import WorkerBook

__all__ = [
    "AdmitGroup",
    "AgentLinkClosed",
    "AgentMessage",
    "DrainGroup",
    "Event",
    "JobConfig",
    "LighthouseMachine",
    "LinkClosed",
    "LinkMessage",
    "LinkOpened",
    "StartNewHistory",
]


@dataclasses.dataclass(frozen=True)
class LinkOpened:
    """A connection for this job was authenticated; its first message will be Hello."""

    link: int


@dataclasses.dataclass(frozen=True)
class LinkClosed:
    link: int
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class LinkMessage:
    link: int
    message: ToLighthouse


@dataclasses.dataclass(frozen=True)
class StartNewHistory:
    """The operator gives up the state that the job has in memory."""


@dataclasses.dataclass(frozen=True)
class DrainGroup:
    """The operator wants this group to leave at a step boundary; one that is not in the quorum is left alone."""

    replica_id: str


@dataclasses.dataclass(frozen=True)
class AdmitGroup:
    """The operator says that a group, held or left out for dying again and again, is mended."""

    replica_id: str


FromOperator = StartNewHistory | DrainGroup | AdmitGroup
Event = LinkOpened | LinkClosed | LinkMessage | AgentMessage | AgentLinkClosed | FromOperator


class LighthouseMachine:
    """One job. Links are numbered by the shell; a closed link's number never comes back."""

    def __init__(self, config: JobConfig, record: JournalRecord | None = None) -> None:
        self._config = config
        self._state = JobState(config, record)
        self._roster = Roster()
        self._joiners: dict[MemberId, None] = {}
        self._detector = FailureDetector(config.detector_policy)
        self._progress = ProgressJudge(config.stuck_policy)
        self._changes = Reconfigurer(self._state, self._roster, self._joiners, self._progress)
        self._founding = FoundingDesk(self._state, self._roster, self._joiners)
        self._books = Books()
        self._recoveries = RecoveryBook()
        self._ends_at: float | None = None  # everybody left or is gone; who is gone has until then to come back
        self._witnessed: dict[MemberId, None] = {}  # named by a failed collective since the last quorum
        self._crashes = CrashDesk(config.crash_policy)
        parts = (self._state, self._roster, self._joiners, self._detector, self._changes)
        self._workers = WorkerBook()
        self._admission = Admission(*parts, self._crashes, self._workers)
        self._agents = AgentDesk(*parts, self._admission, self._workers, self._judge_progress)

    # ---- the machine contract

    def start(self, now: float) -> list[Effect]:
        """Take the next epoch. Members of the journal's quorum have `return_timeout_s` to connect."""
        for member in self._state.known_members:
            self._detector.watch(member, now + self._config.return_timeout_s - self._config.heartbeat_timeout_s)
        fields: dict[str, object] = {"epoch": self._state.epoch, "history": self._state.history or "none"}
        started = JobEvent(kind=EventKind.LIGHTHOUSE_STARTED, evidence=f"epoch {self._state.epoch}")
        return [self._state.persist(), Log("lighthouse started", fields), Publish(started)]

    def receive(self, event: Event, now: float) -> list[Effect]:
        out: list[Effect] = []
        match event:
            case LinkMessage(link, message):
                out += self._message(link, message, now)
            case LinkClosed(link, detail):
                out += self._link_closed(link, detail, now)
            case StartNewHistory():
                out += self._start_new_history()
            case DrainGroup(replica_id):
                for member in self._state.current.member_ids if self._state.current is not None else ():
                    if member.replica_id == replica_id:
                        out += self._drain(member)
            case AdmitGroup(replica_id):
                out += self._admission.pardon(replica_id, now)
            case AgentMessage() | AgentLinkClosed():
                out += self._agents.receive(event, now)
            case LinkOpened():
                pass
        return out + self.tick(now)

    def _start_new_history(self) -> list[Effect]:
        known, out = list(self._state.known_members), self._founding.start_new_history()
        for member in known:
            if member not in self._joiners:
                self._detector.forget(member)
        return out

    def tick(self, now: float) -> list[Effect]:
        out: list[Effect] = []
        for finding in self._detector.expire(now):
            out += self._agents.ask_about(finding.member) if isinstance(finding, Doubt) else self._lost(finding, now)
        if self._state.round is not None and now >= self._state.round.deadline:
            out += self._changes.give_up_waiting(now)
        if self._state.paths.end_pauses(now):
            out += self._changes.propose()
        out += self._end_if_all_left(now)
        out += self._founding.abandon_lost_history()
        if self._state.held:
            out += self._admission.let_in(now)
        out += self._founding.try_found(now)
        if self._state.round is None:
            self._progress.keep_only(self._state.current)
            out += self._roster.send(Probe(), self._progress.ask(now))
        return out + self._agents.fence_left_out()

    def _lost(self, suspicion: Suspicion, now: float) -> list[Effect]:
        member, is_departed = suspicion.member, suspicion.member in self._state.departed
        ended = self._agents.has_ended(member)
        if ended is not None and not is_departed:
            return self._agents.end(ended, now)
        cause = Cause.LEFT if is_departed else suspicion.cause
        out = self._changes.suspect(member, cause, suspicion.detail, now)
        return out + self._admission.admit_contenders_of(member.replica_id, now)

    def next_deadline(self) -> float | None:
        deadlines = [self._detector.next_deadline(), self._founding.next_deadline(), self._ends_at]
        deadlines += [self._state.paths.next_deadline(), *self._state.held.values()]
        if self._state.round is not None:
            deadlines.append(self._state.round.deadline)
        else:
            deadlines.append(self._progress.next_deadline())
        known = [deadline for deadline in deadlines if deadline is not None]
        return min(known) if known else None

    # ---- messages

    def _message(self, link: int, message: ToLighthouse, now: float) -> list[Effect]:
        if isinstance(message, Hello):
            return self._admission.hello(link, message, now)
        peer = self._roster.on(link)
        if peer is None:
            if self._admission.is_contending(link):
                return []
            return [Close(link, f"{type(message).__name__} before Hello")]
        peer.heard_at = now
        state = self._state
        if not peer.leaving:
            self._detector.heard(peer.member, now)
        out = self._admission.judge_contenders(peer, now)
        match message:
            case Heartbeat():
                peer.heartbeat = message
                has_state = message.activity is not Activity.RECOVERING  # else its step says nothing
                if has_state and state.is_current(peer.member):
                    self._crashes.heard(peer.member.replica_id, peer.hello.nonce, message.steps, message.step)
                self._books.heard(peer.member.replica_id, peer.hello.nonce, message.spent, now)
                out += self._recoveries.heard(peer.member, message.recovery)
                out += self._judge_progress(peer, message, now)
            case Ready():
                if self._state.round is not None and message.round == self._state.round.id:
                    if message.report.member != peer.member:
                        return [Close(link, f"Ready of {message.report.member} from {peer.member}")]
                    out += self._changes.ready(message.report, now)
            case Adopted(quorum_id):
                out += self._adopted(quorum_id, now)
            case Failed():
                out += self._failed(peer, message, now)
            case Drain():
                out += self._drain(peer.member)
            case Goodbye():
                out += self._goodbye(peer, message, now)
        return out

    def _judge_progress(self, peer: Peer, beat: Heartbeat, now: float) -> list[Effect]:
        state, member = self._state, peer.member
        if not state.is_current(member) or member in state.suspects:
            self._progress.forget(member)
            return self._take_back(member, beat)
        self._progress.beat(member, beat, now)
        stuck = self._progress.verdict(member, now) if state.round is None else None
        if stuck is None:
            return []
        state.condemn(member)
        return self._changes.suspect(member, Cause.STUCK, stuck.detail, now)

    def _take_back(self, member: MemberId, beat: Heartbeat) -> list[Effect]:
        """One that was stuck moves on before a Grant left it out: it may be the only one that holds the state."""
        state = self._state
        is_undecided = state.round is not None and state.is_current(member) and member in state.stuck
        if not is_undecided or beat.activity is not Activity.WAITING:
            return []
        del state.stuck[member]
        return [*self._changes.clear(member, "it moves on"), *self._changes.notice_again(member)]

    def _adopted(self, quorum_id: QuorumId, now: float) -> list[Effect]:
        state = self._state
        out: list[Effect] = []
        if not self._changes.learn(quorum_id, out):
            return out
        assert state.current is not None
        if state.round is not None:
            return out + self._changes.restate_round(now)
        dead = [m for m in state.current.member_ids if m in state.suspects]
        if dead:
            return out + self._changes.open_round(tuple(dead), state.suspects[dead[0]], "died while joining", now)
        return out + self._changes.switch_joiners() + self._changes.propose()

    def _failed(self, peer: Peer, message: Failed, now: float) -> list[Effect]:
        state = self._state
        if not state.is_current(peer.member):
            return []
        if message.peer is not None:
            self._witnessed[message.peer] = None
            self._detector.confirm(message.peer, now)
        cause = Cause.COLLECTIVE_FAILED
        if message.is_unreachable and message.peer is not None and state.is_current(message.peer):
            cause = Cause.BROKEN_PATH
            self._state.paths.complain(peer.member, message.peer)
        if state.round is not None:
            return []
        named = f" (peer {message.peer})" if message.peer else ""
        return self._changes.open_round((), cause, f"{peer.member}: {message.detail}{named}", now)

    def _drain(self, member: MemberId) -> list[Effect]:
        state = self._state
        if not state.is_current(member) or member in state.leaving:
            return []  # a joiner leaves by itself; one that is being switched in asks again
        state.leaving[member] = None
        asked = of_member(EventKind.DRAIN_ASKED, member, quorum=state.current)
        out: list[Effect] = [Log("drain asked", {"member": str(member)}), asked]
        proposed = self._changes.propose()
        # The operator asks once: it must outlive this process, also where a round puts the proposal off.
        return out + (proposed or [state.persist()])

    def _goodbye(self, peer: Peer, message: Goodbye, now: float) -> list[Effect]:
        state = self._state
        peer.leaving = True
        self._crashes.left(peer.member.replica_id)
        was_joiner = self._joiners.pop(peer.member, 0) is None
        self._detector.forget(peer.member)
        out: list[Effect] = [Log("member left", {"member": str(peer.member), "reason": message.reason})]
        if peer.member in state.known_members or was_joiner:  # else its leaving was told when it was adopted
            left = of_member(EventKind.MEMBER_LEFT, peer.member, quorum=state.current, evidence=message.reason)
            out.append(left)
        if peer.member not in state.known_members:
            return out + self._admission.admit_contenders_of(peer.member.replica_id, now)
        state.departed[peer.member] = message.had_state
        # The others may be about to leave as well: end of training. If not, their next collective tells at once.
        self._detector.watch(peer.member, now)
        self._detector.link_closed(peer.member, f"left: {message.reason}", now + self._config.leave_grace_s)
        if state.round is not None:
            self._detector.confirm(peer.member, now)
        return out

    def _end_if_all_left(self, now: float) -> list[Effect]:
        """Every member of the quorum left on purpose, or is gone and did not come back: the job is over."""
        if not self._has_everybody_gone():
            self._ends_at = None
            return []
        if self._changes.patience.may_return():
            self._ends_at = self._ends_at or now + self._config.return_timeout_s
            if now < self._ends_at:
                return []
        return self._end_job()

    def _has_everybody_gone(self) -> bool:
        state = self._state
        if state.current is None or not any(state.departed.values()):
            return False
        return all(m in state.departed or state.suspects.get(m) in GONE_FOR_CERTAIN for m in state.current.member_ids)

    def _end_job(self) -> list[Effect]:
        state, self._ends_at = self._state, None
        out: list[Effect] = []
        late = list(self._joiners)
        for member in late:
            refusal = Refused(RefusalCode.JOB_ENDED, "the job ended while this group was joining it")
            out += self._roster.send(refusal, [member])
        for member in state.known_members:
            if not self._roster.is_connected(member):  # else its silence may be what a contender waits for
                self._detector.forget(member)
        self._joiners.clear()
        self._crashes.forget_all()
        ended = state.history
        out += self._founding.forget_history()
        state.history, state.ended = ended, True
        over = Publish(JobEvent(kind=EventKind.JOB_ENDED, evidence="every member left"))
        return [*out, state.persist(), Log("job ended", {"history": ended}), over]

    # ---- links

    def _link_closed(self, link: int, detail: str, now: float) -> list[Effect]:
        self._admission.drop_contender(link)
        peer = self._roster.disconnect(link)
        if peer is None:
            return []
        member = peer.member
        if member in self._state.known_members:
            is_in_grace = member in self._state.departed and self._detector.is_watched(member)
            if not is_in_grace:
                self._detector.watch(member, now)
                self._detector.link_closed(member, detail or "link closed without Goodbye", now)
                # A second witness: no grace (DESIGN 4.3, evidence).
                if member in self._witnessed or self._agents.has_ended(member) is not None:
                    self._detector.confirm(member, now)
        else:
            self._detector.forget(member)
            self._roster.forget(member)
        self._joiners.pop(member, None)
        out = self._recoveries.gone(member, "its link to the lighthouse closed")
        return out + self._admission.admit_contenders_of(member.replica_id, now)

    # ---- for people

    def members(self) -> list[str]:
        """Names of the groups in the quorum, in rank order."""
        current = self._state.current
        return [member.replica_id for member in current.member_ids] if current is not None else []

    def held(self, now: float) -> dict[str, dict[str, object]]:
        """Groups that are held or left out for dying again and again, and why."""
        return self._crashes.held(now)

    def status(self, now: float) -> dict[str, object]:
        """Plain JSON values: the quorum, the round, a row a peer, and each group's ledger."""
        return {
            **overview(self._state, self._roster, self._joiners, self._recoveries, now),
            "ledger": {name: self._books.statement(name) for name in self._books.groups},
            "held": self.held(now),
        }
