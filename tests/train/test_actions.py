"""Each action of a grant (DESIGN 4.3) is reached by a real death at the point that calls for it."""

from tests.train.job import Job, assert_nothing_lost, assert_same_bits

STEP = 6


def test_commit_without_a_second_vote_when_every_survivor_had_voted_ok() -> None:
    with Job(3) as job:
        job.start_all({1: {"die_in": "vote", "at_step": STEP}})
        survivors = [job.running[0], job.running[2]]
        job.until_steps(survivors, STEP + 3)
        job.stop(survivors)
        assert all(member.granted() == ["commit"] for member in survivors), [m.granted() for m in survivors]
        assert_nothing_lost(survivors)
        assert_same_bits(survivors)
        assert survivors[0].steps[STEP - 1]["participants"] == 3  # the victim's gradient counts: everybody held it


def test_vote_again_when_all_hold_the_gradient_and_nobody_had_voted() -> None:
    with Job(3) as job:
        hold = {"hold_at_step": STEP}
        job.start_all({0: hold, 1: {"die_in": "before_step", "at_step": STEP}, 2: hold})
        survivors = [job.running[0], job.running[2]]
        job.until(lambda: all(m.is_holding and m.granted() for m in survivors), "frozen while holding the gradient")
        assert all(member.granted() == ["vote"] for member in survivors)
        for member in survivors:
            member.pipe.send("go")
        job.until_steps(survivors, STEP + 3)
        job.stop(survivors)
        assert_nothing_lost(survivors)
        assert_same_bits(survivors)
        assert survivors[0].steps[STEP - 1]["participants"] == 3


def test_reduce_the_kept_gradients_again_when_somebody_does_not_hold_the_average() -> None:
    with Job(3) as job:
        job.start_all({1: {"die_in": "backward", "at_step": STEP}})
        survivors = [job.running[0], job.running[2]]
        job.until_steps(survivors, STEP + 3)
        job.stop(survivors)
        assert all(member.granted() == ["reduce"] for member in survivors), [m.granted() for m in survivors]
        assert_nothing_lost(survivors)
        assert_same_bits(survivors)
        assert survivors[0].steps[STEP - 1]["participants"] == 2


def test_abort_on_every_member_when_a_survivor_had_voted_no() -> None:
    with Job(3) as job:
        job.start_all({0: {"object_at_step": STEP}, 1: {"die_in": "vote", "at_step": STEP}})
        survivors = [job.running[0], job.running[2]]
        job.until_steps(survivors, STEP + 3)
        job.stop(survivors)
        assert all(member.granted()[:1] == ["abort"] for member in survivors), [m.granted() for m in survivors]
        objector, other = ([r for r in m.steps if not r["committed"]] for m in survivors)
        assert "the test objects" in objector[0]["why"]
        assert other[0]["why"] == "another member voted no"
        assert_same_bits(survivors)


def test_late_commit_by_who_had_voted_and_did_not_see_the_others_commit() -> None:
    """No state moves: the gradient that it holds is the one that the others applied."""
    with Job(3) as job:
        job.start_all({0: {"lose_vote_at_step": STEP}, 1: {"die_in": "optimizer", "at_step": STEP}})
        late, other = job.running[0], job.running[2]
        job.until_steps([late, other], STEP + 3)
        job.stop([late, other])
        assert late.granted() == ["late commit"], late.granted()
        assert other.granted() == ["reduce"]
        assert_nothing_lost([late, other])
        assert_same_bits([late, other])


def test_three_groups_with_three_seeds_start_from_the_same_weights() -> None:
    with Job(3) as job:
        job.start_all({g: {"seed": 100 * g} for g in range(3)})
        members = list(job.running.values())
        job.until_steps(members, 5)
        job.stop()
        assert_nothing_lost(members)
        assert_same_bits(members)
        assert sum(any(line.startswith("recovered") for line in m.logs) for m in members) == 2
