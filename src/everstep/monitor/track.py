"""The longest interval of late, kept where intervals are measured: in the worker, at next to no cost.

A beat compares with two numbers, a ceiling and an instant, and calls `note` only when one is passed: for the longest
of each minute, and at each minute's end.
"""

from collections.abc import Callable

from everstep.core.limits import ENOUGH, WARM_UP, Observed, faded

WINDOW_NS = 60_000_000_000
FIRST_WINDOW_NS = 5_000_000_000


class Track:
    """One kind of interval. `publish(count, longest_ns, is_warm)` tells the page; warm: it is not only an earlier
    process's."""

    def __init__(self, publish: Callable[[int, int, bool], None]) -> None:
        self._publish = publish
        self._window = -1  # the longest since the window began
        self._due = 0
        self._seed = 0
        self._peak_ns = 0  # the longest of windows before, when it was new
        self._peak_at = 0  # 0: when the next window ends
        self.count = 0
        self.longest_ns = 0

    def note(self, number: int, duration_ns: int, now: int) -> tuple[int, int]:
        """The `number`th interval, from 1. Returns the ceiling and the instant past which to call again."""
        if number <= WARM_UP:
            return -1, 0
        self.count = self._seed + number - WARM_UP
        if self._due == 0:
            self._due = now + FIRST_WINDOW_NS
        if now > self._due:
            self._roll(max(self._window, duration_ns), now)
        self._window = max(self._window, duration_ns)
        self.longest_ns = max(self.longest_ns, duration_ns)
        self._publish(self.count, self.longest_ns, True)
        return self._window if self.count >= ENOUGH else -1, self._due  # -1: again at once

    def _roll(self, longest_ns: int, now: int) -> None:
        """A window ends. The peak itself fades: what is left of it has a shorter half-life, and less each minute."""
        self._peak_at = self._peak_at or now
        left_ns = int(faded(self._peak_ns / 1e9, (now - self._peak_at) / 1e9) * 1e9)
        if longest_ns >= left_ns:
            self._peak_ns, self._peak_at, left_ns = longest_ns, now, longest_ns
        self.longest_ns = left_ns
        self._window, self._due = -1, now + WINDOW_NS

    def seed(self, observed: Observed) -> None:
        """What an earlier process saw."""
        self._seed = max(self._seed, observed.count)
        self.count = max(self.count, self._seed)
        self.longest_ns = max(self.longest_ns, round(observed.longest_s * 1e9))
        self._peak_ns, self._peak_at = self.longest_ns, 0
        self._publish(self.count, self.longest_ns, False)

    def observed(self) -> Observed | None:
        return Observed(self.count, self.longest_ns / 1e9) if self.count > 0 else None
