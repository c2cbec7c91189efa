"""The lighthouse dies, is stopped, or loses its memory, while real groups train."""

import resource
import signal
import time
from pathlib import Path

import pytest

from everstep.config import LighthouseSettings
from everstep.lighthouse.app import Lighthouse
from tests.support.processes import Spawner
from tests.support.relay import Relay
from tests.train.doomed import POINTS
from tests.train.job import Running, assert_nothing_lost, assert_same_bits
from tests.train.outage import OutageJob

QUICK_POINTS = ("one grant sent",)


def notices(members: list[Running]) -> list[str]:
    return [line for member in members for line in member.logs if line.startswith(("notice", "granted", "evicted"))]


def said(member: Running, words: str) -> bool:
    return any(words in line for line in member.logs)


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
        assert not job.violations()


@pytest.mark.soak
def test_a_failure_during_the_outage_is_resolved_when_the_lighthouse_is_back(spawn: Spawner, tmp_path: Path) -> None:
    with OutageJob(spawn, 3, tmp_path / "state") as job:
        job.start_all()
        job.until_steps(list(job.running.values()), 5)
        job.kill_lighthouse()
        job.kill_group(1)
        survivors = job.living()
        failed = "collective failed"
        job.until(lambda: all(said(m, failed) for m in survivors), "the others notice")
        back_at = time.monotonic()
        job.start_lighthouse()
        job.until(lambda: all(m.participants == 2 for m in survivors), "the others go on")
        took_s = time.monotonic() - back_at
        assert took_s < 20.0, "return_timeout_s and one retry of each link"
        job.start(1)
        job.until(lambda: all(m.participants == 3 for m in job.living()), "it comes back")
        job.stop()
        assert_nothing_lost(survivors)
        assert not job.violations()


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
        assert not job.violations()


@pytest.mark.soak
@pytest.mark.parametrize("point", ["one proposal sent", "one switch sent"])
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
        assert not job.violations()


@pytest.mark.parametrize(
    ("stopped_s", "timeout_s"), [(1.5, 0.5), pytest.param(10.0, 2.0, marks=pytest.mark.soak)], ids=["1.5 s", "10 s"]
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


@pytest.mark.soak
def test_a_journal_that_cannot_be_written_holds_the_round_back_until_it_can(spawn: Spawner, tmp_path: Path) -> None:
    with OutageJob(spawn, 3, tmp_path / "state") as job:
        job.start_all()
        job.until_steps(job.living(), 5)
        lighthouse = job.lighthouse
        assert lighthouse is not None
        # No file of that process may grow; its log is a pipe.
        _, hard = resource.prlimit(lighthouse.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        job.kill_group(1)
        survivors = job.living()
        line = lighthouse.expect_line("journal not written")
        assert "File too large" in line
        assert "remedy='make it writable; the job waits meanwhile'" in line
        job.until(lambda: all(said(m, "cannot write its journal") for m in survivors), "the members are told")
        assert not any(m.participants == 2 for m in survivors)
        assert not any(said(m, "granted") for m in survivors)
        resource.prlimit(lighthouse.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, hard))
        job.until(lambda: all(m.participants == 2 for m in survivors), "the round is decided")
        job.stop()
        assert_nothing_lost(survivors)
        assert not job.violations()


@pytest.mark.soak
def test_a_lighthouse_that_lost_its_journal_founds_nothing_and_training_goes_on(spawn: Spawner, tmp_path: Path) -> None:
    with OutageJob(spawn, 3, tmp_path / "state", join_timeout_s=1.0) as job:
        job.start_all()
        veterans = job.living()
        job.until_steps(veterans, 5)
        job.kill_lighthouse()
        job.start_lighthouse(tmp_path / "another")
        job.until(lambda: all(said(m, "refused code=stranger") for m in veterans), "it refuses them")
        assert all(said(m, "Start the lighthouse on the state directory it had") for m in veterans)
        joiner = job.start(3)
        job.until(lambda: said(joiner, "no second history begins"), "a fresh group waits and is told why")
        at = max(member.step for member in veterans)
        job.until_steps(veterans, at + 100)
        assert not notices(veterans)
        assert job.status()["history"] == ""
        job.kill_lighthouse()
        job.start_lighthouse()
        job.until(lambda: all(m.participants == 4 for m in job.living()), "with the journal all is well")
        job.stop()
        assert_nothing_lost(veterans)
        assert not job.violations()


@pytest.mark.soak
def test_after_a_lost_journal_the_operator_may_begin_a_new_history(spawn: Spawner, tmp_path: Path) -> None:
    with OutageJob(spawn, 2, tmp_path / "state") as job:
        job.start_all()
        veterans = job.living()
        job.until_steps(veterans, 5)
        old = job.status()["history"]
        job.kill_lighthouse()
        job.start_lighthouse(tmp_path / "another")
        job.until(lambda: all(said(m, "refused code=stranger") for m in veterans), "it refuses them")
        asking = spawn(["-m", "everstep.cli", "new-history", "--lighthouse", job.address])
        assert asking.wait() == 0
        job.until(lambda: all(m.has_ended for m in veterans), "whoever holds state ends")
        assert all("LighthouseRefused: the operator gave up the state" in m.error for m in veterans)
        job.start_all()
        job.until_steps(job.living(), 5)
        assert job.status()["history"] not in ("", old)
        job.stop()
        assert_same_bits(job.living())


@pytest.mark.soak
def test_members_that_are_pointed_at_another_lighthouse_are_refused_there_and_commit_nothing_apart(
    spawn: Spawner, tmp_path: Path
) -> None:
    """The address of half of the members moves to a lighthouse with another memory, and back."""
    with OutageJob(spawn, 4, tmp_path / "state") as job, Relay(job.address) as relay:
        settings = LighthouseSettings(port=0, state_dir=tmp_path / "another", join_timeout_s=0.5)
        with Lighthouse.in_thread(settings) as another:
            near = [job.start(group) for group in (0, 1)]
            moved = [job.start(group, lighthouse=relay.address) for group in (2, 3)]
            job.until_steps([*near, *moved], 5)
            relay.point_at(another.address)
            job.until(lambda: all(said(m, "refused code=stranger") for m in moved), "they are refused")
            job.until(lambda: all(m.participants == 2 for m in near), "the others go on")
            fresh = job.start(4, lighthouse=another.address)
            job.until(lambda: said(fresh, "no second history begins"), "nothing is founded there")
            at = max(member.step for member in near)
            job.until_steps(near, at + 50)
            assert max(member.step for member in moved) <= at
            relay.point_at(job.address)
            job.until(lambda: all(m.participants == 4 for m in [*near, *moved]), "they come back")
            assert fresh.step == 0
            job.stop([*near, *moved])
            assert_nothing_lost(near)
            assert not job.violations()
