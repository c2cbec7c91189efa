"""Replica groups of several ranks: they agree on every step, fail as one, and come back as one."""

import contextlib
import itertools
import os
import signal
import time
from pathlib import Path

import pytest

from everstep.config import LighthouseSettings
from everstep.core.events import EventKind
from everstep.lighthouse.app import Lighthouse
from tests.support.processes import Spawner
from tests.train.job import assert_nothing_lost
from tests.train.ranks import RankedJob, assert_ranks_agree, reserved_port, samples_by_step


def test_two_groups_of_two_ranks_hold_two_shards_and_draw_each_sample_once() -> None:
    with RankedJob(2) as job:
        job.start_teams()
        members = job.everyone()
        job.until_steps(members, 20)
        job.stop(members)
        assert_ranks_agree(job)
        assert_nothing_lost(members)
        first, second = job.team[0]
        assert first.steps[-1]["digest"] != second.steps[-1]["digest"], "the ranks hold different parameters"
        drawn = samples_by_step(members)
        for step in range(1, 21):
            assert len(drawn[step]) == 16, "four ranks of four samples"
        epoch = [sample for step in range(1, 21) for sample in drawn[step]]
        assert len(set(epoch)) == len(epoch), "a sample of the epoch counted twice"


def test_a_rank_killed_anywhere_ends_its_group_alone_and_the_group_comes_back() -> None:
    """One job, group 1 started again after each kill: the others commit every step, the one of the kill included."""
    kills = [(1, "backward"), (0, "vote"), (1, "before_step"), (0, "optimizer")]
    with RankedJob(3, heartbeat_timeout_s=10.0) as job:
        job.start_teams({(1, kills[0][0]): {"die_in": kills[0][1], "after_steps": 5}})
        survivors = job.everyone(1)
        job.until_steps(survivors, 5)
        for index in range(len(kills)):
            job.until_team_fails(1)
            victim = kills[index][0]
            other = job.team[1][1 - victim]
            assert job.team[1][victim].process.exitcode == -signal.SIGKILL
            assert other.error.startswith("GroupFailed: this replica group has failed"), other.error
            if index + 1 < len(kills):
                rank, point = kills[index + 1]
                team = job.start_team(1, {rank: {"die_in": point, "after_steps": 5}}, seed=7 * index)
                job.until_all_recover(team)
        job.stop(survivors)
        notices = [line for member in survivors for line in member.logs if line.startswith("notice")]
        assert not any("silent" in line or "no-ready" in line for line in notices), notices
        assert_nothing_lost(survivors)
        assert_ranks_agree(job)


@pytest.mark.soak
def test_a_rank_killed_while_its_group_recovers_costs_nobody_a_step() -> None:
    """No rank applies its part while another may not get one; one that dies as it lets go of the donors, or applies,
    takes its group along. By then some of the donors' ranks may have gone on, and others not.
    """
    with RankedJob(2, heartbeat_timeout_s=10.0) as job:
        job.start_teams()
        survivors = job.team[0]
        job.until_steps(job.everyone(), 5)
        job.kill(job.team[1][1])
        job.until_team_fails(1)
        for rank, point in [(1, "fetch"), (1, "meet"), (0, "meet"), (0, "apply")]:
            team = job.start_team(1, {rank: {"die_in": point, "at_configure": 1}})
            job.until_team_fails(1)
            assert team[rank].process.exitcode == -signal.SIGKILL
            has_applied = [any(line.startswith("recovered step=") for line in member.logs) for member in team]
            assert not any(has_applied) or point != "fetch"
        job.until_all_recover(job.start_team(1))
        job.stop([*survivors, *job.team[1]])
        applied = [line for member in job.team[1] for line in member.logs if line.startswith("recovered step=")]
        parts = [int(line.partition(" bytes=")[2].split()[0]) for line in applied]
        ends = [event for event in job.events() if event.kind is EventKind.RECOVERY_ENDED and event.replica_id == "1"]
        assert (ends[-1].outcome, ends[-1].done_bytes) == ("done", sum(parts))
        assert len(parts) == 2
        assert all(any(line.startswith("sent step=") for line in member.logs) for member in survivors), "it was lent"
        assert_nothing_lost(survivors)
        assert_ranks_agree(job)


@pytest.mark.soak
def test_a_donors_ranks_whose_forward_passes_need_each_other_are_let_go_together_or_not(tmp_path: Path) -> None:
    """A joiner dies when one has been let go: it waits in its forward pass for the other, whose quorum is gone."""
    files = (str(tmp_path / str(number)) for number in itertools.count())
    with RankedJob(2, heartbeat_timeout_s=10.0) as job:
        for group in range(2):
            job.start_team(group, forward_file=next(files))
        survivors = job.team[0]
        job.until_steps(job.everyone(), 5)
        job.kill(job.team[1][1])
        job.until_team_fails(1)
        for _ in range(3):
            job.start_team(1, {1: {"die_in": "meet", "at_configure": 1}}, forward_file=next(files))
            job.until_team_fails(1)
            job.until_steps(survivors, max(member.step for member in survivors) + 5)
        job.until_all_recover(job.start_team(1, forward_file=next(files)))
        job.stop(job.everyone())
        assert_nothing_lost(survivors)
        assert_ranks_agree(job)


@pytest.mark.soak
def test_a_group_founds_no_history_with_the_state_that_only_one_of_its_ranks_had_fetched() -> None:
    with RankedJob(2, heartbeat_timeout_s=20.0) as job:
        job.start_teams()
        job.until_steps(job.everyone(), 5)
        job.kill(job.team[0][1])
        job.until_team_fails(0)
        leader, follower = job.start_team(0, {0: {"die_in": "fetch", "signal": signal.SIGSTOP}})
        has_fetched = "rank 1 has its part, and rank 0 stopped itself before it had"
        job.until(lambda: leader.is_holding and any("rank recovered" in line for line in follower.logs), has_fetched)
        for member in job.team[1]:
            job.kill(member)
        job.until_team_fails(1)
        assert leader.process.pid is not None
        os.kill(leader.process.pid, signal.SIGCONT)
        job.start_team(1)
        members = job.everyone()
        job.until(lambda: all(m.participants == 2 for m in members), "they train together, with a new history")
        job.stop(members)
        assert leader.steps[0]["step"] == follower.steps[0]["step"] == 1, "it is they who founded it"
        assert not [line for line in follower.logs if line.startswith("recovered step=")], "with their initial state"
        assert_ranks_agree(job)


@pytest.mark.soak
def test_the_objection_of_one_rank_aborts_the_step_on_every_rank_of_every_group() -> None:
    with RankedJob(2) as job:
        job.start_teams({(0, 0): {"object_at_step": 6}, (1, 1): {"object_at_step": 8}})
        members = job.everyone()
        job.until_steps(members, 10)
        job.stop(members)
        assert_ranks_agree(job)
        for member in members:
            aborted = [report for report in member.steps if not report["committed"]]
            assert [report["step"] for report in aborted] == [5, 7]
            objectors = ["ValueError: the test objects", "rank 1: ValueError: the test objects"]
            other = 1 - member.plan.group
            objectors[other] = "another member voted no"
            assert [report["why"] for report in aborted] == objectors


def test_a_notice_frees_followers_from_a_reduction_that_would_never_end() -> None:
    """The peer that they wait for is stopped, so no socket of it closes; only the leaders' links tell of it."""
    with RankedJob(3, heartbeat_timeout_s=20.0) as job:
        job.start_teams({(1, 1): {"die_in": "backward", "at_step": 6, "signal": signal.SIGSTOP}})
        survivors = job.everyone(1)
        leader, stopped = job.team[1]
        job.until(lambda: stopped.is_holding and leader.step == 5, "rank 1 of group 1 stops itself before it reduces")
        assert leader.process.pid is not None
        killed_at = time.monotonic()
        os.kill(leader.process.pid, signal.SIGKILL)
        job.until_steps(survivors, 6)
        took_s = time.monotonic() - killed_at
        stopped.process.kill()
        job.stop(survivors)
        assert_nothing_lost(survivors)
        assert_ranks_agree(job)
        assert took_s < 3.0, "not within a heartbeat timeout"


@pytest.mark.soak
def test_a_stopped_follower_gets_its_group_evicted_and_it_returns_with_its_peers_state() -> None:
    with RankedJob(3, heartbeat_timeout_s=1.0) as job:
        job.start_teams()
        members, survivors = job.everyone(), job.everyone(1)
        job.until_steps(members, 5)
        stopped = job.team[1][1]
        assert stopped.process.pid is not None
        os.kill(stopped.process.pid, signal.SIGSTOP)
        step = survivors[0].step
        try:
            job.until(lambda: all(m.step > step and m.participants == 2 for m in survivors), "the others go on")
            job.until_steps(survivors, survivors[0].step + 50)
        finally:
            os.kill(stopped.process.pid, signal.SIGCONT)
        job.until(lambda: all(m.participants == 3 for m in members), "the group is back")
        job.stop(members)
        assert_nothing_lost(survivors)
        assert_ranks_agree(job)


SCRIPT = """
import os, sys
import torch, torch.distributed as dist
import everstep as es

torch.set_num_threads(1)
torch.manual_seed(int(os.environ["REPLICA_GROUP_ID"]))
dist.init_process_group("gloo")
net = torch.nn.Linear(8, 1)

def average_within_the_group():
    for parameter in net.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()

with es.Manager() as manager:
    model = es.DistributedDataParallel(manager, net)
    sgd = torch.optim.SGD(net.parameters(), lr=0.01)
    optimizer = es.Optimizer(manager, sgd, before_step=average_within_the_group)
    if dist.get_rank():
        torch.manual_seed(7)  # each rank has data of its own
    step = 0
    while step < 20:
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().mean().backward()
        step = optimizer.step().step
    weights = " ".join(f"{w:.9g}" for p in net.parameters() for w in p.flatten().tolist())
    os.write(1, f"WEIGHTS {manager.lineage()} {weights}\\n".encode())  # whole: the ranks share a pipe
dist.destroy_process_group()
"""


@pytest.mark.soak
def test_two_torchruns_of_two_ranks_train_one_model(tmp_path: Path, spawn: Spawner) -> None:
    """The ranks meet in torchrun's own store, and average within their group by torch.distributed beside Everstep."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    with contextlib.ExitStack() as ports, Lighthouse.in_thread(LighthouseSettings(port=0)) as lighthouse:
        runs = []
        for group in range(2):
            endpoint = f"127.0.0.1:{ports.enter_context(reserved_port())}"
            rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", f"--rdzv-id={group}"]
            command = ["-m", "torch.distributed.run", *rendezvous, "--nproc-per-node=2", "--local-addr=127.0.0.1"]
            env = {
                "EVERSTEP_LIGHTHOUSE": lighthouse.address,
                "REPLICA_GROUP_ID": str(group),
                "NUM_REPLICA_GROUPS": "2",
                "OMP_NUM_THREADS": "1",
                "TORCH_CPP_LOG_LEVEL": "ERROR",
            }
            runs.append(spawn([*command, str(script)], env=env))
        for run in runs:
            assert run.wait(60) == 0, run.output()
        said = [line for run in runs for line in run.output().splitlines() if line.startswith("WEIGHTS")]
        assert len(said) == 4, said
        assert len(set(said)) == 1, said


@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_to_one_rank_lets_its_whole_group_leave_and_no_step_fails(rank: int) -> None:
    with RankedJob(2) as job:
        job.start_teams()
        stayers, leavers = job.team[0], job.team[1]
        job.until_steps(job.everyone(), 5)
        leavers[rank].process.terminate()
        job.until(lambda: all(member.has_ended for member in leavers), "the group leaves", deadline_s=30)
        for member in leavers:
            member.process.join(10)
            assert member.process.exitcode == 0, job.describe()
        job.until(lambda: all(member.participants == 1 for member in stayers), "the others go on")
        job.stop(stayers)
        assert_nothing_lost(job.everyone())
        assert_ranks_agree(job)
        assert not [event for event in job.events() if event.kind in (EventKind.MEMBER_FAILED, EventKind.ROUND_OPENED)]


@pytest.mark.soak
def test_a_group_of_ranks_that_puts_notices_off_goes_on_after_a_kill() -> None:
    with RankedJob(3) as job:
        options = {"proactive_recovery": False, "collective_timeout_s": 3.0}
        job.start_teams({(1, 1): {"die_in": "backward", "at_step": 6}}, options=options)
        survivors = job.everyone(1)
        job.until_team_fails(1)
        job.until_steps(survivors, 10)
        job.stop(survivors)
        assert_nothing_lost(survivors)
        assert_ranks_agree(job)
