"""The real machines in the virtual world: seeds, budgets and schedules end well, and a seed is a bug report."""

from pathlib import Path

import pytest

from everstep.sim.__main__ import main
from everstep.sim.budgets import CLIMATES, SLOW_TRANSFERS, Climate, Faults, Trigger
from everstep.sim.world import World
from tests.sim.sabotage import CommitsOnItsOwnVote
from tests.sim.schedules import HASTY, HEAVY, LAN, LOANS, MODEL_BUDGETS, MOVING_STATE, SCRIPTED
from tests.support.processes import Spawner

SEEDS_FILE = Path(__file__).with_name("seeds.txt")


def _regression_seeds() -> list[tuple[int, int, int, str]]:
    rows = []
    for line in SEEDS_FILE.read_text().splitlines():
        if line and not line.startswith("#"):
            seed, groups, steps, what = line.split(maxsplit=3)
            rows.append((int(seed), int(groups), int(steps), what))
    return rows


@pytest.mark.parametrize(("seed", "groups", "steps", "what"), _regression_seeds(), ids=lambda value: str(value)[:40])
def test_a_seed_that_once_failed_ends_well(seed: int, groups: int, steps: int, what: str) -> None:
    """Those that were found before live state was lent run without loans: so they are still the same schedules."""
    outcome = World(seed, groups=groups, steps=steps, lends=what.startswith("lent: ")).run()
    assert outcome.is_ok, f"{outcome} ({what})"


@pytest.mark.parametrize("first", range(0, 240, 40))
def test_mixed_faults_end_well(first: int) -> None:
    for seed in range(first, first + 40):
        outcome = World(seed, groups=2 + seed % 6, steps=8 + seed % 9).run()
        assert outcome.is_ok, str(outcome)


@pytest.mark.parametrize("name", MODEL_BUDGETS)
def test_a_budget_of_the_model_ends_well(name: str) -> None:
    groups, faults = MODEL_BUDGETS[name]
    for seed in range(6):
        for climate in (LAN, HASTY):
            outcome = World(seed, groups=groups, steps=6, faults=faults, climate=climate).run()
            assert outcome.is_ok, str(outcome)


@pytest.mark.parametrize("name", SCRIPTED)
def test_a_schedule_that_broke_a_draft_ends_well(name: str) -> None:
    groups, triggers = SCRIPTED[name]
    for seed in range(8):
        outcome = World(seed, groups=groups, steps=6, faults=Faults(), triggers=triggers, climate=LAN).run()
        assert outcome.verdict == "ok", str(outcome)
        assert outcome.faults, "the schedule never reached its points"


@pytest.mark.parametrize("name", LOANS)
def test_a_fault_while_live_state_is_lent_ends_well(name: str) -> None:
    groups, triggers = LOANS[name]
    for seed in range(3):
        world = World(
            seed, groups=groups, steps=6, faults=Faults(), triggers=triggers, climate=SLOW_TRANSFERS, lends=True
        )
        outcome = world.run()
        assert outcome.is_ok, str(outcome)
        assert world.faults.is_spent, f"{outcome}: the schedule never reached its points"


def test_faults_while_state_moves_most_of_the_time_end_well() -> None:
    for seed in range(16):
        outcome = World(
            seed, groups=2 + seed % 4, steps=8, faults=MOVING_STATE, climate=SLOW_TRANSFERS, lends=True
        ).run()
        assert outcome.is_ok, str(outcome)


@pytest.mark.parametrize("climate", [LAN, HEAVY], ids=lambda climate: str(climate.name))
def test_without_faults_there_is_no_round_and_nobody_is_evicted(climate: Climate) -> None:
    """Long compute and slow transfers are no failures: heartbeats go on."""
    for seed in range(5):
        world = World(seed, groups=4, steps=6, faults=Faults(), climate=climate)
        outcome = world.run()
        assert outcome.verdict == "ok", str(outcome)
        events = [log.event for log in world.lighthouse.logs]
        assert "round opened" not in events
        assert "evicted" not in events


def test_a_lighthouse_that_was_stopped_accuses_nobody() -> None:
    for seed in range(10):
        stop = Trigger(point="VoteEnded", fault="lighthouse_stop", nth=9, seconds=5.0)
        world = World(seed, groups=4, steps=6, faults=Faults(), triggers=(stop,), climate=LAN)
        assert world.run().verdict == "ok"
        assert "round opened" not in [log.event for log in world.lighthouse.logs]


def test_a_switch_that_fails_for_a_moment_costs_nobody_his_place() -> None:
    for seed in range(10):
        switch = Trigger(point="VoteEnded", fault="switch", nth=9, seconds=2.5)
        world = World(seed, groups=4, steps=6, faults=Faults(), triggers=(switch,), climate=LAN)
        assert world.run().verdict == "ok"
        assert "evicted" not in [log.event for log in world.lighthouse.logs]
        assert {process.replica.evictions for process in world.living()} == {0}


def test_a_group_in_a_crash_loop_is_left_out_in_the_end_and_the_others_go_on() -> None:
    for seed in range(5):
        loop = Trigger(point="VoteEnded", fault="crash_loop", by="g1", nth=3, seconds=0.2)
        world = World(seed, groups=4, steps=40, faults=Faults(), triggers=(loop,), climate=LAN)
        assert world.run().verdict == "ok"
        said = [log.event for log in world.lighthouse.logs]
        assert "group held" in said


def test_a_broken_path_costs_a_few_rounds_and_the_others_go_on() -> None:
    for seed in range(20):
        broken = Faults(broken_path=1 + seed % 3, kill=seed % 2, link=seed % 3 == 0, join=seed % 5 == 0)
        world = World(seed, groups=2 + seed % 5, steps=8, faults=broken)
        outcome = world.run()
        assert outcome.verdict == "ok", str(outcome)
        assert any("broken_path" in fault for fault in outcome.faults)


def test_joiners_that_take_long_hold_nobody_up_for_ever() -> None:
    for seed in range(5):
        outcome = World(seed, groups=2, steps=6, faults=Faults(join=2), climate=HEAVY).run()
        assert outcome.verdict == "ok", str(outcome)


def test_every_climate_is_drawn() -> None:
    drawn = {World(seed, groups=2, steps=1).climate.name for seed in range(60)}
    assert drawn == {climate.name for climate in (*CLIMATES, SLOW_TRANSFERS)}


def test_the_same_seed_gives_the_same_schedule_whatever_the_hash_seed(spawn: Spawner) -> None:
    script = (
        "import hashlib\nfrom everstep.sim.world import World\n"
        "for seed in (7, 19, 31):\n"
        "    world, lines = World(seed, groups=4, steps=10), []\n"
        "    world.trace = lines.append\n"
        "    print(world.run(), hashlib.sha256('\\n'.join(lines).encode()).hexdigest(), flush=True)\n"
    )
    children = [spawn(["-c", script], env={"PYTHONHASHSEED": hash_seed}) for hash_seed in ("1", "2")]
    outputs = [[child.read_line() for _ in range(3)] for child in children]
    assert [child.wait() for child in children] == [0, 0]
    assert outputs[0] == outputs[1]


def test_the_command_prints_one_line_for_a_seed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seed", "7", "--groups", "3", "--steps", "8"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("seed 7: ok; ")


def test_a_failing_seed_prints_the_command_that_reproduces_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seed", "8", "--groups", "2", "--steps", "8"], replica_type=CommitsOnItsOwnVote) == 1
    what, how = capsys.readouterr().out.splitlines()
    assert "VIOLATION" in what
    assert how == "reproduce: python -m everstep.sim --seed 8 --groups 2 --steps 8 --trace"
