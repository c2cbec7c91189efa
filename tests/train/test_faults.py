"""Deaths at hard moments, by real processes; every history is checked against the invariants."""

import os
import signal
import time

import pytest

from tests.train.job import Job, Running, assert_nothing_lost
from tests.train.test_kill import POINTS


def assert_well(job: Job, failed: list[str]) -> None:
    """The invariants hold, and these groups failed, in any order."""
    failures = job.failures()
    assert job.violations() == []
    assert sorted(failure.member.partition("#")[0] for failure in failures) == sorted(failed)


def survivors_of(job: Job, *victims: int) -> list[Running]:
    return [running for group, running in job.running.items() if group not in victims]


@pytest.mark.soak
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("groups", [3, 5])
def test_a_death_at_each_point_of_a_step(groups: int, point: str) -> None:
    with Job(groups) as job:
        job.start_all({1: {"die_in": point, "at_step": 6}})
        job.until_gone(job.running[1])
        survivors = survivors_of(job, 1)
        job.until_steps(survivors, 15)
        job.stop(survivors)
        assert_nothing_lost(survivors)
        assert_well(job, ["1"])


@pytest.mark.parametrize("apart_s", [pytest.param(0.0, marks=pytest.mark.soak), 0.001])
def test_two_groups_killed_a_millisecond_apart(apart_s: float) -> None:
    with Job(5) as job:
        job.start_all()
        job.until_steps(list(job.running.values()), 6)
        victims = [job.running[1], job.running[3]]
        victims[0].process.kill()
        until = time.monotonic() + apart_s
        while time.monotonic() < until:
            pass
        victims[1].process.kill()
        for victim in victims:
            job.until_gone(victim)
        survivors = survivors_of(job, 1, 3)
        job.until_steps(survivors, max(m.step for m in survivors) + 10)
        job.stop(survivors)
        assert_nothing_lost(survivors)
        assert_well(job, ["1", "3"])


@pytest.mark.parametrize("second", ["rebuild", "rebuilt", "rereduce"])
def test_a_second_death_while_the_first_is_resolved(second: str) -> None:
    """Before the new group is built, when it has just been built, and in the repeated reduction."""
    with Job(4) as job:
        job.start_all({1: {"die_in": "backward", "at_step": 6}, 2: {"die_in": second, "at_configure": 2}})
        for group in (1, 2):
            job.until_gone(job.running[group])
        survivors = survivors_of(job, 1, 2)
        job.until_steps(survivors, 15)
        job.stop(survivors)
        assert_nothing_lost(survivors)
        assert_well(job, ["1", "2"])


def test_a_joiner_killed_before_it_has_the_state() -> None:
    with Job(2) as job:
        job.start_all()
        everyone = list(job.running.values())
        job.until_steps(everyone, 6)
        joiner = job.start(2, die_in="rebuilt", at_configure=1)
        job.until_gone(joiner)
        job.until(lambda: all(m.participants == 2 and m.step > 10 for m in everyone), "the others go on")
        again = job.start(2)
        job.until(lambda: again.step > 0 and again.participants == 3, "the next one gets in")
        job.stop()
        assert_nothing_lost(everyone)
        assert_well(job, ["2"])


def test_a_source_killed_while_the_joiner_waits_for_the_state() -> None:
    """It dies after the barrier, before it offers anything: the joiner gets it from another one."""
    with Job(3) as job:
        job.start_all({0: {"die_in": "offer", "at_configure": 2}})
        job.until_steps(list(job.running.values()), 6)
        joiner = job.start(3)
        job.until_gone(job.running[0])
        survivors = [job.running[1], job.running[2]]
        job.until(lambda: joiner.step > 0 and joiner.participants == 3, "it gets in")
        job.stop([*survivors, joiner])
        assert_nothing_lost(survivors)
        assert_well(job, ["0"])


@pytest.mark.soak
def test_a_gil_held_for_half_a_minute_costs_its_group_a_recovery() -> None:
    with Job(3) as job:
        job.start_all({1: {"stall_at_step": 8, "stall_s": 30.0, "stall_holds_gil": True}})
        everyone = list(job.running.values())
        survivors = survivors_of(job, 1)
        job.until(lambda: all(m.participants == 2 for m in survivors), "the others go on without it", 20)
        job.until(lambda: all(m.participants == 3 for m in everyone), "it trains with the others again", 60)
        job.stop()
        assert_nothing_lost(survivors)
        assert_well(job, ["1"])


@pytest.mark.soak
def test_a_slow_first_step_and_a_long_validation_evict_nobody() -> None:
    with Job(2) as job:
        job.start_all(
            {0: {"stall_at_step": 1, "stall_s": 20.0}, 1: {"stall_at_step": 30, "stall_s": 10.5, "stall_section": "v"}}
        )
        everyone = list(job.running.values())
        job.until_steps(everyone, 40)
        job.stop()
        assert_nothing_lost(everyone)
        assert_well(job, [])


@pytest.mark.soak
def test_a_group_that_is_stopped_again_and_again_comes_back_each_time() -> None:
    with Job(3, heartbeat_timeout_s=0.5) as job:
        job.start_all()
        everyone = list(job.running.values())
        job.until_steps(everyone, 6)
        for _ in range(2):
            pid = job.running[1].process.pid
            assert pid is not None
            os.kill(pid, signal.SIGSTOP)
            try:
                job.until(lambda: all(m.participants == 2 for m in survivors_of(job, 1)), "the others go on", 10)
            finally:
                os.kill(pid, signal.SIGCONT)
            job.until(lambda: all(m.participants == 3 for m in everyone), "it is back")
        job.stop()
        assert_nothing_lost(survivors_of(job, 1))
        assert_well(job, ["1", "1"])
