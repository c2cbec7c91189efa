"""Machines of a group's ranks (leader.py, follower.py) that lack one rule each."""

import dataclasses

import msgspec

from everstep.core.follower import Follower
from everstep.core.group import Beginning, RankReduced, ToFollower, View
from everstep.core.leader import Leader
from everstep.core.messages import Effect, Sever
from everstep.core.moves import ReplicaEvent, StateRecovered, VoteCast
from everstep.core.types import QuorumId


class VotesForItsFollowers(Leader):
    """The group's vote is cast without the other ranks' ballots."""

    def cast_ballot(self, objection: str) -> tuple[VoteCast | None, list[Effect]]:
        self._tally.ballots |= dict.fromkeys(range(self.group_size), "")
        return super().cast_ballot(objection)


class ReducesForItsFollowers(Leader):
    """The step is reduced when the leader's reductions are."""

    def _rank_reduced(self, rank: int, report: RankReduced, now: float) -> list[Effect]:
        out: list[Effect] = []
        for each in range(self.group_size) if rank == 0 else ():
            out += super()._rank_reduced(each, report, now)
        return out


class RecoversForItsFollowers(Leader):
    """The state is recovered when the leader's part of it is."""

    def _rank_recovered(self, rank: int, quorum_id: QuorumId, now: float) -> list[Effect]:
        self._tally.recovered |= dict.fromkeys(range(self.group_size)).keys()
        return super()._rank_recovered(rank, quorum_id, now)


class PreparesUnsettled(Leader):
    """`before_step` runs while some ranks wait for the others' barriers."""

    def _let_prepare(self) -> None:
        is_settled, self.is_settled = self.is_settled, self.quorum is not None
        super()._let_prepare()
        self.is_settled = is_settled


class KeepsItsCollectives(Follower):
    """A notice does not sever a follower's collectives."""

    def _show(self, view: View) -> list[Effect]:
        return [effect for effect in super()._show(view) if not isinstance(effect, Sever)]


class AppliesAtOnce(Follower):
    """It applies its part of the state before the other ranks have theirs."""

    def receive(self, event: ToFollower | ReplicaEvent, now: float) -> list[Effect]:
        effects = super().receive(event, now)
        self._has_to_apply |= isinstance(event, StateRecovered) and bool(effects)
        return effects


class ForgetsItsAverage(Follower):
    """What a follower has reduced does not outlive a change of the quorum."""

    def _show(self, view: View) -> list[Effect]:
        return super()._show(msgspec.structs.replace(view, holds_average=False))


class GoesByTheLeadersAverage(Follower):
    """A reduction that it added as a grant came is forgotten."""

    def _show(self, view: View) -> list[Effect]:
        self._reopened = 0
        return super()._show(view)


class BeginsInItsOwnQuorum(Follower):
    """It begins the step as the quorum is by then, not as it was when its leader's script began it."""

    def begin_batch(self) -> Beginning:
        return dataclasses.replace(super().begin_batch(), members=self.beginning().members)


class BeginsOnceSettled(Follower):
    """It settles in the newest quorum before it begins what its leader has begun."""

    @property
    def has_begun(self) -> bool:
        return self.is_settled and not self.is_frozen and self._batch_number in self._began


class BallotsOnce(Follower):
    """It does not vote again where the same step is voted on in another quorum."""

    def cast_ballot(self, objection: str) -> tuple[VoteCast | None, list[Effect]]:
        cast, effects = super().cast_ballot(objection)
        if self._step_voted == (self.step, self.attempt):
            return cast, []
        self._step_voted = (self.step, self.attempt)
        return cast, effects

    _step_voted = (-1, -1)
