"""The longest interval of late, as a worker keeps it."""

from everstep.core.limits import ENOUGH, WARM_UP, Observed
from everstep.monitor.track import WINDOW_NS, Track

S = 1_000_000_000
SOON = WARM_UP + ENOUGH


def beats(track: Track, first: int, count: int, seconds: float, begun: int) -> int:
    """The `first`th interval and those after it, each as long; returns when the last one ended."""
    now = begun
    for number in range(first, first + count):
        now += int(seconds * S)
        track.note(number, int(seconds * S), now)
    return now


def test_the_first_intervals_of_a_process_do_not_count() -> None:
    track = Track(lambda *_: None)
    beats(track, 1, WARM_UP, 60.0, S)
    assert track.observed() is None
    beats(track, WARM_UP + 1, 1, 0.5, 1000 * S)
    assert track.observed() == Observed(1, 0.5)


def test_a_long_interval_counts_for_half_after_a_hundred_times_its_length_however_often_windows_end() -> None:
    """A validation of five minutes every eleven hours is half a percent of the time: it is never forgotten."""
    track = Track(lambda *_: None)
    now = beats(track, 1, SOON, 1.0, S)
    now = beats(track, SOON + 1, 1, 300.0, now)
    beats(track, SOON + 2, 30_000, 1.0, now)
    observed = track.observed()
    assert observed is not None
    assert 145.0 < observed.longest_s < 155.0


def test_one_slow_step_is_forgotten() -> None:
    track = Track(lambda *_: None)
    now = beats(track, 1, SOON, 0.1, S)
    now = beats(track, SOON + 1, 1, 2.0, now)
    beats(track, SOON + 2, 2 * WINDOW_NS // S * 100, 0.1, now)
    observed = track.observed()
    assert observed is not None
    assert observed.longest_s < 0.2


def test_what_an_earlier_process_saw_counts_from_the_start_and_fades_from_then_on() -> None:
    track = Track(lambda *_: None)
    track.seed(Observed(100, 60.0))
    assert track.observed() == Observed(100, 60.0)
    now = beats(track, 1, SOON, 1.0, S)
    track.seed(Observed(100, 60.0))
    assert track.observed() == Observed(100 + ENOUGH, 60.0)
    beats(track, SOON + 1, 6_000, 1.0, now)
    observed = track.observed()
    assert observed is not None
    assert 29.0 < observed.longest_s < 32.0
