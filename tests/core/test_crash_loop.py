"""Groups that die again and again: who is held, for how long, and who is left out."""

import pytest

from everstep.core.crash_loop import GROUPS_MAX, CrashDesk, CrashPolicy


def die(
    desk: CrashDesk, count: int, *, steps: int = 0, step: int = 5, nonce: str = "p", now: float = 100.0
) -> list[float]:
    """`count` processes in turn, each of which gets so far; returns how long each of those after them is held."""
    pauses = []
    desk.started("g", f"{nonce}0", now)
    for number in range(1, count + 1):
        desk.heard("g", f"{nonce}{number - 1}", steps, step)
        pauses.append(max(0.0, desk.started("g", f"{nonce}{number}", now).held_until - now))
    return pauses


def test_two_deaths_are_free_then_pauses_double_up_to_their_maximum() -> None:
    desk = CrashDesk(CrashPolicy(limit=100))
    assert die(desk, 10) == [0, 0, 1, 2, 4, 8, 16, 32, 60, 60]


def test_the_last_of_the_limit_is_left_out_until_it_is_pardoned() -> None:
    desk = CrashDesk(CrashPolicy(limit=4))
    die(desk, 3)
    assert not desk.started("g", "p3", 100.0).is_left_out
    assert desk.started("g", "p4", 100.0).is_left_out
    assert desk.started("g", "p5", 100.0).is_left_out, "and so is the next"
    assert desk.pardon("g")
    assert not desk.started("g", "p6", 100.0).is_left_out
    assert not desk.pardon("g"), "there is nothing left to pardon"


def test_a_limit_of_zero_holds_nobody() -> None:
    desk = CrashDesk(CrashPolicy(limit=0))
    assert die(desk, 20) == [0.0] * 20
    assert not desk.started("g", "p20", 100.0).is_left_out
    assert desk.held(100.0) == {}


def test_a_process_that_is_asked_again_gets_the_same_answer() -> None:
    desk = CrashDesk(CrashPolicy())
    die(desk, 3)
    assert desk.started("g", "p3", 100.5).held_until == 101.0


@pytest.mark.parametrize(
    ("steps", "first", "second", "is_progress"),
    [
        (500, 1000, 1000, False),  # restarted from a checkpoint, it dies at the same step
        (500, 1000, 900, False),
        (500, 1000, 1011, True),
        (5, 1000, 2000, False),  # the others got on, it did not
        (11, 1000, 2000, True),
    ],
)
def test_progress_is_to_come_past_the_last_death_and_some_steps_further(
    steps: int, first: int, second: int, is_progress: bool
) -> None:
    desk = CrashDesk(CrashPolicy())
    desk.started("g", "a", 0.0)
    desk.heard("g", "a", 100, first)
    desk.started("g", "b", 1.0)
    desk.heard("g", "b", steps, second)
    desk.started("g", "c", 2.0)
    desk.heard("g", "c", steps, second + (100 if is_progress else 0))
    assert (desk.started("g", "d", 3.0).held_until == 0.0) is is_progress


def test_with_fast_steps_the_same_step_is_what_heartbeats_can_tell() -> None:
    """Heartbeats come every 50 steps: it was last heard at 950 and at 980, and died at 1000 each time."""
    desk = CrashDesk(CrashPolicy())
    for nonce, last in (("a", 950), ("b", 980), ("c", 960)):
        desk.started("g", nonce, 0.0)
        desk.heard("g", nonce, 100, last - 50)
        desk.heard("g", nonce, 150, last)
    assert desk.started("g", "d", 0.0).held_until == 1.0
    assert desk.describe("g") == "it died 3 times in a row at step 980: the batch there is suspect"


def test_deaths_at_different_steps_make_the_node_suspect() -> None:
    desk = CrashDesk(CrashPolicy())
    for nonce, step in (("a", 10), ("b", 200), ("c", 400), ("d", 600)):
        desk.started("g", nonce, 0.0)
        desk.heard("g", nonce, 3, step)
    assert desk.describe("g") == "it died 3 times in a row soon after its start: its node, or its data, is suspect"
    assert list(desk.held(0.5)) == ["g"]


def test_a_process_that_said_goodbye_did_not_die() -> None:
    desk = CrashDesk(CrashPolicy())
    die(desk, 2)
    desk.left("g")
    assert desk.started("g", "again", 100.0).held_until == 0.0
    assert desk.held(100.0) == {}


def test_deaths_long_ago_are_forgotten() -> None:
    desk = CrashDesk(CrashPolicy(forget_s=600.0))
    die(desk, 5)
    assert desk.started("g", "later", 701.0).held_until == 0.0


def test_it_is_bounded() -> None:
    desk = CrashDesk(CrashPolicy())
    for number in range(GROUPS_MAX + 5):
        desk.started(str(number), "n", 0.0)
    assert len(desk._records) == GROUPS_MAX
