"""Groups of several ranks in the virtual world: they end every batch alike, and live and die as one."""

import dataclasses
from pathlib import Path

import pytest

from everstep.sim.budgets import LOAN_POINTS, SLOW_TRANSFERS, Faults, Trigger
from everstep.sim.teams import GROUP_ENDS_S
from everstep.sim.world import World
from tests.sim.schedules import DIES_AS_IT_LETS_GO, HASTY, LAN, LOANS, SLUGGISH

SEEDS_FILE = Path(__file__).with_name("seeds_ranks.txt")


def _regression_seeds() -> list[tuple[int, int, int, int, str]]:
    rows = []
    for line in SEEDS_FILE.read_text().splitlines():
        if line and not line.startswith("#"):
            seed, groups, ranks, steps, what = line.split(maxsplit=4)
            rows.append((int(seed), int(groups), int(ranks), int(steps), what))
    return rows


@pytest.mark.parametrize(("seed", "groups", "ranks", "steps", "what"), _regression_seeds(), ids=lambda v: str(v)[:40])
def test_a_seed_of_ranks_that_once_failed_ends_well(seed: int, groups: int, ranks: int, steps: int, what: str) -> None:
    """Those that were found before live state was lent run without loans: so they are still the same schedules."""
    lends, is_sharded = what.startswith("lent"), what.startswith("lent, sharded: ")
    outcome = World(seed, groups=groups, steps=steps, ranks=ranks, lends=lends, is_sharded=is_sharded).run()
    assert outcome.is_ok, f"{outcome} ({what})"


@pytest.mark.parametrize("name", LOANS)
def test_a_fault_while_ranks_lend_live_state_ends_well(name: str) -> None:
    """Of the leader, or of its first follower, which has a meeting of its own."""
    groups, triggers = LOANS[name]
    for struck in (triggers, tuple(of_follower(trigger) for trigger in triggers)):
        conditions = {"faults": Faults(), "triggers": struck, "climate": SLOW_TRANSFERS, "lends": True}
        outcome = World(1, groups=groups, steps=4, ranks=2, **conditions).run()  # type: ignore[arg-type]
        assert outcome.is_ok, str(outcome)


def of_follower(trigger: Trigger) -> Trigger:
    if trigger.point not in LOAN_POINTS or not trigger.victim.startswith("g"):
        return trigger
    return dataclasses.replace(trigger, victim=f"follower of {trigger.victim}", fault=f"rank_{trigger.fault}")


@pytest.mark.parametrize("is_sharded", [False, True])
def test_a_joiner_that_dies_as_it_lets_go_of_its_donors_costs_no_step(*, is_sharded: bool) -> None:
    """Some of the donors' ranks are in the step by then, and others on their way to the next quorum."""
    for seed in range(4):
        conditions = {"faults": Faults(), "triggers": DIES_AS_IT_LETS_GO, "climate": SLUGGISH, "lends": True}
        world = World(seed, groups=3, steps=6, ranks=2, is_sharded=is_sharded, **conditions)  # type: ignore[arg-type]
        assert world.run().is_ok
        assert world.faults.is_spent, "the schedule never reached its points"


@pytest.mark.parametrize("ranks", [2, 3])
def test_mixed_faults_of_groups_and_ranks_end_well(ranks: int) -> None:
    for seed in range(5):
        outcome = World(seed, groups=2 + seed % 3, steps=6, ranks=ranks).run()
        assert outcome.is_ok, str(outcome)


@pytest.mark.parametrize("ranks", [2, 3])
def test_without_faults_ranks_open_no_round(ranks: int) -> None:
    for seed in range(3):
        world = World(seed, groups=3, steps=6, faults=Faults(), climate=LAN, ranks=ranks)
        outcome = world.run()
        assert outcome.verdict == "ok", str(outcome)
        assert "round opened" not in [log.event for log in world.lighthouse.logs]


@pytest.mark.parametrize("point", ["Reduce", "RankReduced", "Prepare", "Ballot", "VoteEnded", "View"])
@pytest.mark.parametrize("victim", ["g1", "follower of g1"])
def test_a_dead_rank_costs_its_group_and_no_other(point: str, victim: str) -> None:
    """Whatever it was doing: the others of its group end within 2 s (a checker), no other group loses its place."""
    kind = "kill" if victim == "g1" else "rank_kill"
    struck = 0
    for seed in range(2):
        trigger = Trigger(point=point, fault=kind, by="g1", nth=12, victim=victim)
        world = World(seed, groups=3, steps=6, faults=Faults(), triggers=(trigger,), climate=LAN, ranks=2)
        outcome = world.run()
        assert outcome.verdict == "ok", str(outcome)
        struck += len(outcome.faults)
        checked_by = world.now + GROUP_ENDS_S + 0.1
        while world.clock.step(checked_by):
            pass
        for replica_id in ("g0", "g2"):
            leader = world.processes[replica_id]
            assert leader.is_alive
            assert leader.replica.evictions == 0
            assert world.teams.starts_of(replica_id) == 1
        assert world.teams.starts_of("g1") <= 1 + len(outcome.faults)
    assert struck > 0, "nobody reached the point"


def test_a_stopped_follower_gets_its_group_evicted_and_it_comes_back() -> None:
    for seed in range(3):
        trigger = Trigger(point="RankReduced", fault="rank_stop", by="g1", nth=8, victim="follower of g1", seconds=6.0)
        world = World(seed, groups=3, steps=6, faults=Faults(), triggers=(trigger,), climate=LAN, ranks=2)
        outcome = world.run()
        assert outcome.verdict == "ok", str(outcome)
        assert world.processes["g1"].replica.evictions == 1
        assert world.teams.starts_of("g1") == 1


def test_followers_are_heard_often_enough_for_short_heartbeat_timeouts() -> None:
    """80 ms: the leader vouches for its group only while it hears every rank within the interval of 20 ms."""
    for seed in range(2):
        conditions = {"climate": HASTY, "lends": False, "is_sharded": False}
        world = World(seed, groups=3, steps=20, faults=Faults(), ranks=2, **conditions)  # type: ignore[arg-type]
        outcome = world.run()
        assert outcome.verdict == "ok", str(outcome)
        assert "round opened" not in [log.event for log in world.lighthouse.logs]
