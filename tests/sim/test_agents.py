"""Agents in the virtual world: they report deaths, vouch, fence, and fail; the checkers are those of every schedule."""

from pathlib import Path

import pytest

from everstep.core.messages import Cause
from everstep.sim.budgets import Faults, Trigger
from everstep.sim.world import World
from tests.sim.schedules import HASTY, LAN

SEEDS_FILE = Path(__file__).with_name("seeds_agents.txt")


def _regression_seeds() -> list[tuple[int, int, int, int, str]]:
    rows = []
    for line in SEEDS_FILE.read_text().splitlines():
        if line and not line.startswith("#"):
            seed, groups, ranks, steps, what = line.split(maxsplit=4)
            rows.append((int(seed), int(groups), int(ranks), int(steps), what))
    return rows


@pytest.mark.parametrize(("seed", "groups", "ranks", "steps", "what"), _regression_seeds(), ids=lambda v: str(v)[:40])
def test_a_seed_of_agents_that_once_failed_ends_well(seed: int, groups: int, ranks: int, steps: int, what: str) -> None:
    """Those that were found before live state was lent run without loans: so they are still the same schedules."""
    outcome = World(seed, groups=groups, steps=steps, ranks=ranks, agents=True, lends=what.startswith("lent: ")).run()
    assert outcome.is_ok, f"{outcome} ({what})"


@pytest.mark.parametrize("ranks", [1, 2])
def test_mixed_faults_of_members_and_agents_end_well(ranks: int) -> None:
    for seed in range(40 // ranks**3):
        outcome = World(seed, groups=2 + seed % 4, steps=8, ranks=ranks, agents=True).run()
        assert outcome.is_ok, str(outcome)


def test_a_held_gil_opens_no_round_while_an_agent_vouches() -> None:
    for seed in range(10):
        hold = Trigger(point="VoteEnded", fault="hold", nth=9, seconds=0.9)  # ten times as long as may be silent
        world = World(seed, groups=3, steps=6, faults=Faults(), triggers=(hold,), climate=HASTY, agents=True)
        outcome = world.run()
        assert outcome.verdict == "ok", str(outcome)
        assert outcome.faults, "nobody was held"
        assert not world.lighthouse.rounds_opened()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_stopped_process_is_found_no_later_than_by_silence_alone(ranks: int) -> None:
    for seed in range(10):
        stop = Trigger(point="VoteEnded", fault="stop", nth=9, seconds=20.0)
        world = World(seed, groups=3, steps=6, faults=Faults(), triggers=(stop,), climate=LAN, agents=True, ranks=ranks)
        assert world.run().verdict == "ok"
        causes = [log.fields["cause"] for log in world.lighthouse.logs if log.event == "member suspected"]
        assert causes[0] == Cause.SILENT.value
        if world.freezes_on_notice:  # else the others may wait for it until their collective fails
            assert any(done.startswith("kill by fence") for done in world.faults.done)


@pytest.mark.parametrize("fault", ["kill", "kill_unnoticed"])
def test_a_reported_death_costs_one_round_whichever_is_known_first_the_report_or_the_link(fault: str) -> None:
    found = set()
    for seed in range(20):
        kill = Trigger(point="VoteEnded", fault=fault, nth=9, seconds=1.0)
        # Without loans none of these schedules has a report of its failure, repeated every 2 s, cross the Grant.
        conditions = {"faults": Faults(), "triggers": (kill,), "climate": LAN, "lends": False}
        world = World(seed, groups=3, steps=6, agents=True, **conditions)  # type: ignore[arg-type]
        assert world.run().verdict == "ok"
        assert len(world.lighthouse.rounds_opened()) == 1
        found |= {log.fields["cause"] for log in world.lighthouse.rounds_opened()}
    assert Cause.PROCESS_EXITED.value in found
    assert found <= {Cause.PROCESS_EXITED.value, Cause.LINK_CLOSED.value, Cause.COLLECTIVE_FAILED.value}
