"""Schedules in which the lighthouse dies in the middle of what it does, is stopped, or forgets."""

from everstep.sim.faults import Faults
from everstep.sim.world import World
from tests.sim.schedules import LAN, at


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
