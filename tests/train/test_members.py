"""What several members do together when nobody dies: samples, refusals, rules that need more than one."""

from collections import Counter

import pytest
import torch

from tests.train.job import Job, assert_nothing_lost, assert_same_bits

SAMPLES = 512


def test_each_sample_counts_once_an_epoch_while_a_group_comes_and_another_dies() -> None:
    with Job(3) as job:
        job.start_all({1: {"die_in": "backward", "at_step": 9}})
        job.until_gone(job.running[1])
        returned = job.start(1, seed=5)
        job.until(lambda: returned.step > 0 and returned.participants == 3, "it is back")
        members = [job.running[0], job.running[2], returned]
        last = max(member.step for member in members) + 90
        job.until_steps(members, last)
        everyone = list(job.all)
        job.stop()
        assert_same_bits(everyone)
    counted: Counter[int] = Counter()
    for step in range(1, last + 1):
        entries = [report for r in everyone for report in r.steps if report["committed"] and report["step"] == step]
        # A victim's batch may count although it died before it could report: then one batch is not seen here.
        assert len(entries) >= entries[0]["participants"] - 1
        counted.update(sample for report in entries for sample in report["ids"])
    most, least = max(counted.values()), min(counted[i] for i in range(SAMPLES))
    assert most > 1
    assert most - least <= 2, (most, least)  # the epoch that was begun, and an unseen batch


def test_an_aborted_steps_samples_are_drawn_again() -> None:
    with Job(2) as job:
        job.start_all({0: {"object_at_step": 5, "workers": 1}, 1: {"workers": 1}})
        members = list(job.running.values())
        job.until_steps(members, 12)
        job.stop()
        for member in members:
            aborted = next(report for report in member.steps if not report["committed"])
            again = member.steps[member.steps.index(aborted) + 1]
            assert again["committed"]
            assert again["ids"] == aborted["ids"]
        assert_same_bits(members)


def test_a_gradient_changed_by_hand_makes_a_repeated_reduction_abort_and_says_why() -> None:
    with Job(3) as job:
        job.start_all(
            {
                0: {"change_by_hand": True, "hold_at_step": 5},
                1: {"hold_at_step": 5},
                2: {"lose_reduction_at_step": 5, "change_by_hand": True},
            }
        )
        changed, victim, lacking = (job.running[group] for group in range(3))
        job.until(lambda: changed.is_holding and victim.is_holding, "one has changed its gradient, one may die")
        victim.process.kill()
        job.until(lambda: changed.granted() == ["reduce"], "somebody lacks the average: reduce again")
        changed.pipe.send("go")
        job.until_steps([changed, lacking], 8)
        job.stop([changed, lacking])
        aborted = [[report for report in member.steps if not report["committed"]] for member in (changed, lacking)]
        assert "changed .grad by hand" in aborted[0][0]["why"]
        assert [len(reports) for reports in aborted] == [1, 1]
        assert_same_bits([changed, lacking])


def test_a_failure_between_backward_and_step_costs_nothing_when_all_hold_the_average() -> None:
    with Job(2) as job:
        job.start_all({0: {"fail_at_step": 5}})
        members = list(job.running.values())
        job.until_steps(members, 10)
        job.stop()
        assert_nothing_lost(members)
        assert_same_bits(members)
        assert all(member.granted() for member in members)


def test_a_quorum_below_min_replicas_waits_and_says_so_until_another_group_joins() -> None:
    with Job(2) as job:
        options = {"options": {"min_replicas": 2}}
        job.start_all({0: options, 1: {**options, "die_in": "forward", "at_step": 5}})
        survivor = job.running[0]
        job.until_gone(job.running[1])
        job.until(lambda: any("fewer than min_replicas=2" in line for line in survivor.logs), "it says that it waits")
        at = survivor.step
        returned = job.start(1, **options)
        job.until(lambda: returned.step > 0, "the group is back")
        job.until_steps([survivor], at + 3)
        job.stop()
        assert all(report["participants"] == 2 for report in survivor.steps if report["committed"])
        assert_same_bits([survivor, returned])


def test_min_replicas_above_the_number_of_groups_is_refused_before_anything_starts() -> None:
    with Job(2) as job:
        worker = job.start(0, options={"min_replicas": 3})
        job.until_gone(worker)
        assert worker.error.startswith("ConfigError: min_replicas=3 is above the number of replica groups, 2")


def test_a_second_live_process_with_the_same_name_is_refused_and_the_first_goes_on() -> None:
    with Job(2) as job:
        job.start_all()
        members = list(job.running.values())
        job.until_steps(members, 3)
        second = job.start(7, name="0")
        job.until_gone(second)
        assert "replica_id 0 is in use by another live process" in second.error
        at = max(member.step for member in members)
        job.until_steps(members, at + 3)
        job.stop(members)
        assert_nothing_lost(members)


def test_a_joiner_with_other_tensor_shapes_is_told_which_and_the_others_go_on() -> None:
    with Job(2) as job:
        job.start_all({1: {"die_in": "forward", "at_step": 4}})
        survivor = job.running[0]
        job.until_gone(job.running[1])
        misfit = job.start(1, width=17)
        job.until_gone(misfit)
        assert misfit.error.startswith("StateMismatch"), misfit.error
        assert "weight" in misfit.error
        at = survivor.step
        job.until_steps([survivor], at + 5)
        job.stop([survivor])
        assert_nothing_lost([survivor])


def test_batches_of_different_sizes_are_voted_down_with_the_reason() -> None:
    with Job(2) as job:
        job.start_all({1: {"batch_size": 8}})
        first = job.running[0]
        job.until(lambda: len(first.steps) >= 2, "two steps are decided")
        assert not any(report["committed"] for report in first.steps)
        assert "batches of different sizes [4, 8]" in first.steps[0]["why"]


def test_with_init_sync_off_every_member_keeps_its_own_initial_weights() -> None:
    with Job(2) as job:
        off = {"init_sync": False}
        job.start_all({0: {**off, "seed": 7}, 1: {**off, "seed": 6}})  # seed plus group: the same
        members = list(job.running.values())
        job.until_steps(members, 4)
        job.stop()
        assert_same_bits(members)
        assert not any(line.startswith("recovered") for member in members for line in member.logs)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_nccl_where_there_is_no_gpu_is_a_config_error_that_says_what_to_do() -> None:
    with Job(1) as job:
        worker = job.start(0, options={"backend": "nccl"})
        job.until_gone(worker)
        assert worker.error.startswith("ConfigError: nccl was asked for"), worker.error
