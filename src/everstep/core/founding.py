"""When a history may begin (rule G8 of DESIGN 4.4): the first quorum of fresh members, and nobody else's loss."""

from everstep.core.lighthouse_state import JobState
from everstep.core.messages import Cause, Effect, Log, Send, Switch, Waiting
from everstep.core.roster import Peer, Roster
from everstep.core.types import MemberId, genesis

# A member that failed in one of these ways is gone for certain once a newer process of its replica_id said Hello.
GONE_FOR_CERTAIN = (Cause.LINK_CLOSED, Cause.SUPERSEDED, Cause.LEFT)


class FoundingDesk:
    """Founds a history when every expected group is here, or `min_replicas` at the join deadline."""

    def __init__(self, state: JobState, roster: Roster, joiners: dict[MemberId, None]) -> None:
        self._state = state
        self._roster = roster
        self._joiners = joiners
        self._deadline: float | None = None
        self._said = ""

    def next_deadline(self) -> float | None:
        return self._deadline if self._state.current is None else None

    def try_found(self, now: float) -> list[Effect]:
        state = self._state
        if state.current is not None or (state.history and not state.ended):
            self._deadline = None
            return []
        peers = [p for m in self._joiners if (p := self._roster.of(m)) is not None and p.link is not None]
        if not peers:
            self._deadline = None
            return []
        if self._deadline is None:
            self._deadline = now + state.config.join_timeout_s
        expected = max(peer.hello.expected_replicas for peer in peers)
        minimum = max([state.config.min_replicas, *(peer.hello.min_replicas for peer in peers)])
        all_here = expected > 0 and len(peers) >= max(expected, minimum)
        if all_here or (len(peers) >= minimum and now >= self._deadline):
            return self._found(peers)
        if now >= self._deadline:
            self._deadline = now + state.config.join_timeout_s
        return self._say(f"{len(peers)} replica groups are here; {max(expected, minimum)} found the job together")

    def abandon_lost_history(self) -> list[Effect]:
        """Give a history up whose every holder is gone for certain and restarted without state (decisions/002).

        Not after silence: an unreachable member may still be training.
        """
        state = self._state
        if state.round is None or state.current is None or not state.current.members:
            return []
        fresh = {member.replica_id for member in self._joiners}
        for member in state.known_members:
            cause = state.suspects.get(member)
            if cause not in GONE_FOR_CERTAIN or (cause is not Cause.LEFT and member.replica_id not in fresh):
                return []
        fields: dict[str, object] = {"history": state.history, "quorum": str(state.current.id)}
        fields["why"] = "every member that held the state has exited and was started afresh"
        return [Log("history lost", fields), *self.forget_history()]

    def forget_history(self) -> list[Effect]:
        """Drop the current quorum, so that a new history can be founded. Also the operator's --new-history."""
        state = self._state
        for member in state.known_members:
            state.evict(member)
        state.forget_quorums()
        state.history, state.ended = "", False
        return [state.persist()]

    def _found(self, peers: list[Peer]) -> list[Effect]:
        state = self._state
        members = {peer.member: peer.address for peer in peers}
        # Of members that continue from checkpoints on disk, the one furthest on gives its state to the others.
        furthest = max(peers, key=lambda peer: peer.hello.start_step)
        start_step = furthest.hello.start_step
        first = state.new_quorum(members)
        founder = next(m.id for m in first.members if self._hello_step(m.id) == start_step)
        init_sync = any(peer.hello.init_sync for peer in peers)
        state.history = f"{state.config.history}-{first.id}"
        state.current, state.is_founding, state.ended = first, True, False
        self._joiners.clear()
        self._deadline, self._said = None, ""
        lineage = genesis(state.history, start_step)
        out: list[Effect] = [state.persist()]
        for change, links in self._roster.split_by_known(first, None, first.member_ids):
            out.append(Send(Switch(first.id, change, lineage, founder if init_sync else None), links))
        fields: dict[str, object] = {"history": state.history, "quorum": str(first.id), "members": len(peers)}
        fields["start_step"] = start_step
        fields["initial_state_from"] = str(founder) if init_sync else "each member"
        return [*out, Log("founded", fields)]

    def _hello_step(self, member: MemberId) -> int:
        peer = self._roster.of(member)
        return peer.hello.start_step if peer is not None else -1

    def _say(self, why: str) -> list[Effect]:
        if why == self._said:
            return []
        self._said = why
        return [*self._roster.send(Waiting(why), self._joiners), Log("waiting for members", {"why": why})]
