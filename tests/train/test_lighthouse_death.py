"""The lighthouse dies, is stopped, or loses its memory, while real groups train."""

import signal
import time
from pathlib import Path

import pytest

from tests.support.processes import Spawner
from tests.train.doomed import POINTS
from tests.train.history import violations
from tests.train.job import Running, assert_nothing_lost, assert_same_bits
from tests.train.outage import OutageJob

QUICK_POINTS = ("record on disk", "one grant sent")


def notices(members: list[Running]) -> list[str]:
    return [line for member in members for line in member.logs if line.startswith(("notice", "granted", "evicted"))]


def test_training_goes_on_without_a_lighthouse_and_when_it_is_back_nobody_is_disturbed(
    spawn: Spawner, tmp_path: Path
) -> None:
    with OutageJob(spawn, 3, tmp_path / "state") as job:
        job.start_all()
        veterans = list(job.running.values())
        job.until_steps(veterans, 5)
        before = job.status()
        job.kill_lighthouse()
        at = max(member.step for member in veterans)
        job.until_steps(veterans, at + 50)
        job.start_lighthouse()
        job.until(lambda: job.status().get("links") == 3, "all are back")
        after = job.status()
        assert (before["epoch"], after["epoch"]) == (1, 2)
        assert before["quorum"] == after["quorum"] == "1.1"
        assert after["history"] == before["history"]
        at = max(member.step for member in veterans)
        job.until_steps(veterans, at + 20)
        assert not notices(veterans)
        assert job.status()["failures"] == 0
        joiner = job.start(3)
        job.until(lambda: all(m.participants == 4 for m in [*veterans, joiner]), "a fourth group joins")
        assert not notices(veterans)
        job.kill_group(1)
        survivors = job.living()
        job.until(lambda: all(m.participants == 3 for m in survivors), "they go on without the one that was killed")
        assert job.status()["quorum"].startswith("2.")
        job.stop()
        assert_nothing_lost([job.running[0], job.running[2]])
        assert not violations(job.all, job.events())


def test_a_failure_during_the_outage_is_resolved_when_the_lighthouse_is_back(spawn: Spawner, tmp_path: Path) -> None:
    with OutageJob(spawn, 3, tmp_path / "state") as job:
        job.start_all()
        job.until_steps(list(job.running.values()), 5)
        job.kill_lighthouse()
        job.kill_group(1)
        survivors = job.living()
        failed = "collective failed"
        job.until(lambda: all(any(failed in line for line in m.logs) for m in survivors), "the others notice")
        back_at = time.monotonic()
        job.start_lighthouse()
        job.until(lambda: all(m.participants == 2 for m in survivors), "the others go on")
        took_s = time.monotonic() - back_at
        assert took_s < 20.0, "return_timeout_s and one retry of each link"
        job.start(1)
        job.until(lambda: all(m.participants == 3 for m in job.living()), "it comes back")
        job.stop()
        assert_nothing_lost(survivors)
        assert not violations(job.all, job.events())


@pytest.mark.parametrize(
    "point", [point if point in QUICK_POINTS else pytest.param(point, marks=pytest.mark.soak) for point in POINTS]
)
def test_killed_at_any_point_of_a_round_the_lighthouse_loses_nothing(
    spawn: Spawner, tmp_path: Path, point: str
) -> None:
    with OutageJob(spawn, 3, tmp_path / "state") as job:
        job.start_all()
        job.until_steps(job.living(), 5)
        lighthouse = job.doom(point)
        job.kill_group(1)
        assert lighthouse.wait() == -signal.SIGKILL
        survivors = job.living()
        job.start_lighthouse()
        job.until(lambda: all(m.participants == 2 for m in survivors), "the survivors go on")
        job.start(1)
        job.until(lambda: all(m.participants == 3 for m in job.living()), "the one that was killed comes back")
        job.stop()
        assert_nothing_lost(survivors)
        assert not violations(job.all, job.events())


@pytest.mark.parametrize("point", ["one proposal sent", pytest.param("one switch sent", marks=pytest.mark.soak)])
def test_killed_while_a_group_joins_the_lighthouse_loses_nothing(spawn: Spawner, tmp_path: Path, point: str) -> None:
    with OutageJob(spawn, 2, tmp_path / "state") as job:
        job.start_all()
        veterans = job.living()
        job.until_steps(veterans, 5)
        lighthouse = job.doom(point)
        job.start(2)
        job.until(lambda: not lighthouse.is_alive(), "the lighthouse dies")
        job.start_lighthouse()
        job.until(lambda: all(m.participants == 3 for m in job.living()), "all three train")
        job.stop()
        assert_nothing_lost(veterans)
        assert not violations(job.all, job.events())


@pytest.mark.parametrize(
    ("stopped_s", "timeout_s"), [(2.0, 0.5), pytest.param(10.0, 2.0, marks=pytest.mark.soak)], ids=["2 s", "10 s"]
)
def test_a_lighthouse_that_is_stopped_and_continued_evicts_nobody(
    spawn: Spawner, tmp_path: Path, stopped_s: float, timeout_s: float
) -> None:
    with OutageJob(spawn, 3, tmp_path / "state", heartbeat_timeout_s=timeout_s) as job:
        job.start_all()
        everyone = list(job.running.values())
        job.until_steps(everyone, 5)
        assert job.lighthouse is not None
        job.lighthouse.kill(signal.SIGSTOP)
        until = time.monotonic() + stopped_s
        try:
            job.until(lambda: time.monotonic() > until, "time passes")
        finally:
            job.lighthouse.kill(signal.SIGCONT)
        until = time.monotonic() + timeout_s + 0.5
        job.until(lambda: time.monotonic() > until, "it could have accused somebody")
        assert job.status()["failures"] == 0
        assert not notices(everyone)
        job.stop()
        assert_nothing_lost(everyone)
        assert_same_bits(everyone)
