"""Schedules in which the lighthouse dies in the middle of what it does, is stopped, or forgets."""

import dataclasses

import pytest

from everstep.sim.budgets import LIGHTHOUSE_POINTS, SENDING_POINTS, Faults, Trigger
from everstep.sim.world import World
from tests.sim.schedules import HASTY, LAN, at

PLENTY = Faults(kill=3, join=1, drain=1, link=1, error=3)
DEATHS = [(point, "lighthouse") for point in LIGHTHOUSE_POINTS]
DEATHS += [(point, "lighthouse_sending") for point in dict.fromkeys(SENDING_POINTS)]


@pytest.mark.parametrize(("point", "fault"), DEATHS, ids=[point for point, _ in DEATHS])
def test_the_lighthouse_may_die_at_any_point_of_a_round_and_again_at_its_next(point: str, fault: str) -> None:
    struck = 0
    for nth in range(1, 7):
        deaths = tuple(at(point, fault, nth=n, seconds=0.05) for n in (nth, nth + 3))
        climate = (LAN, HASTY)[nth % 2]
        outcome = World(nth, groups=3, steps=8, faults=PLENTY, triggers=deaths, climate=climate).run()
        assert outcome.is_ok, str(outcome)
        struck += fault in outcome.faults
    assert struck >= 2, "the schedules hardly ever reached their point"


def test_a_lighthouse_that_is_stopped_for_ten_seconds_evicts_nobody() -> None:
    for seed in range(10):
        stop = Trigger(point="VoteEnded", fault="lighthouse_stop", nth=9, seconds=10.0)
        world = World(seed, groups=4, steps=6, faults=Faults(), triggers=(stop,), climate=LAN)
        assert world.run().verdict == "ok"
        events = [log.event for log in world.lighthouse.logs]
        assert not {"round opened", "member suspected", "evicted"} & set(events)


def test_a_lighthouse_that_lost_its_journal_founds_nothing_beside_those_that_train() -> None:
    for seed in range(8):
        world = World(seed, groups=3, steps=6, faults=Faults(), climate=LAN)
        outcome = world.run()
        assert outcome.verdict == "ok", str(outcome)
        node = world.lighthouse
        node.crash()
        node.disk, node.config = None, dataclasses.replace(node.config, lighthouse="another", history="another")
        node.logs.clear()
        node.start()
        newest = max(process.replica.step for process in world.living())
        world.start_process("g9")
        world._run_until(lambda: False, world.now + 8.0)
        assert "stranger refused" in [log.event for log in node.logs]
        assert "founded" not in [log.event for log in node.logs]
        assert world.processes["g9"].replica.lineage is None
        assert "no second history begins" in world.processes["g9"].replica.waiting_for
        assert min(world.processes[f"g{i}"].replica.step for i in range(3)) > newest + 10


def test_a_drain_that_the_operator_asked_for_outlives_the_lighthouse() -> None:
    asked = at("VoteEnded", "drain_group", "g1", nth=7)
    died = at("lighthouse:Persisted", "lighthouse", nth=4, seconds=0.01)  # of who is leaving
    for seed in range(8):
        world = World(seed, groups=3, steps=6, faults=Faults(), triggers=(asked, died), climate=LAN)
        outcome = world.run()
        assert outcome.verdict == "ok", str(outcome)
        assert "lighthouse" in outcome.faults
        assert world.processes["g1"].replica.has_left, "it was proposed back in"


def test_a_group_whose_link_is_down_is_not_left_out_of_a_job_that_all_others_leave() -> None:
    away = at("VoteEnded", "link", by="g1", nth=4, seconds=1.0)
    left = at("VoteEnded", "leave", by="g0", nth=4)
    for seed in range(8):
        world = World(seed, groups=2, steps=6, faults=Faults(), triggers=(away, left), climate=LAN)
        outcome = world.run()
        assert outcome.verdict in ("ok", "short"), str(outcome)
        assert "job ended" not in [log.event for log in world.lighthouse.logs]
        assert world.processes["g1"].replica.lineage is not None
