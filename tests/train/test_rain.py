"""Faults rain on a job of real processes: a checker apart judges its record, a run without faults replays it."""

import os
from pathlib import Path

import pytest

from tests.support.processes import Spawner
from tests.train.rain import rain
from tests.train.replay import replay

SEED = int(os.environ.get("RAIN_SEED", "0"))
CHECK_DEADLINE_S = 120.0


def assert_well(folder: Path, spawn: Spawner) -> None:
    """A run without faults comes to the same bits, and the checker finds nothing."""
    replay(folder)
    checker = spawn(["-m", "tests.checkers", str(folder)])
    assert checker.wait(CHECK_DEADLINE_S) == 0, checker.output()


def test_eight_faults_of_all_kinds(tmp_path: Path, spawn: Spawner) -> None:
    rain(tmp_path, seed=SEED, faults=8, seconds=8.0)
    assert_well(tmp_path, spawn)


@pytest.mark.soak
def test_two_hundred_faults_in_five_minutes(tmp_path: Path, spawn: Spawner) -> None:
    """RAIN_SEED=n makes it another rain."""
    rain(tmp_path, seed=SEED, faults=200, seconds=300.0)
    assert_well(tmp_path, spawn)
