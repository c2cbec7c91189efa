"""Failures other than a death: silence, a hung training thread, a held GIL, a request to leave."""

import os
import signal
import time

import pytest

from everstep.core.events import EventKind
from everstep.core.messages import Cause
from everstep.exit_codes import ExitCode
from tests.train.job import Job, Running, assert_nothing_lost, assert_same_bits


def notices(members: list[Running]) -> list[str]:
    return [line for member in members for line in member.logs if line.startswith("notice")]


def kinds(job: Job, kind: EventKind) -> list[str]:
    return [event.replica_id for event in job.events() if event.kind is kind]


def test_a_stopped_group_is_left_out_in_time_and_comes_back_when_it_is_continued() -> None:
    with Job(3, heartbeat_timeout_s=0.5) as job:
        job.start_all()
        everyone = list(job.running.values())
        victim, survivors = job.running[1], [job.running[0], job.running[2]]
        job.until_steps(everyone, 10)
        pid = victim.process.pid
        assert pid is not None
        stopped_at = time.monotonic()
        os.kill(pid, signal.SIGSTOP)
        try:
            job.until(lambda: all(m.participants == 2 for m in survivors), "the others go on without it", 10)
            took_s = time.monotonic() - stopped_at
        finally:
            os.kill(pid, signal.SIGCONT)
        assert took_s < 2.5, took_s
        job.until(lambda: all(m.participants == 3 for m in everyone), "it trains with the others again")
        job.stop()
        assert victim.logs
        assert any(line.startswith("evicted") for line in victim.logs)
        assert any(line.startswith("recovered") for line in victim.logs)
        assert_nothing_lost(survivors)
        assert_same_bits(everyone)
        failed = [event for event in job.events() if event.kind is EventKind.MEMBER_FAILED]
        assert [(event.replica_id, event.cause) for event in failed] == [("1", Cause.SILENT)]
        ledger = job.ledger()
        for spent in ledger.values():
            assert spent["wall_s"] == pytest.approx(sum(s for name, s in spent.items() if name != "wall_s"), abs=0.01)
        for survivor in ("0", "2"):
            assert 0.2 < ledger[survivor]["detecting_s"] <= took_s
            assert 0.0 < ledger[survivor]["reconfiguring_s"] < took_s
        assert ledger["1"]["recovering_s"] > 0.0
        assert max(spent["absent_s"] for spent in ledger.values()) < 1.0


def test_a_call_that_holds_the_gil_for_a_while_evicts_nobody() -> None:
    with Job(2) as job:
        job.start_all({1: {"stall_at_step": 8, "stall_s": 1.0, "stall_holds_gil": True}})
        everyone = list(job.running.values())
        job.until_steps(everyone, 15)
        job.stop()
        assert not notices(everyone)
        assert_nothing_lost(everyone)


def test_a_call_that_holds_the_gil_for_longer_than_the_timeout_costs_its_group_a_recovery_and_no_more() -> None:
    with Job(3, heartbeat_timeout_s=0.5) as job:
        job.start_all({1: {"stall_at_step": 8, "stall_s": 3.0, "stall_holds_gil": True}})
        everyone = list(job.running.values())
        survivors = [job.running[0], job.running[2]]
        job.until(lambda: all(m.participants == 2 for m in survivors), "the others go on without it", 20)
        job.until(lambda: all(m.participants == 3 for m in everyone), "it trains with the others again")
        job.stop()
        assert_nothing_lost(survivors)
        assert_same_bits(everyone)


def test_a_hung_training_thread_is_found_shown_and_ended() -> None:
    with Job(3, stuck_timeout_s=1.0) as job:
        job.start_all({1: {"stall_at_step": 16, "stall_s": 60.0}})
        victim, survivors = job.running[1], [job.running[0], job.running[2]]
        job.until(lambda: victim.is_holding, "it hangs")
        hung_at = time.monotonic()
        job.until(lambda: all(m.participants == 2 for m in survivors), "the others go on without it", 10)
        took_s = time.monotonic() - hung_at
        job.until_gone(victim)
        victim.process.join(10)
        assert victim.process.exitcode == ExitCode.STUCK
        assert 1.0 <= took_s < 2.5, took_s
        job.stop(survivors)
        assert_nothing_lost(survivors)
        failed = [event for event in job.events() if event.kind is EventKind.MEMBER_FAILED]
        assert [(event.replica_id, event.cause) for event in failed] == [("1", Cause.STUCK)]
        assert "no progress for" in failed[0].evidence


@pytest.mark.parametrize("plan", [{"stall_at_step": 16, "stall_section": "validation"}, {"stall_at_step": 1}])
def test_an_open_section_or_a_first_step_may_take_its_time(plan: dict[str, object]) -> None:
    with Job(2, stuck_timeout_s=0.5) as job:
        job.start_all({1: {"stall_s": 2.0, **plan}})
        everyone = list(job.running.values())
        job.until_steps(everyone, 20)
        job.stop()
        assert not notices(everyone)
        assert_nothing_lost(everyone)


def test_sigterm_lets_a_group_leave_at_a_step_boundary_and_no_step_fails() -> None:
    with Job(3) as job:
        job.start_all()
        everyone = list(job.running.values())
        leaver, others = job.running[1], [job.running[0], job.running[2]]
        job.until_steps(everyone, 8)
        leaver.process.terminate()
        job.until_gone(leaver)
        leaver.process.join(10)
        assert leaver.process.exitcode == 0
        job.until(lambda: all(m.participants == 2 for m in others), "the others go on")
        job.stop(others)
        assert not notices(everyone)
        assert_nothing_lost(everyone)
        assert_same_bits(everyone)
        assert kinds(job, EventKind.MEMBER_LEFT)[:1] == ["1"]
        assert not kinds(job, EventKind.MEMBER_FAILED)
        assert not kinds(job, EventKind.ROUND_OPENED)


def test_sigterm_to_all_ends_the_job_within_the_grace() -> None:
    with Job(2) as job:
        job.start_all({group: {"options": {"drain_grace_s": 1.0}} for group in (0, 1)})
        everyone = list(job.running.values())
        job.until_steps(everyone, 5)
        for member in everyone:
            member.process.terminate()
        for member in everyone:
            job.until_gone(member)
            member.process.join(10)
            assert member.process.exitcode == 0


def test_a_group_left_behind_by_a_collective_timeout_needs_no_notice() -> None:
    """EVERSTEP_PROACTIVE_RECOVERY=0: the survivors' own collective has to fail before they go on."""
    with Job(2, heartbeat_timeout_s=0.5) as job:
        options = {"proactive_recovery": False, "collective_timeout_s": 3.0}
        job.start_all({group: {"options": options} for group in (0, 1)})
        everyone = list(job.running.values())
        survivor, victim = everyone
        job.until_steps(everyone, 8)
        pid = victim.process.pid
        assert pid is not None
        stopped_at = time.monotonic()
        os.kill(pid, signal.SIGSTOP)
        try:
            job.until(lambda: survivor.participants == 1, "it goes on alone", 20)
            took_s = time.monotonic() - stopped_at
        finally:
            os.kill(pid, signal.SIGCONT)
        assert took_s > 2.5, took_s
        assert any(line.startswith("notice put off") for line in survivor.logs)
        assert_nothing_lost([survivor])
