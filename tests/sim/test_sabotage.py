"""The checkers can fail: machines that lack a rule are caught, each within so many seeds."""

import dataclasses
from typing import Any

import pytest

from everstep.core.follower import Follower
from everstep.core.leader import Leader
from everstep.core.lighthouse import LighthouseMachine
from everstep.core.replica import Replica
from everstep.sim.budgets import SLOW_TRANSFERS, Climate, Faults, Trigger
from everstep.sim.group_ends import FollowerParty, LeaderParty
from everstep.sim.loans import Transfer
from everstep.sim.process import Process
from everstep.sim.world import World
from tests.sim import sabotage, sabotaged_loans, sabotaged_ranks
from tests.sim.schedules import (
    ALL_DONORS_DIE,
    DIES_AS_IT_LETS_GO,
    DIES_WHILE_RANKS_RECOVER,
    FAILS_AS_RANKS_DECIDE,
    FAILS_AS_RANKS_REDUCE,
    FOUNDING_NOT_SENT,
    GRANT_NOT_ON_DISK,
    HASTY,
    LAN,
    LEAVER_LEFT_ALONE,
    LEFT_OUT_WHILE_AWAY,
    ONE_DONOR_DIES,
    PROPOSAL_MISSED,
    PROPOSALS_APART,
    ROUND_FORGOTTEN,
    SLOW_DISK,
    SLUGGISH,
    UNHEARD_ROUND,
    WHO_COMMITS_FIRST_DIES,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sabotage:
    """`seeds` from `seed` on must catch it; the same schedules are well without the sabotage."""

    replica: type[Replica] = Replica
    lighthouse: type[LighthouseMachine] = LighthouseMachine
    leader: type[Leader] = Leader
    follower: type[Follower] = Follower
    process: type[Process] = Process
    transfer: type[Transfer] = Transfer
    rank_types: tuple[type[LeaderParty], type[FollowerParty]] = (LeaderParty, FollowerParty)
    lends: bool = False  # most seeds are older than that; what changed them since is another matter
    is_sharded: bool = False  # likewise
    ranks: int = 1
    steps: int = 10
    seed: int = 0
    seeds: int = 40
    expect: str = ""
    groups: int = 0
    climate: Climate | None = None
    faults: Faults | None = None
    triggers: tuple[Trigger, ...] = ()

    def worlds(self, **types: Any) -> Any:
        for seed in range(self.seed, self.seed + self.seeds):
            yield World(
                seed,
                groups=self.groups or 2 + seed % 4,
                steps=self.steps,
                ranks=self.ranks,
                climate=self.climate,
                faults=self.faults,
                triggers=self.triggers,
                lends=self.lends,
                is_sharded=self.is_sharded,
                **types,
            )


NOTHING = Faults()
BUSY = Faults(kill=2, join=2, link=2, veto=2, error=2, drain=1)
BROKEN_PATHS = Faults(broken_path=1)
_LOAN: dict[str, Any] = {
    "lends": True,
    "groups": 3,
    "climate": SLOW_TRANSFERS,
    "faults": NOTHING,
    "triggers": ONE_DONOR_DIES,
    "seeds": 10,
}
_LOAN_OF_RANKS: dict[str, Any] = _LOAN | {"ranks": 2, "steps": 6, "seeds": 3}
_LETS_GO: dict[str, Any] = _LOAN_OF_RANKS | {"climate": SLUGGISH, "triggers": DIES_AS_IT_LETS_GO}
CASES = {
    "a step is committed on one's own vote": Sabotage(replica=sabotage.CommitsOnItsOwnVote, expect="I2"),
    "a proposal is adopted on MIN alone": Sabotage(
        replica=sabotage.AdoptsOnMinAlone,
        expect="never had",
        groups=2,
        climate=LAN,
        faults=NOTHING,
        triggers=PROPOSALS_APART,
    ),
    "a proposal is adopted on MAX alone": Sabotage(replica=sabotage.AdoptsOnMaxAlone, expect="never had"),
    "results after a freeze count": Sabotage(replica=sabotage.TakesLateResults, faults=BUSY, climate=LAN, seeds=400),
    "a vote may change, and COMMIT is voted on again": Sabotage(
        replica=sabotage.ChangesItsVote,
        lighthouse=sabotage.VotesAgainInsteadOfCommitting,
        expect="I1",
        groups=3,
        climate=LAN,
        faults=Faults(veto=40, at_points=1),
        triggers=WHO_COMMITS_FIRST_DIES,
    ),
    "a Notice does not freeze": Sabotage(replica=sabotage.DoesNotFreeze),
    "a Hello hides that its member is frozen": Sabotage(
        replica=sabotage.HidesThatItIsUnsettled,
        expect="STUCK",
        groups=3,
        climate=HASTY,
        faults=Faults(stall_up=2),
        triggers=ROUND_FORGOTTEN,
        seeds=100,
    ),
    "nobody says Adopted": Sabotage(replica=sabotage.AdoptsInSilence, expect="STUCK"),
    "the entry names the quorum of the commit": Sabotage(
        replica=sabotage.ReducesByTheCommitQuorum, expect="I1", seeds=100
    ),
    "attempts are not told": Sabotage(
        replica=sabotage.ForgetsTheAttempt, faults=Faults(veto=20, error=3), climate=LAN, seeds=300
    ),
    "a severed group is entered again": Sabotage(replica=sabotage.EntersASeveredGroupAgain, expect="others", seeds=100),
    "a vote is dropped at the freeze": Sabotage(replica=sabotage.DropsTheGradientWhenFrozen, seeds=100),
    "there is no journal": Sabotage(lighthouse=sabotage.KeepsNoJournal, expect="I5"),
    "the journal is written after the Grant": Sabotage(
        lighthouse=sabotage.JournalsAfterwards,
        expect="commit late",
        groups=3,
        climate=SLOW_DISK,
        faults=NOTHING,
        triggers=GRANT_NOT_ON_DISK,
    ),
    "what may be committed is reduced again": Sabotage(
        lighthouse=sabotage.ReducesAgainInsteadOfCommitting,
        expect="I1",
        groups=3,
        climate=LAN,
        faults=NOTHING,
        triggers=WHO_COMMITS_FIRST_DIES,
    ),
    "what may be committed is aborted": Sabotage(
        lighthouse=sabotage.AbortsInsteadOfCommitting,
        expect="lost the computed step",
        groups=3,
        climate=LAN,
        faults=NOTHING,
        triggers=WHO_COMMITS_FIRST_DIES,
    ),
    "what is not reduced everywhere is committed": Sabotage(
        lighthouse=sabotage.CommitsInsteadOfReducing, expect="nothing to commit"
    ),
    "an evicted member returns as a survivor": Sabotage(
        lighthouse=sabotage.TakesEvictedBackAsSurvivors,
        expect="late",
        groups=3,
        climate=LAN,
        faults=NOTHING,
        triggers=LEFT_OUT_WHILE_AWAY,
    ),
    "a leaver is granted alone": Sabotage(
        lighthouse=sabotage.GrantsToLeaversAlone,
        expect="I1",
        groups=3,
        climate=LAN,
        faults=NOTHING,
        triggers=LEAVER_LEFT_ALONE,
    ),
    "a proposal is sent only once": Sabotage(
        lighthouse=sabotage.SendsAProposalOnlyOnce,
        expect="STUCK",
        groups=3,
        climate=LAN,
        faults=NOTHING,
        triggers=PROPOSAL_MISSED,
    ),
    "a lost founding is only switched to": Sabotage(
        lighthouse=sabotage.SwitchesFoundersAgain,
        expect="without a member that holds the state",
        groups=5,
        climate=LAN,
        faults=NOTHING,
        triggers=FOUNDING_NOT_SENT,
    ),
    "nobody makes way for a broken path": Sabotage(
        lighthouse=sabotage.ToleratesBrokenPaths, expect="rounds for broken paths", climate=LAN, faults=BROKEN_PATHS
    ),
    "who makes way for a broken path comes back at once": Sabotage(
        lighthouse=sabotage.FlapsOverBrokenPaths, expect="rounds for broken paths", climate=LAN, faults=BROKEN_PATHS
    ),
    "Failed opens no round": Sabotage(lighthouse=sabotage.NeverOpensARoundForFailed, expect="STUCK"),
    "a leader votes for its followers": Sabotage(
        leader=sabotaged_ranks.VotesForItsFollowers, seed=5, seeds=10, ranks=2, steps=6, groups=4
    ),
    "a leader's reductions are its group's": Sabotage(leader=sabotaged_ranks.ReducesForItsFollowers, ranks=2, steps=6),
    "a leader's state is its group's": Sabotage(
        leader=sabotaged_ranks.RecoversForItsFollowers, expect="weights", seeds=10, ranks=2, steps=6
    ),
    "a follower applies what the group may not get": Sabotage(
        follower=sabotaged_ranks.AppliesAtOnce,
        expect="other weights",
        ranks=3,
        steps=6,
        groups=2,
        climate=LAN,
        faults=NOTHING,
        triggers=DIES_WHILE_RANKS_RECOVER,
        seeds=10,
    ),
    "before_step runs while some ranks settle": Sabotage(
        leader=sabotaged_ranks.PreparesUnsettled,
        expect="STUCK",
        ranks=2,
        steps=9,
        groups=3,
        climate=LAN,
        faults=NOTHING,
        triggers=FAILS_AS_RANKS_DECIDE,
        seeds=4,
    ),
    "a follower forgets what it added": Sabotage(
        follower=sabotaged_ranks.GoesByTheLeadersAverage,
        expect="STUCK",
        ranks=2,
        steps=9,
        groups=3,
        climate=LAN,
        faults=NOTHING,
        triggers=FAILS_AS_RANKS_REDUCE,
        seed=35,
        seeds=10,
    ),
    "a notice severs no follower": Sabotage(
        follower=sabotaged_ranks.KeepsItsCollectives, expect="STUCK", seeds=10, ranks=2, steps=6
    ),
    "a follower's average is lost with the quorum": Sabotage(
        follower=sabotaged_ranks.ForgetsItsAverage, expect="STUCK", seeds=4, ranks=2, steps=6
    ),
    "donors do not keep still": Sabotage(process=sabotaged_loans.DoesNotKeepStill, expect="R2", **_LOAN),
    "a donor revokes its loan after it went on": Sabotage(
        process=sabotaged_loans.RevokesAfterwards, expect="R2", **_LOAN
    ),
    "a notice does not end the meeting": Sabotage(
        process=sabotaged_loans.MeetsWithoutEnd, expect="STUCK", **(_LOAN | {"groups": 4})
    ),
    "a joiner believes what it read before the look at the loan": Sabotage(
        transfer=sabotaged_loans.BelievesWithoutALook, expect="R3", **(_LOAN | {"triggers": UNHEARD_ROUND, "seeds": 40})
    ),
    "a history is founded on weights that are half overwritten": Sabotage(
        process=sabotaged_loans.FoundsWhileTorn, expect="R4", **(_LOAN | {"triggers": ALL_DONORS_DIE})
    ),
    "a joiner's rank lets go of the donors before the others have their parts": Sabotage(
        rank_types=(sabotaged_loans.LeaderLetsGoAtOnce, sabotaged_loans.FollowerLetsGoAtOnce),
        expect="R5",
        **_LOAN_OF_RANKS,
    ),
    "a donor's ranks do not keep still": Sabotage(
        rank_types=(sabotaged_loans.LeaderDoesNotKeepStill, sabotaged_loans.FollowerDoesNotKeepStill),
        expect="R2",
        is_sharded=True,
        **_LOAN_OF_RANKS,
    ),
    "a donor's ranks revoke their loans after they went on": Sabotage(
        rank_types=(sabotaged_loans.LeaderRevokesAfterwards, sabotaged_loans.FollowerRevokesAfterwards),
        expect="R2",
        is_sharded=True,
        **_LOAN_OF_RANKS,
    ),
    "a joiner's rank believes what it read before the look at the loan": Sabotage(
        transfer=sabotaged_loans.BelievesWithoutALook,
        expect="R3",
        seed=6,
        **(_LOAN_OF_RANKS | {"triggers": UNHEARD_ROUND}),
    ),
    "a rank begins its leader's step in the quorum of later on": Sabotage(
        follower=sabotaged_ranks.BeginsInItsOwnQuorum, expect="another rank of its group", **_LETS_GO
    ),
    "a rank settles in the next quorum before it begins its leader's step": Sabotage(
        follower=sabotaged_ranks.BeginsOnceSettled, expect="STUCK", seed=17, is_sharded=True, **_LETS_GO
    ),
    "a follower ballots once a step": Sabotage(
        follower=sabotaged_ranks.BallotsOnce, expect="STUCK", seed=56, seeds=1, ranks=2, steps=6
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_dropped_rule_is_caught(name: str) -> None:
    case = CASES[name]
    types: dict[str, Any] = {"leader_type": case.leader, "follower_type": case.follower}
    types |= {"process_type": case.process, "transfer_type": case.transfer, "rank_types": case.rank_types}
    for world in case.worlds(replica_type=case.replica, lighthouse_type=case.lighthouse, **types):
        outcome = world.run()
        if not outcome.is_ok:
            assert case.expect in outcome.verdict
            sound = dataclasses.replace(case, seed=outcome.seed, seeds=1)
            assert next(sound.worlds()).run().is_ok, "the schedule is well with the rule in place"
            return
    pytest.fail(f"none of {case.seeds} seeds catches it")
