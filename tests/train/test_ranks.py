"""Replica groups of several ranks: they agree on every step, fail as one, and come back as one."""

import os
import signal
import time

import pytest

from tests.train.job import assert_nothing_lost
from tests.train.ranks import RankedJob, assert_ranks_agree, samples_by_step


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
    kills = [(1, "backward"), (0, "vote"), (1, "before_step"), (0, "optimizer"), (1, "optimizer"), (0, "reduction")]
    with RankedJob(3) as job:
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
        assert_nothing_lost(survivors)
        assert_ranks_agree(job)
        notices = [line for member in survivors for line in member.logs if line.startswith("notice")]
        assert not any("silent" in line for line in notices), notices


@pytest.mark.parametrize("objector", [(0, 0), (1, 1)])
def test_the_objection_of_one_rank_aborts_the_step_on_every_rank_of_every_group(objector: tuple[int, int]) -> None:
    with RankedJob(2) as job:
        job.start_teams({objector: {"object_at_step": 6}})
        members = job.everyone()
        job.until_steps(members, 9)
        job.stop(members)
        assert_ranks_agree(job)
        for member in members:
            (aborted,) = [report for report in member.steps if not report["committed"]]
            assert aborted["step"] == 5
            is_own = member.plan.group == objector[0]
            assert aborted["why"].endswith("the test objects" if is_own else "another member voted no")


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
