"""Shells that lack one rule of the loan each: what train/stepper.py and recovery/ do beside the machines."""

from collections.abc import Sequence

from everstep.core.moves import Recover, Reduce, StateRecovered
from everstep.core.recovery_plan import Claim
from everstep.core.types import MemberId, Quorum, QuorumId
from everstep.sim.checkers import Weights
from everstep.sim.group_ends import FollowerParty, LeaderParty
from everstep.sim.loans import Seen, Transfer
from everstep.sim.process import Process
from everstep.sim.ranks import RankParty


class DoesNotKeepStill(Process):
    """Neither donors nor joiners meet."""

    def _keep_still(self, quorum: Quorum, joiners: Sequence[MemberId]) -> bool:
        return False

    def _fetched_all(self, move: Recover, fetched: Weights) -> None:
        self._take(move.lineage, fetched)
        self._report(StateRecovered(move.quorum.id))


class RevokesAfterwards(Process):
    """A donor that a failure round has freed goes on first."""

    def _revoke(self) -> None:
        move = self.replica.next_move()
        if isinstance(move, Reduce) and self.loan is not None and move.quorum.id == self.loan.quorum_id:
            super()._revoke()


class MeetsWithoutEnd(Process):
    """The Notice of a failure does not sever the meeting."""

    def _sever(self, up_to: QuorumId) -> None:
        busy = self._busy
        super()._sever(up_to)
        if busy is not None and busy[0] == "meet":
            self._busy = busy


class FoundsWhileTorn(Process):
    """A new history begins with what a transfer that did not end has left."""

    def _must_end(self, claim: Claim) -> bool:
        return False


class BelievesWithoutALook(Transfer):
    """Whatever was read counts."""

    def _believes(self, seen: Seen) -> bool:
        return True


# ---- in groups of several ranks


class _LetsGoAtOnce(RankParty):
    """A joiner's rank meets the donors when it has its own part."""

    def _fetched_all(self, move: Recover, fetched: Weights) -> None:
        self._has_fetched(move.quorum)

        def met() -> None:
            self._take(move.lineage, fetched)
            self._report(StateRecovered(move.quorum.id))

        self._issue(move.quorum, "meet", None, lambda _: met())


class LeaderLetsGoAtOnce(_LetsGoAtOnce, LeaderParty):
    pass


class FollowerLetsGoAtOnce(_LetsGoAtOnce, FollowerParty):
    pass


class _DoesNotKeepStill(RankParty):
    def _keep_still(self, quorum: Quorum, joiners: Sequence[MemberId]) -> bool:
        return False


class LeaderDoesNotKeepStill(_DoesNotKeepStill, LeaderParty):
    pass


class FollowerDoesNotKeepStill(_DoesNotKeepStill, FollowerParty):
    pass


class _RevokesAfterwards(RankParty):
    """A donor that a failure round has freed goes on first."""

    def _revoke(self) -> None:
        if self._try is not None:
            super()._revoke()


class LeaderRevokesAfterwards(_RevokesAfterwards, LeaderParty):
    pass


class FollowerRevokesAfterwards(_RevokesAfterwards, FollowerParty):
    pass
