"""What a node's agent knows of its workers, told to the lighthouse: ends, silence that is no death, and fences."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from everstep.core.events import EventKind
from everstep.core.messages import Cause
from tests.support.processes import Spawner
from tests.train.agent import StandInAgent, token_of
from tests.train.job import Job, Running, assert_nothing_lost, assert_same_bits
from tests.train.outage import OutageJob
from tests.train.ranks import RankedJob

GIB = 1 << 30


def start_with_tokens(job: Job, plans: dict[int, dict[str, Any]] | None = None) -> list[Running]:
    for group in range(job.groups):
        job.start(group, agent_token=token_of(group), **(plans or {}).get(group, {}))
    return list(job.running.values())


def notices(member: Running) -> list[float]:
    return [at for line, at in zip(member.logs, member.logged_at, strict=True) if line.startswith("notice")]


def failures(job: Job) -> list[tuple[str, Cause | None, str]]:
    failed = [event for event in job.events() if event.kind is EventKind.MEMBER_FAILED]
    return [(event.replica_id, event.cause, event.evidence) for event in failed]


def noticed_after(held_bytes: int) -> float:
    """Seconds from the report of a kill to the notice on the last of the survivors."""
    with Job(3) as job, StandInAgent(job.address) as agent:
        everyone = start_with_tokens(job, {1: {"ballast_bytes": held_bytes}})
        agent.watch(*everyone)
        victim, survivors = everyone[1], [everyone[0], everyone[2]]
        job.until_steps(everyone, 10)
        reported_at = agent.kill(victim, "SIGKILL")
        job.until(lambda: all(notices(m) for m in survivors), "the others are told")
        job.until(lambda: all(m.participants == 2 for m in survivors), "the others go on without it")
        job.stop(survivors)
        assert_nothing_lost(survivors)
        assert_same_bits(survivors)
        assert failures(job) == [("1", Cause.PROCESS_EXITED, "SIGKILL")]
        return max(notices(m)[0] for m in survivors) - reported_at


def test_a_death_that_an_agent_reports_is_noticed_at_once() -> None:
    took_s = noticed_after(0)
    assert took_s < 0.5, took_s  # 2 to 10 ms where there is a processor to run on


@pytest.mark.soak
def test_a_death_is_noticed_as_soon_however_much_memory_the_process_held() -> None:
    took_s = [noticed_after(4 * GIB) for _ in range(3)]
    assert min(took_s) < 0.02, took_s


@pytest.mark.parametrize("stall_s", [2.0, pytest.param(5.0, marks=pytest.mark.soak)])
def test_a_call_that_holds_the_gil_for_longer_than_the_timeout_evicts_nobody_if_an_agent_vouches(
    stall_s: float,
) -> None:
    timeout_s = 2.0 if stall_s > 2.0 else 0.5
    with Job(3, heartbeat_timeout_s=timeout_s) as job, StandInAgent(job.address) as agent:
        stalls = {"stall_at_step": 16, "stall_s": stall_s, "stall_holds_gil": True}
        everyone = start_with_tokens(job, {1: stalls})
        agent.watch(*everyone)
        job.until_steps(everyone, 25)
        job.stop()
        assert not [at for member in everyone for at in notices(member)]
        assert not failures(job)
        assert_nothing_lost(everyone)
        assert {worker for worker, _ in agent.asked} == {token_of(1)}
        assert {state for _, state in agent.asked} <= {"R", "S", "D"}
        assert len(agent.asked) <= stall_s / timeout_s + 1  # on demand: once a timeout


def test_a_stopped_process_is_left_out_in_time_and_ended_by_its_agent() -> None:
    with Job(3, heartbeat_timeout_s=0.5) as job, StandInAgent(job.address) as agent:
        everyone = start_with_tokens(job)
        agent.watch(*everyone)
        victim, survivors = everyone[1], [everyone[0], everyone[2]]
        job.until_steps(everyone, 10)
        assert victim.process.pid is not None
        stopped_at = time.monotonic()
        os.kill(victim.process.pid, signal.SIGSTOP)
        job.until(lambda: all(notices(m) for m in survivors), "the others are told", 10)
        took_s = max(notices(m)[0] for m in survivors) - stopped_at
        assert took_s < 1.0, took_s
        job.until_gone(victim)
        victim.process.join(10)
        assert victim.process.exitcode == -signal.SIGKILL
        assert agent.fenced == [token_of(1)]
        job.until(lambda: all(m.participants == 2 for m in survivors), "the others go on without it")
        job.stop(survivors)
        assert_nothing_lost(survivors)
        assert [(group, cause) for group, cause, _ in failures(job)] == [("1", Cause.SILENT)]


def test_a_process_that_was_left_out_while_its_agent_was_away_is_ended_when_the_agent_is_back() -> None:
    with Job(2, heartbeat_timeout_s=0.5) as job:
        survivor, victim = start_with_tokens(job)
        job.until_steps([survivor, victim], 10)
        assert victim.process.pid is not None
        os.kill(victim.process.pid, signal.SIGSTOP)
        job.until(lambda: survivor.participants == 1, "the other goes on without it", 10)
        with StandInAgent(job.address) as agent:
            agent.watch(victim)
            assert agent.wait_fenced(10)
        job.until_gone(victim)
        job.stop([survivor])


def test_a_report_of_another_process_that_has_the_same_token_changes_nothing() -> None:
    """A child that inherits EVERSTEP_WORKER and makes a Manager is not the process that the agent started."""
    with Job(2) as job, StandInAgent(job.address) as agent:
        everyone = start_with_tokens(job)
        agent.client.worker_started(token_of(1), os.getpid())
        job.until_steps(everyone, 5)
        agent.client.worker_ended(token_of(1), "SIGKILL")
        job.until_steps(everyone, everyone[0].step + 10)
        job.stop()
        assert not failures(job)


def test_the_death_of_any_rank_fails_its_group_at_once() -> None:
    with RankedJob(2, ranks=2) as job, StandInAgent(job.address) as agent:
        for group in range(2):
            job.start_team(group, {rank: {"agent_token": token_of(group, rank)} for rank in range(2)})
        agent.watch(*job.everyone())
        job.until_steps(job.everyone(), 8)
        reported_at = agent.kill(job.team[1][1], "out of memory")
        others = job.team[0]
        job.until(lambda: bool(notices(others[0])), "the other group is told")
        took_s = notices(others[0])[0] - reported_at
        assert took_s < 0.5, took_s
        job.until(lambda: all(m.participants == 1 for m in others), "it goes on")
        job.until_team_fails(1)
        job.stop(others)
        assert failures(job)[0] == ("1", Cause.PROCESS_EXITED, "rank 1: out of memory")


@pytest.mark.soak
def test_a_lighthouse_that_is_started_again_hears_from_the_agents_what_runs(spawn: Spawner, tmp_path: Path) -> None:
    with OutageJob(spawn, 3, tmp_path / "state") as job, StandInAgent(job.address) as agent:
        everyone = start_with_tokens(job)
        agent.watch(*everyone)
        victim, survivors = everyone[1], [everyone[0], everyone[2]]
        job.until_steps(everyone, 5)
        job.kill_lighthouse()
        job.start_lighthouse()
        job.until(lambda: job.status().get("links") == 3 and agent.client.is_open, "all are back")
        assert victim.process.pid is not None
        os.kill(victim.process.pid, signal.SIGSTOP)
        job.until_gone(victim)
        assert agent.fenced == [token_of(1)]
        job.until(lambda: all(m.participants == 2 for m in survivors), "the others go on without it")
        job.stop(survivors)
        assert_nothing_lost(survivors)
        assert "state T" in failures(job)[0][2]


def test_a_job_whose_processes_end_well_has_no_failure_whatever_their_agents_report() -> None:
    with Job(2) as job, StandInAgent(job.address) as agent:
        everyone = start_with_tokens(job)
        agent.watch(*everyone)
        job.until_steps(everyone, 10)
        job.stop()
        for member in everyone:
            agent.client.worker_ended(member.plan.agent_token, "exit code 0", is_clean=True)
        assert not failures(job)
