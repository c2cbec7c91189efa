"""The longest intervals that ranks of a job saw, over all of its nodes: what limits are learned from (core/limits.py).

A node says what its own ranks saw, and says it again when a limit would change by it; nothing is said in a step. The
lighthouse keeps each node's last word and tells every node the largest, which a node that comes later hears at once.
What nodes saw that have gone fades. Nothing is journalled: the nodes say it again to a lighthouse that starts anew.
"""

import math
from collections.abc import Callable, Iterable, Mapping

from everstep.core.limits import ENOUGH, Fading, Observed
from everstep.core.messages import Effect, SendToNodes
from everstep.core.node_messages import IntervalsLargest, SeenInterval

KINDS_MAX = 64  # of one node, and of the job; more are passed over
KEY_CHARS_MAX = 80  # as a section's name
LONGEST_MAX_S = 30 * 86400.0
TELL_S = 5.0  # between two messages to all nodes of a group, at least
TELL_SHARE = 0.05  # the change of an interval that is worth telling, and
TELL_LEAST_S = 0.1
FADED_S = 60.0  # after which it is looked again at what is left of nodes that have gone


class JobIntervals:
    """Shared by the machines of a job's groups. `version` grows when the largest changes so that it is worth telling.

    O(kinds) a message, but where the one that had the largest says less.
    """

    def __init__(self) -> None:
        self._of: dict[tuple[str, str], dict[str, float]] = {}
        self._gone = Fading()
        self._largest: dict[str, float] = {}
        self._told: dict[str, float] = {}
        self._look_at = -math.inf
        self.version = 0

    def hear(self, node: tuple[str, str], intervals: Iterable[SeenInterval], now: float) -> None:
        """All that this node's ranks saw of late; `node`: (group, node_id). Within the bounds, whatever it has sent."""
        before, said = self._of.get(node, {}), _within_bounds(intervals)
        self._of[node] = said
        if any(
            said.get(key, 0.0) < longest and longest >= self._largest.get(key, 0.0) for key, longest in before.items()
        ):
            self._look(now)
        else:
            self._raise(said)
        self._judge()

    def forget(self, node: tuple[str, str], now: float) -> None:
        """It has gone; what it saw is the largest for a while yet."""
        said = self._of.pop(node, {}).items()
        self._gone.add(as_observed((key, longest) for key, longest in said if key in self._largest), now)

    def fade(self, now: float) -> None:
        """Now and then: what nodes saw that have gone counts less."""
        if now >= self._look_at:
            self._look_at = now + FADED_S
            self._look(now)
            self._judge()

    @property
    def largest(self) -> tuple[SeenInterval, ...]:
        return tuple(SeenInterval(key, longest) for key, longest in self._largest.items())

    def _look(self, now: float) -> None:
        self._largest = {key: one.longest_s for key, one in self._gone.left(now).items()}
        for said in self._of.values():
            self._raise(said)

    def _raise(self, said: Mapping[str, float]) -> None:
        for key, longest in said.items():
            if key in self._largest or len(self._largest) < KINDS_MAX:
                self._largest[key] = max(longest, self._largest.get(key, 0.0))

    def _judge(self) -> None:
        told, now = self._told, self._largest
        if now.keys() != told.keys() or any(_differ(now[key], told[key]) for key in now):
            self._told = dict(now)
            self.version += 1


class Teller:
    """Of one machine: when its nodes are told. Changes that come close together are told at once."""

    def __init__(self, intervals: JobIntervals) -> None:
        self._intervals = intervals
        self._version = intervals.version
        self._next_at = -math.inf

    def next_deadline(self) -> float | None:
        return self._next_at if self._version != self._intervals.version else None

    def tell(self, links: Callable[[], tuple[int, ...]], now: float) -> list[Effect]:
        self._intervals.fade(now)
        if self._version == self._intervals.version or now < self._next_at:
            return []
        self._version, self._next_at = self._intervals.version, now + TELL_S
        whom = links()
        return [SendToNodes(IntervalsLargest(self._intervals.largest), whom)] if whom else []

    def greet(self, link: int) -> list[Effect]:
        """A node that comes."""
        largest = self._intervals.largest
        return [SendToNodes(IntervalsLargest(largest), (link,))] if largest else []


def as_observed(said: Iterable[tuple[str, float]]) -> dict[str, Observed]:
    """Only what a limit may be learned of is said."""
    return {key: Observed(ENOUGH, longest) for key, longest in said}


def _within_bounds(intervals: Iterable[SeenInterval]) -> dict[str, float]:
    good = [one for one in intervals if 0 < len(one.key) <= KEY_CHARS_MAX and 0.0 <= one.longest_s <= LONGEST_MAX_S]
    return {one.key: one.longest_s for one in good[:KINDS_MAX]}


def _differ(one: float, other: float) -> bool:
    return abs(one - other) > max(TELL_LEAST_S, TELL_SHARE * max(one, other))
