"""Whom to leave out when two members cannot reach each other, and for how long."""

import pytest

from everstep.core.broken_paths import KEPT_MAX, PAUSE_MAX_S, STREAK_S, BrokenPaths, LeftOut
from everstep.core.types import MemberId

A, B, C, D = (MemberId(name, number) for number, name in enumerate("abcd", start=1))
ALL = (A, B, C, D)
PAUSE_S = 10.0


def judged(
    paths: BrokenPaths, *complaints: tuple[MemberId, MemberId], now: float = 0.0, step: int = 5, first: MemberId = A
) -> list[LeftOut]:
    for reporter, peer in complaints:
        paths.complain(reporter, peer)
    return paths.judge(ALL, step, now, lambda m: m == first and first is not A)


def names(verdicts: list[LeftOut]) -> list[MemberId]:
    return [verdict.member for verdict in verdicts]


def test_the_first_round_of_a_pair_is_free_and_the_second_in_a_row_is_not() -> None:
    paths = BrokenPaths(PAUSE_S)
    assert judged(paths, (A, C)) == []
    (verdict,) = judged(paths, (C, A), now=5.0)
    assert (verdict.member, verdict.other, verdict.pause_s) == (C, A, PAUSE_S)


def test_rounds_of_different_pairs_do_not_add_up() -> None:
    paths = BrokenPaths(PAUSE_S)
    assert judged(paths, (A, B)) == []
    assert judged(paths, (C, D), now=1.0) == []
    assert judged(paths, (A, C), now=2.0) == []


@pytest.mark.parametrize(("step", "is_left_out"), [(6, True), (7, False)])
def test_a_round_long_after_the_last_is_in_a_row_unless_steps_were_committed_in_between(
    step: int, is_left_out: bool
) -> None:
    paths = BrokenPaths(PAUSE_S)
    judged(paths, (A, B), step=5)
    assert bool(judged(paths, (A, B), step=step, now=STREAK_S + 1)) is is_left_out


def test_who_is_dead_by_then_is_no_evidence() -> None:
    paths = BrokenPaths(PAUSE_S)
    for now in (0.0, 1.0, 2.0):
        paths.complain(A, B)
        assert paths.judge((A, C, D), 5, now, lambda _: False) == []


def test_one_that_is_cut_off_from_all_does_not_cost_the_others_their_place() -> None:
    """Whoever was first to complain: it is the others' complaints, too, that it is part of."""
    paths = BrokenPaths(PAUSE_S)
    judged(paths, (A, B), (A, C), (A, D))
    assert names(judged(paths, (A, B), (A, C), (A, D), now=5.0)) == [A]


def test_one_without_state_or_that_is_leaving_makes_way_first() -> None:
    paths = BrokenPaths(PAUSE_S)
    judged(paths, (B, C))
    assert names(judged(paths, (B, C), now=5.0, first=B)) == [B]


def test_pauses_double_while_it_is_on_probation_and_one_complaint_is_enough_then() -> None:
    paths = BrokenPaths(PAUSE_S)
    now, pauses = 0.0, []
    judged(paths, (A, C))
    for _ in range(9):
        (verdict,) = judged(paths, (A, C), now=now)
        assert verdict.member == C
        pauses.append(verdict.pause_s)
        assert paths.pause_of("c") is not None
        now += verdict.pause_s
        assert paths.next_deadline() == now
        assert paths.end_pauses(now)
        assert paths.pause_of("c") is None
        assert paths.next_deadline() is None
    assert pauses == [10, 20, 40, 80, 160, 320, PAUSE_MAX_S, PAUSE_MAX_S, PAUSE_MAX_S]


def test_after_a_time_without_complaint_everything_begins_anew() -> None:
    paths = BrokenPaths(PAUSE_S)
    judged(paths, (A, C))
    judged(paths, (A, C), now=1.0)
    later = 1.0 + PAUSE_S + STREAK_S + 1
    assert judged(paths, (A, C), now=later, step=900) == []
    (verdict,) = judged(paths, (A, C), now=later + 5, step=900)
    assert verdict.pause_s == PAUSE_S


def test_what_is_remembered_is_bounded() -> None:
    paths = BrokenPaths(PAUSE_S)
    for number in range(KEPT_MAX + 10):
        other = MemberId(f"m{number}", number + 10)
        for now in (number, number + 0.5):
            paths.complain(A, other)
            paths.judge((A, other), 5, now, lambda m, other=other: m == other)  # type: ignore[misc]
    assert paths.pause_of("m0") is None
    assert paths.pause_of(f"m{KEPT_MAX + 9}") is not None
