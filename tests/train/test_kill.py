"""A replica group is SIGKILLed at each point of a step: the others go on, and lose nothing that was computed."""

import pytest

from tests.train.job import Job, assert_nothing_lost, assert_same_bits

POINTS = ["forward", "backward", "reduction", "before_step", "vote", "voted", "optimizer", "updated"]


@pytest.mark.parametrize("point", POINTS)
def test_three_groups_lose_one_at_this_point_and_no_computed_step(point: str) -> None:
    with Job(3) as job:
        job.start_all({1: {"die_in": point, "at_step": 6}})
        victim, survivors = job.running[1], [job.running[0], job.running[2]]
        job.until_gone(victim)
        job.until_steps(survivors, 15)
        job.stop(survivors)
        assert_nothing_lost(survivors)
        assert_same_bits([victim, *survivors])
        assert all(member.participants == 2 for member in survivors)
        assert not any(line.startswith(("recovered", "offering")) for m in survivors for line in m.logs[20:])


@pytest.mark.parametrize("point", ["reduction"])  # the others: test_faults, in `make soak`
def test_five_groups_lose_one_at_this_point_and_no_computed_step(point: str) -> None:
    with Job(5) as job:
        job.start_all({3: {"die_in": point, "at_step": 6}})
        victim = job.running.pop(3)
        survivors = list(job.running.values())
        job.until_gone(victim)
        job.until_steps(survivors, 15)
        job.stop(survivors)
        assert_nothing_lost(survivors)
        assert_same_bits([victim, *survivors])


def test_two_of_five_killed_together_cost_no_computed_step() -> None:
    with Job(5) as job:
        job.start_all({1: {"die_in": "reduction", "at_step": 6}, 3: {"die_in": "backward", "at_step": 6}})
        victims = [job.running.pop(1), job.running.pop(3)]
        survivors = list(job.running.values())
        for victim in victims:
            job.until_gone(victim)
        job.until_steps(survivors, 15)
        job.stop(survivors)
        assert_nothing_lost(survivors)
        assert_same_bits([*victims, *survivors])


def test_a_second_death_while_the_first_is_handled_costs_no_computed_step() -> None:
    """The second one dies in the repeated reduction of the same step."""
    with Job(4) as job:
        job.start_all({1: {"die_in": "backward", "at_step": 6}, 2: {"die_in": "vote", "at_step": 6}})
        victims = [job.running.pop(1), job.running.pop(2)]
        survivors = list(job.running.values())
        for victim in victims:
            job.until_gone(victim)
        job.until_steps(survivors, 15)
        job.stop(survivors)
        assert_nothing_lost(survivors)
        assert_same_bits([*victims, *survivors])


def test_forked_dataloader_workers_of_the_victim_do_not_keep_its_connections_open() -> None:
    with Job(3) as job:
        job.start_all({1: {"die_in": "reduction", "at_step": 6, "workers": 2}})
        victim, survivors = job.running[1], [job.running[0], job.running[2]]
        job.until(lambda: all(m.step >= 15 for m in survivors), "the survivors go on at once", deadline_s=30)
        job.stop(survivors)
        assert_nothing_lost(survivors)
        causes = [line for m in survivors for line in m.logs if line.startswith("notice")]
        assert not any("silent" in line for line in causes), causes
        assert victim.step == 5


def test_a_killed_group_comes_back_twice_with_its_peers_state() -> None:
    with Job(3) as job:
        job.start_all({1: {"die_in": "reduction", "at_step": 6}})
        survivors = [job.running[0], job.running[2]]
        everyone = [*survivors]
        job.until_gone(job.running[1])
        for seed in (98, 99):
            returned = job.start(1, seed=seed)
            everyone.append(returned)
            job.until(lambda: job.running[1].step > 0 and job.running[1].participants == 3, "it trains with the others")
            assert any(line.startswith("recovered") for line in returned.logs)
            if seed == 98:
                returned.process.kill()
                job.until_gone(returned)
        job.stop()
        assert_nothing_lost(survivors)
        assert_same_bits(everyone)
