"""When a history may begin (rule G8 of DESIGN 4.4): the first quorum of fresh members, and nobody else's loss."""

from collections.abc import Sequence

from everstep.core.events import EventKind, JobEvent, of_quorum
from everstep.core.lighthouse_state import JobState
from everstep.core.messages import Cause, Effect, Log, Publish, Refused, Send, Switch, Waiting
from everstep.core.roster import Roster
from everstep.core.types import MemberId, RefusalCode, genesis

SAY_ALL_INTERVAL_S = 1.0
STRANGERS_NAMED_MAX = 8
GIVEN_UP = "the operator gave up the state that this group holds: start it again, from its checkpoint"
# A member that failed in one of these ways is gone for certain once a newer process of its replica_id said Hello.
GONE_FOR_CERTAIN = (Cause.PROCESS_EXITED, Cause.LINK_CLOSED, Cause.SUPERSEDED, Cause.LEFT)


class FoundingDesk:
    """Founds a history when every expected group is here, or `min_replicas` at the join deadline."""

    def __init__(self, state: JobState, roster: Roster, joiners: dict[MemberId, None]) -> None:
        self._state = state
        self._roster = roster
        self._joiners = joiners
        self._deadline: float | None = None
        self._expected = 0
        self._minimum = state.config.min_replicas
        self._said = ""
        self._say_all_at = 0.0

    def next_deadline(self) -> float | None:
        return self._deadline if self._state.current is None else None

    def try_found(self, now: float) -> list[Effect]:
        state = self._state
        if state.current is not None or (state.history and not state.ended):
            self._deadline = None
            return []
        if state.strangers and self._joiners:
            self._deadline = None
            return self._say(self._why_strangers(), now)
        if not self._joiners:
            self._deadline, self._expected, self._minimum = None, 0, state.config.min_replicas
            return []
        if self._deadline is None:
            self._deadline = now + state.config.join_timeout_s
        self._read_newest()
        here = sum(member not in state.held for member in self._joiners)
        all_here = self._expected > 0 and here >= max(self._expected, self._minimum)
        if all_here or (here >= self._minimum and now >= self._deadline):
            return self._found()
        if now >= self._deadline:
            self._deadline = now + state.config.join_timeout_s
        why = f"{here} of {max(self._expected, self._minimum)} replica groups are here"
        return self._say(why, now)

    def _why_strangers(self) -> str:
        names = ", ".join(list(self._state.strangers)[:STRANGERS_NAMED_MAX])
        return (
            f"the state of this job that {names} held when last heard is unknown here, and no second history begins "
            f"beside it: start the lighthouse on the state directory it had, or {self._state.how_to_give_up}"
        )

    def _read_newest(self) -> None:
        """What the joiner that came last asks for; those before it were read when they came."""
        peer = self._roster.of(next(reversed(self._joiners)))
        if peer is not None:
            self._expected = max(self._expected, peer.hello.expected_replicas)
            self._minimum = max(self._minimum, peer.hello.min_replicas)

    def abandon_lost_history(self) -> list[Effect]:
        """Give a history up whose every holder is gone for certain and restarted without state (decisions/002).

        Not after silence: an unreachable member may still be training.
        """
        state = self._state
        if state.round is None or state.current is None or not state.current.members:
            return []
        fresh: dict[str, None] = {}
        stateless: list[MemberId] = []
        for member in state.known_members:
            report = state.round.reports.get(member)
            if member in self._joiners or (report is not None and not report.has_state):
                stateless.append(member)
                continue
            if member not in state.suspects:
                return []
            fresh = fresh or {joiner.replica_id: None for joiner in self._joiners}
            cause = state.suspects.get(member)
            if cause not in GONE_FOR_CERTAIN or (cause is not Cause.LEFT and member.replica_id not in fresh):
                return []
        fields: dict[str, object] = {"history": state.history, "quorum": str(state.current.id)}
        fields["why"] = "every member that held the state has exited and was started afresh"
        for member in stateless:
            if self._roster.is_connected(member):
                self._joiners[member] = None
        why = str(fields["why"])
        lost = Publish(JobEvent(kind=EventKind.HISTORY_LOST, quorum_id=str(state.current.id), evidence=why))
        return [Log("history lost", fields), lost, *self.forget_history(keep=stateless)]

    def start_new_history(self) -> list[Effect]:
        """The operator gives up the state in memory: whoever holds it ends; those without it found a new history."""
        state = self._state
        reports = state.round.reports if state.round is not None else {}
        known = state.known_members
        stateless = [m for m in known if m in self._joiners or (m in reports and not reports[m].has_state)]
        out: list[Effect] = [Log("new history", {"given_up": state.history or "none"})]
        out.append(Publish(JobEvent(kind=EventKind.HISTORY_LOST, evidence="the operator starts a new history")))
        given_up = [m for m in known if m not in stateless]
        for member in stateless:
            if self._roster.is_connected(member):
                self._joiners[member] = None
        state.gives_up = True
        state.strangers.clear()
        out += self.forget_history(keep=stateless)
        for member in given_up:
            out += self._roster.send(Refused(RefusalCode.JOB_ENDED, GIVEN_UP, member), [member])
        return out

    def forget_history(self, keep: Sequence[MemberId] = ()) -> list[Effect]:
        """Drop the current quorum, so that a new history can be founded."""
        state = self._state
        for member in state.known_members:
            if member not in keep:
                state.evict(member)
        state.forget_quorums()
        state.history, state.ended = "", False
        return [state.persist()]

    def _found(self) -> list[Effect]:
        state = self._state
        ready = [member for member in self._joiners if member not in state.held]
        peers = [peer for member in ready if (peer := self._roster.of(member)) is not None]
        members = {peer.member: peer.address for peer in peers}
        # Of members that continue from checkpoints on disk, the one furthest on gives its state to the others.
        furthest = max(peers, key=lambda peer: peer.hello.start_step)
        start_step = furthest.hello.start_step
        first = state.new_quorum(members)
        founder = next(m.id for m in first.members if self._hello_step(m.id) == start_step)
        init_sync = any(peer.hello.init_sync for peer in peers)
        state.history = f"{state.config.history}-{first.id}"
        state.current, state.is_founding, state.ended, state.gives_up = first, True, False, False
        for member in ready:
            del self._joiners[member]
        self._deadline, self._said = None, ""
        lineage = genesis(state.history, start_step)
        out: list[Effect] = [state.persist()]
        for change, links in self._roster.split_by_known(first, None, first.member_ids):
            out.append(Send(Switch(first.id, change, lineage, founder if init_sync else None), links))
        fields: dict[str, object] = {"history": state.history, "quorum": str(first.id), "members": len(peers)}
        fields["start_step"] = start_step
        fields["initial_state_from"] = str(founder) if init_sync else "each member"
        return [*out, Log("founded", fields), of_quorum(EventKind.JOB_FOUNDED, first, None, step=start_step)]

    def _hello_step(self, member: MemberId) -> int:
        peer = self._roster.of(member)
        return peer.hello.start_step if peer is not None else -1

    def _say(self, why: str, now: float) -> list[Effect]:
        """To who has just come at once, to all at times: with many groups everybody's every arrival is a flood."""
        if why == self._said:
            return []
        self._said = why
        if now < self._say_all_at:
            newcomer = next(reversed(self._joiners))
            return list(self._roster.send(Waiting(why), [newcomer]))
        self._say_all_at = now + SAY_ALL_INTERVAL_S
        return [*self._roster.send(Waiting(why), self._joiners), Log("waiting for members", {"why": why})]
