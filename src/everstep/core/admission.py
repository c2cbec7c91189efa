"""Who is let in, as what: the answers to Hello (rule G6 of DESIGN 4.4)."""

import dataclasses

from everstep.core.crash_loop import CrashDesk, Verdict
from everstep.core.events import EventKind, JobEvent, of_member
from everstep.core.failure_detector import FailureDetector
from everstep.core.founding import GIVEN_UP
from everstep.core.lighthouse_state import JobState
from everstep.core.messages import (
    Cause,
    Close,
    Effect,
    Hello,
    Log,
    Publish,
    Refused,
    Send,
    Switch,
    Waiting,
    Welcome,
    whole,
)
from everstep.core.reconfiguration import Reconfigurer
from everstep.core.roster import Peer, Roster
from everstep.core.types import MemberId, RefusalCode
from everstep.core.worker_book import WorkerBook

REPLICA_ID_CHARS_MAX = 128
STRANGERS_KEPT_MAX = 1000


@dataclasses.dataclass
class Contender:
    """A process whose replica_id another live process has: it waits until that one proves to be alive or dead."""

    hello: Hello
    judged_at: float  # a word of the other one after this instant proves that it is alive


class Admission:
    """Acts on the shared JobState; the machine in lighthouse.py hands it every Hello."""

    def __init__(
        self,
        state: JobState,
        roster: Roster,
        joiners: dict[MemberId, None],
        detector: FailureDetector,
        changes: Reconfigurer,
        crashes: CrashDesk,
        workers: WorkerBook,
    ) -> None:
        self._state = state
        self._config = state.config
        self._roster = roster
        self._joiners = joiners
        self._detector = detector
        self._changes = changes
        self._crashes = crashes
        self._workers = workers
        self._contenders: dict[int, Contender] = {}
        self._waits_as: dict[str, MemberId] = {}  # who was last a joiner under a replica_id

    def is_contending(self, link: int) -> bool:
        return link in self._contenders

    def drop_contender(self, link: int) -> None:
        self._contenders.pop(link, None)

    def hello(self, link: int, hello: Hello, now: float) -> list[Effect]:
        refusal = self._why_refuse(hello)
        if refusal is not None:
            return [*self._note_stranger(hello, refusal), Send(refusal, (link,)), Close(link, refusal.detail)]
        other = self._roster.connected_as(hello.report.member.replica_id)
        if other is not None and other.link != link:
            if other.hello.nonce != hello.nonce:
                return self._contend(link, hello, other, now)
            assert other.link is not None
            stale = other.link
            self._roster.disconnect(stale)
            return [Close(stale, "the member connected anew"), *self._admit(link, hello, now)]
        return self._admit(link, hello, now)

    def _why_refuse(self, hello: Hello) -> Refused | None:
        report, state = hello.report, self._state
        name = report.member.replica_id
        if not name or len(name) > REPLICA_ID_CHARS_MAX:
            return Refused(RefusalCode.BAD_CONFIG, f"replica_id must have 1 to {REPLICA_ID_CHARS_MAX} characters")
        if 0 < hello.expected_replicas < max(hello.min_replicas, self._config.min_replicas):
            wanted = max(hello.min_replicas, self._config.min_replicas)
            detail = f"min_replicas is {wanted} but the job has only {hello.expected_replicas} replica groups"
            return Refused(RefusalCode.BAD_CONFIG, f"{detail}: lower --min-replicas or raise NUM_REPLICA_GROUPS")
        is_stranger = hello.lighthouse != state.lighthouse
        if report.has_state and state.current is None and (state.gives_up or (state.ended and not is_stranger)):
            # A process that went on under a new incarnation would found the next history with stale weights.
            why = GIVEN_UP if state.gives_up else "the job ended while this group was away"
            return Refused(RefusalCode.JOB_ENDED, why)
        if report.has_state and is_stranger:
            detail = (
                f"{name} holds state of this job that lighthouse {state.lighthouse} knows nothing of: it would found a "
                f"second history. Start the lighthouse on the state directory it had; or {state.how_to_give_up}"
            )
            return Refused(RefusalCode.STRANGER, detail)
        return None

    def _note_stranger(self, hello: Hello, refusal: Refused) -> list[Effect]:
        state, name = self._state, hello.report.member.replica_id
        if refusal.code is not RefusalCode.STRANGER or name in state.strangers:
            return []
        state.strangers[name] = None
        if len(state.strangers) > STRANGERS_KEPT_MAX:
            del state.strangers[next(iter(state.strangers))]
        fields: dict[str, object] = {"group": name, "step": hello.report.step, "its_lighthouse": hello.lighthouse}
        return [Log("stranger refused", fields | {"remedy": refusal.detail})]

    def _contend(self, link: int, hello: Hello, other: Peer, now: float) -> list[Effect]:
        """Another live process has this replica_id, or a dead one whose socket a forked child keeps open."""
        self._contenders[link] = Contender(hello, now + 2 * self._config.heartbeat_interval_s)
        if not self._detector.is_watched(other.member):
            self._detector.watch(other.member, now)  # it was given up before: its silence must end this wait too
        why = f"replica_id {hello.report.member.replica_id} is connected from another process; checking that it lives"
        return [Send(Waiting(why), (link,)), Log("replica_id contended", {"member": str(other.member)})]

    def judge_contenders(self, peer: Peer, now: float) -> list[Effect]:
        out: list[Effect] = []
        for link, contender in list(self._contenders.items()):
            if contender.hello.report.member.replica_id == peer.member.replica_id and now >= contender.judged_at:
                del self._contenders[link]
                detail = (
                    f"replica_id {peer.member.replica_id} is in use by another live process; give each group its own "
                    "REPLICA_GROUP_ID, or stop the other one"
                )
                out += [Send(Refused(RefusalCode.REPLICA_ID_TAKEN, detail), (link,)), Close(link, detail)]
        return out

    def admit_contenders_of(self, replica_id: str, now: float) -> list[Effect]:
        for link, contender in list(self._contenders.items()):
            if contender.hello.report.member.replica_id == replica_id:
                del self._contenders[link]
                silent = self._roster.connected_as(replica_id)
                out: list[Effect] = []
                if silent is not None and silent.link is not None:
                    out.append(Close(silent.link, "silent; superseded by a newer process"))
                    self._roster.disconnect(silent.link)
                return out + self._admit(link, contender.hello, now)
        return []

    def _admit(self, link: int, hello: Hello, now: float) -> list[Effect]:
        ended = self._workers.why_ended(hello.workers)
        if ended:
            return [Close(link, f"the process has ended: {ended}")]
        self._workers.came(hello.workers)
        out: list[Effect] = []
        member = hello.report.member
        verdict = self._crashes.started(member.replica_id, hello.nonce, now)
        if verdict.is_left_out and not hello.report.has_state:
            return self._leave_out(link, member.replica_id)
        is_fresh = member.incarnation == 0 or hello.lighthouse != self._state.lighthouse
        if is_fresh:
            member = MemberId(member.replica_id, self._state.new_incarnation(out))
        renamed = self._roster.on(link)
        if renamed is not None:
            self._roster.forget(renamed.member)
            self._detector.forget(renamed.member)
        peer = Peer(member, hello, link, heard_at=now)
        self._roster.add(peer)
        self._detector.watch(member, now)
        interval, timeout = self._config.heartbeat_interval_s, self._config.heartbeat_timeout_s
        welcome = Welcome(member, self._state.lighthouse, interval, timeout, self._config.min_replicas)
        out.append(Send(welcome, (link,)))
        quorum_id = hello.report.quorum_id
        if hello.report.has_state and quorum_id is not None:
            if self._state.list_of(quorum_id) is not None:
                peer.learn(quorum_id)
            out += self._hello_with_state(peer, now)
        else:
            self._state.strangers.pop(member.replica_id, None)  # a new process: the one with the state is gone
            out += self._hello_without_state(peer, now)
            out += self._hold(member, verdict, now)
        for older in [m for m in self._state.known_members if m.replica_id == member.replica_id and m != member]:
            if older.incarnation < member.incarnation:
                self._detector.forget(older)
                out += self._changes.suspect(older, Cause.SUPERSEDED, f"{member} started", now)
        return out + self._changes.propose()

    def _leave_out(self, link: int, replica_id: str) -> list[Effect]:
        why = f"{self._crashes.describe(replica_id)}; it is left out. Mend it, then `everstep admit {replica_id}`"
        left_out = Publish(JobEvent(kind=EventKind.GROUP_LEFT_OUT, replica_id=replica_id, evidence=why))
        refusal = Refused(RefusalCode.CRASH_LOOP, why)
        said = Log("group left out", {"group": replica_id, "why": why})
        return [Send(refusal, (link,)), Close(link, why), said, left_out]

    def _hold(self, member: MemberId, verdict: Verdict, now: float) -> list[Effect]:
        if member not in self._joiners or now >= verdict.held_until:
            return []
        self._state.held[member] = verdict.held_until
        why = f"{self._crashes.describe(member.replica_id)}; it is let in after {verdict.held_until - now:.1f} s"
        event = of_member(EventKind.GROUP_HELD, member, quorum=self._state.current, evidence=why)
        fields: dict[str, object] = {"group": member.replica_id, "why": why}
        return [*self._roster.send(Waiting(why), [member]), Log("group held", fields), event]

    def let_in(self, now: float) -> list[Effect]:
        """Whose pause is over. It is proposed like any joiner."""
        held = self._state.held
        over = [member for member, until in held.items() if now >= until or member not in self._joiners]
        for member in over:
            del held[member]
        return self._changes.propose() if over else []

    def pardon(self, replica_id: str, now: float) -> list[Effect]:
        """The operator says that this group is mended."""
        if not self._crashes.pardon(replica_id):
            return []
        for member in self._state.held:
            if member.replica_id == replica_id:
                self._state.held[member] = now
        return [Log("group admitted again", {"group": replica_id})]

    def _hello_with_state(self, peer: Peer, now: float) -> list[Effect]:
        state, report, member = self._state, peer.hello.report, peer.member
        is_known = member in state.known_members
        if not is_known or (member in state.suspects and not (state.is_current(member) and state.round is not None)):
            return self._evict_on_hello(peer)
        out: list[Effect] = self._changes.clear(member, "it connected again")
        assert report.quorum_id is not None
        learned = self._changes.learn(report.quorum_id, out)
        assert state.current is not None
        if not state.is_current(member):
            return out  # the learned quorum is one without it; it was told
        dead = tuple(m for m in state.current.member_ids if m in state.suspects)
        if state.round is not None:
            out += self._changes.restate_round(now) if learned else self._changes.notice_again(member)
        elif report.is_unsettled or report.quorum_id != state.current.id or dead:
            out += self._changes.open_round(dead, Cause.OUT_OF_STEP, f"{member} reconnected out of step", now)
        elif learned:
            out += self._changes.switch_joiners()
        else:
            out += self._changes.resend_proposal(member)
        return out

    def _hello_without_state(self, peer: Peer, now: float) -> list[Effect]:
        state, member = self._state, peer.member
        if member in state.suspects or state.is_evicted(member):
            return self._evict_on_hello(peer)
        if state.is_current(member):
            assert state.current is not None
            if state.round is not None:
                return list(self._changes.notice_again(member))
            if state.is_founding:
                # Who was told to found it is not known for certain: the answers tell whether anybody did.
                return self._changes.open_round((), Cause.OUT_OF_STEP, f"{member} holds no state yet", now)
            switch = Send(Switch(state.current.id, whole(state.current)), self._roster.links_of([member]))
            peer.learn(state.current.id)
            return [switch, *self._changes.resend_proposal(member)]
        older = self._waits_as.get(member.replica_id)
        if older is not None:
            self._joiners.pop(older, None)
        self._waits_as[member.replica_id] = member
        self._joiners[member] = None
        fields: dict[str, object] = {"member": str(member), "address": peer.hello.store}
        out: list[Effect] = [Log("member waits to join", fields), of_member(EventKind.MEMBER_WAITING, member)]
        if state.round is not None and state.round.reported_why:
            out += self._roster.send(Waiting(state.round.reported_why), [member])
        pause = state.paths.pause_of(member.replica_id)
        return [*out, *self._roster.send(Waiting(pause.why), [member])] if pause is not None else out

    def _evict_on_hello(self, peer: Peer) -> list[Effect]:
        detail = f"{peer.member} was left out of the quorum while it was away; it recovers and joins again"
        out = self._changes.tell_evicted(peer.member, detail)
        out.append(of_member(EventKind.MEMBER_EVICTED, peer.member, quorum=self._state.current, evidence=detail))
        return [*out, Log("evicted", {"member": str(peer.member)})]
