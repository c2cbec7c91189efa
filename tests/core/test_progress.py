"""Who is held to be stuck, by what the members' heartbeats say."""

import pytest

from everstep.core.messages import Activity, Heartbeat
from everstep.core.progress import FACTOR, LAGGARDS_MAX, STEPS_ENOUGH, ProgressJudge, StuckPolicy
from everstep.core.types import Member, MemberId, Quorum, QuorumId

A, B, C, D = (MemberId(name, 1) for name in "abcd")
ALL = Quorum(QuorumId(1, 1), (Member(A), Member(B), Member(C)))
FOUR = Quorum(QuorumId(1, 2), (Member(A), Member(B), Member(C), Member(D)))


def computing(seconds: float, *, steps: int = 100, longest_s: float = 0.1, section: str = "") -> Heartbeat:
    return Heartbeat(activity=Activity.COMPUTING, activity_s=seconds, steps=steps, longest_s=longest_s, section=section)


def waiting(*, steps: int = 100, longest_s: float = 0.1) -> Heartbeat:
    return Heartbeat(activity=Activity.WAITING, steps=steps, longest_s=longest_s)


def judge(**policy: float) -> ProgressJudge:
    made = ProgressJudge(StuckPolicy(**policy))
    made.keep_only(ALL)
    return made


def test_one_that_all_others_wait_for_is_asked_at_its_limit_and_judged_by_its_answer() -> None:
    progress = judge(floor_s=10.0)
    progress.beat(B, waiting(), 3.0)
    progress.beat(C, waiting(), 3.5)
    progress.beat(A, computing(2.0), 5.0)
    assert progress.next_deadline() == 13.5, "counted from when the last of the others began to wait"
    assert progress.ask(13.4) == []
    assert progress.ask(13.5) == [A]
    assert progress.next_deadline() is None
    assert progress.verdict(A, 13.5) is None, "its last word is old"
    progress.beat(A, computing(10.51), 13.51)
    stuck = progress.verdict(A, 13.51)
    assert stuck is not None
    assert stuck.detail == "no progress for 10.5 s (limit 10.0 s) while others wait"


def test_what_all_do_for_long_convicts_nobody_when_the_first_is_done() -> None:
    """A checkpoint on every group, outside of a section: c is through with it first."""
    progress = judge(floor_s=10.0)
    progress.beat(A, computing(10.5), 10.5)
    progress.beat(B, computing(10.5), 10.5)
    progress.beat(C, waiting(), 10.5)
    assert progress.next_deadline() is None, "a majority is not what holds the others up"
    progress.beat(B, waiting(), 12.0)
    assert progress.next_deadline() == 22.0
    progress.beat(A, computing(12.0), 12.0)
    assert progress.verdict(A, 12.0) is None


def test_one_that_has_moved_on_meanwhile_is_not_judged() -> None:
    progress = judge()
    progress.beat(B, waiting(), 0.0)
    progress.beat(A, computing(0.0), 0.0)
    progress.ask(10.0)
    progress.beat(A, computing(0.5), 10.0)
    assert progress.verdict(A, 10.0) is None
    assert progress.next_deadline() == 19.5


def test_while_somebody_else_computes_within_its_limit_nobody_is_stuck() -> None:
    progress = judge()
    progress.keep_only(FOUR)
    progress.beat(C, waiting(), 0.0)
    progress.beat(D, waiting(), 0.0)
    progress.beat(A, computing(9.0), 0.0)
    progress.beat(B, computing(0.0), 1.0)
    assert progress.next_deadline() == 11.0, "b's limit"
    progress.ask(11.0)
    progress.beat(A, computing(20.0), 11.0)
    assert progress.verdict(A, 11.0) is None
    progress.beat(B, computing(10.0), 11.0)
    assert progress.verdict(B, 11.0) is not None
    assert progress.verdict(A, 11.0) is not None


def test_nobody_is_stuck_while_nobody_waits() -> None:
    progress = judge()
    for member in (A, B, C):
        progress.beat(member, computing(1e6), 0.0)
    assert progress.next_deadline() is None


@pytest.mark.parametrize("activity", [Activity.RECOVERING, Activity.STARTING])
def test_recovery_and_start_are_never_stuck(activity: Activity) -> None:
    progress = judge()
    progress.beat(B, waiting(), 0.0)
    progress.beat(A, Heartbeat(activity=activity, activity_s=1e6), 0.0)
    assert progress.next_deadline() is None
    assert progress.ask(1e9) == []


def test_an_open_section_stops_the_judgement() -> None:
    progress = judge()
    progress.beat(B, waiting(), 0.0)
    progress.beat(A, computing(1e6, section="validation"), 0.0)
    assert progress.next_deadline() is None
    assert progress.verdict(A, 1e9) is None


def test_the_limit_is_learned_from_the_slowest_member_and_has_a_floor() -> None:
    progress = judge(floor_s=10.0)
    progress.beat(B, waiting(longest_s=3.0), 0.0)
    assert progress.limit_of(computing(0.0)) == FACTOR * 3.0
    progress.beat(B, waiting(longest_s=0.2), 1.0)
    assert progress.limit_of(computing(0.0)) == 10.0


def test_a_process_that_has_made_few_steps_gets_the_long_limit() -> None:
    progress = judge(timeout_s=1.0)
    assert progress.limit_of(computing(0.0, steps=STEPS_ENOUGH - 1)) == 300.0
    assert progress.limit_of(computing(0.0, steps=STEPS_ENOUGH)) == 1.0


def test_who_left_the_quorum_holds_no_judgement_up() -> None:
    progress = judge()
    progress.beat(C, Heartbeat(activity=Activity.RECOVERING), 0.0)
    progress.beat(B, waiting(), 0.0)
    progress.beat(A, computing(0.0), 0.0)
    assert progress.next_deadline() is None
    progress.keep_only(Quorum(QuorumId(1, 2), (Member(A), Member(B))))
    assert progress.next_deadline() == 10.0


def test_a_large_job_at_work_costs_no_judgement() -> None:
    progress = judge()
    progress.beat(B, waiting(), 0.0)
    for i in range(LAGGARDS_MAX + 1):
        progress.beat(MemberId(str(i), 1), computing(1e6), 0.0)
    assert progress.next_deadline() is None
