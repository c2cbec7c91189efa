"""One quorum, one failure, one join among very many groups: do the machines stay linear in them?

The real lighthouse machine and a real machine for each member, fed over links of one virtual millisecond. Members in
one process share the lists that real ones each keep; nothing else differs.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterator

from everstep.core.lighthouse import JobConfig, LighthouseMachine, LinkClosed, LinkMessage, LinkOpened
from everstep.core.messages import Effect, MembersChange, Persist, Send, Sever, ToLighthouse, ToMember
from everstep.core.moves import (
    BarrierEnded,
    Build,
    CollectiveFailed,
    GradientsReduced,
    LinkUp,
    ReadyToJoin,
    Recover,
    ReplicaConfig,
    StateRecovered,
    VoteEnded,
)
from everstep.core.recovery_plan import Claim, RecoveryPlan, plan_recovery
from everstep.core.replica import Replica
from everstep.core.types import Quorum, QuorumId

HOP_S = 0.001


class SharedLists:
    """Quorums and plans that many members derive from the same message: derived once."""

    def __init__(self) -> None:
        self._quorums: dict[tuple[int, QuorumId], tuple[MembersChange, Quorum | None]] = {}
        self._plans: dict[int, tuple[tuple[Claim, ...], RecoveryPlan]] = {}

    def quorum(self, key: MembersChange, quorum_id: QuorumId, derive: Callable[[], Quorum | None]) -> Quorum | None:
        found = self._quorums.get((id(key), quorum_id))
        if found is None:
            found = self._quorums[id(key), quorum_id] = (key, derive())
        return found[1]

    def plan(self, claims: tuple[Claim, ...]) -> RecoveryPlan:
        found = self._plans.get(id(claims))
        if found is None:
            found = self._plans[id(claims)] = (claims, plan_recovery(claims))
        return found[1]


class SharingReplica(Replica):
    """A member's machine whose lists are shared."""

    def __init__(self, config: ReplicaConfig, shared: SharedLists) -> None:
        super().__init__(config)
        self._shared = shared

    def _resolve(self, quorum_id: QuorumId, change: MembersChange) -> Quorum | None:
        quorum = self._shared.quorum(change, quorum_id, lambda: super(SharingReplica, self)._resolve(quorum_id, change))
        if quorum is not None:
            self._keep_list(quorum)
        return quorum

    def _plan(self, claims: tuple[Claim, ...]) -> RecoveryPlan:
        return self._shared.plan(claims)


@dataclasses.dataclass(frozen=True)
class Episode:
    """What one reconfiguration cost."""

    name: str
    virtual_s: float
    messages: int


class ScaleWorld:
    """Steps in virtual milliseconds: everything sent in one arrives in the next."""

    def __init__(self, groups: int) -> None:
        config = JobConfig(job_id="scale", lighthouse="lh", history="h", heartbeat_timeout_s=1e6)
        self.now = 0.0
        self.messages = 0
        self._groups = groups
        self._shared = SharedLists()
        self._machine = LighthouseMachine(config)
        self._members: dict[int, SharingReplica] = {}
        self._mail: collections.deque[tuple[int, ToLighthouse | ToMember, bool]] = collections.deque()
        self._from_lighthouse(self._machine.start(0.0))

    def run(self) -> Iterator[Episode]:
        yield self._episode("first quorum", self._found)
        yield self._episode("failure", self._fail)
        yield self._episode("join", self._join)

    def _episode(self, name: str, act: Callable[[], None]) -> Episode:
        began_at, messages = self.now, self.messages
        act()
        return Episode(name, self.now - began_at, self.messages - messages)

    def _found(self) -> None:
        for link in range(self._groups):
            self._start(link)
        self._deliver_all()
        self._settle()

    def _fail(self) -> None:
        """One dies in the middle of a step; the others reduce again and commit."""
        victim = self._groups // 2
        del self._members[victim]
        self._from_lighthouse(self._machine.receive(LinkClosed(victim, "killed"), self.now))
        neighbour = self._members[victim - 1]
        assert neighbour.quorum is not None
        self._from_member(
            victim - 1, neighbour.receive(CollectiveFailed(neighbour.quorum.id, victim, "closed"), self.now)
        )
        self._deliver_all()
        self._settle()
        self._step()

    def _join(self) -> None:
        self._start(self._groups)
        self._deliver_all()
        self._step()  # its vote adopts the proposal
        self._deliver_all()
        self._settle()
        self._step()

    def _start(self, link: int) -> None:
        config = ReplicaConfig(replica_id=f"g{link}", nonce=str(link), expected_replicas=self._groups)
        member = self._members[link] = SharingReplica(config, self._shared)
        self._from_lighthouse(self._machine.receive(LinkOpened(link), self.now))
        self._from_member(link, member.receive(LinkUp(), self.now))
        self._from_member(link, member.receive(ReadyToJoin(), self.now))

    # ---- the links

    def _from_member(self, link: int, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                self._mail.append((link, effect.message, True))

    def _from_lighthouse(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                self._mail.extend((link, effect.message, False) for link in effect.links)
            elif isinstance(effect, Persist | Sever):
                continue

    def _deliver_all(self) -> None:
        while self._mail:
            self.now += HOP_S
            arriving, self._mail = self._mail, collections.deque()
            self.messages += len(arriving)
            for link, message, is_upwards in arriving:
                if is_upwards:
                    event = LinkMessage(link, message)  # type: ignore[arg-type]
                    self._from_lighthouse(self._machine.receive(event, self.now))
                elif link in self._members:
                    self._from_member(link, self._members[link].receive(message, self.now))  # type: ignore[arg-type]

    # ---- the collectives: every one completes everywhere at once

    def _settle(self) -> None:
        moves = {link: member.next_move() for link, member in self._members.items()}
        builds = {link: move for link, move in moves.items() if isinstance(move, Build)}
        if len(builds) < len(self._members):
            odd = next(move for move in moves.values() if not isinstance(move, Build))
            raise AssertionError(f"a member does not build the quorum but: {odd}")
        quorum = next(iter(builds.values())).quorum
        by_rank = sorted(builds, key=lambda link: self._members[link].rank or 0)
        claims = tuple(builds[link].claim for link in by_rank)
        for link in by_rank:
            member = self._members[link]
            self._from_member(link, member.receive(BarrierEnded(quorum.id, claims), self.now))
            if isinstance(member.next_move(), Recover):
                self._from_member(link, member.receive(StateRecovered(quorum.id), self.now))
        self._deliver_all()

    def _step(self) -> None:
        """Reduce, vote, commit: not one message to the lighthouse, but for what a proposal's adoption costs."""
        settled = {link: member for link, member in self._members.items() if member.is_settled}
        for link, member in settled.items():
            assert member.quorum is not None
            reduced = GradientsReduced(member.quorum.id, len(member.quorum.members))
            self._from_member(link, member.receive(reduced, self.now))
        votes = {link: member.cast_vote(True) for link, member in settled.items()}
        proposals = [vote.proposal for vote in votes.values() if vote is not None]
        lowest, highest = min(proposals), max(proposals)
        for link, member in settled.items():
            vote = votes[link]
            assert vote is not None
            ended = VoteEnded(vote.quorum_id, True, lowest, highest)
            self._from_member(link, member.receive(ended, self.now))
