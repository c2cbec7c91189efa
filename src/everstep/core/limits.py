"""How long a rank may take: what was given, what its client worked out, what was learned from all ranks.

A learned limit is a safety factor times the longest interval seen lately on any rank of the job: of this node, and, as
the lighthouse says (core/learned.py), of the others. "Lately": an interval counts for half after a hundred times its
own length, so a phase that takes half a percent of a job's time stays within its limit for ever, and one slow step is
forgotten. The safety factor is from NVIDIA's resiliency extension, the forgetting ours.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping

HEARTBEAT = "<heartbeat>"  # keys beside the sections' names, which may not begin with <
OUTSIDE = "<outside>"  # of every section

WARM_UP = 3  # first intervals of each kind in a process: compilation, caches, first allocations
ENOUGH = 16  # intervals after them, on one rank, before a limit is learned without a call
HALF_LIFE = 100.0  # times its own length

FADED_S = 10.0  # after which limits are worked out anew although nothing was seen
LEAST_S = 0.001  # what has faded below it is forgotten

NEWS_S = 10.0  # between two messages about the intervals of a node, at least
NEWS_SHARE = 0.1  # by which a limit would have to change


@dataclasses.dataclass(frozen=True)
class Observed:
    """`count` intervals after the warm-up, and the longest of late."""

    count: int
    longest_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class LimitPolicy:
    """`given` wins over what is learned; None there: no limit. `mixed_floor_s` is the floor where anything may happen:
    between heartbeats, outside of sections, and in sections that say so."""

    given: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    until_learned: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    learns: bool = True
    safety_factor: float = 5.0
    floor_s: float = 10.0
    mixed_floor_s: float = 300.0


class Fading:
    """The longest of each kind that nobody sees any more, and since when: from then on it counts less and less.

    What is kept is the interval itself, not what is left of it, so that its half-life stays its own.
    """

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Observed, float]] = {}

    def add(self, observed: Mapping[str, Observed], now: float) -> None:
        self._kept = {
            key: (one, at) for key, (one, at) in self._kept.items() if faded(one.longest_s, now - at) >= LEAST_S
        }
        for key, one in observed.items():
            before, at = self._kept.get(key, (one, now))
            count = max(one.count, before.count)
            if one.longest_s < faded(before.longest_s, now - at):
                self._kept[key] = Observed(count, before.longest_s), at
            else:
                self._kept[key] = Observed(count, one.longest_s), now

    def left(self, now: float) -> dict[str, Observed]:
        return {key: Observed(one.count, faded(one.longest_s, now - at)) for key, (one, at) in self._kept.items()}


class Limits:
    """Of one job on one node. `limit` is asked often: O(1) after `note`."""

    def __init__(self, policy: LimitPolicy) -> None:
        self._policy = policy
        self._set: dict[str, float | None] = {}
        self._of: dict[object, dict[str, float | None]] = {}
        self._seen: dict[object, Mapping[str, Observed]] = {}
        self._kept = Fading()  # of ranks that ended
        self._elsewhere: Mapping[str, Observed] = {}  # on all nodes, as was heard last
        self._heard = Fading()  # and before that
        self._longest: dict[str, float] = {}  # of keys that are learned
        self._learned_at = -math.inf
        self._said: dict[str, float] = {}  # what limits would be by what other nodes were told
        self._said_at = -math.inf

    def limit(self, key: str, is_mixed: bool = False) -> float | None:
        """`is_mixed`: anything may happen in it, or it is one of the first of its process."""
        if key in self._set:
            return self._set[key]
        if key in self._policy.given:
            return self._policy.given[key]
        longest = self._longest.get(key)
        return self._policy.until_learned.get(key) if longest is None else self._by(key, longest, is_mixed)

    def _by(self, key: str, longest_s: float, is_mixed: bool = False) -> float:
        is_mixed = is_mixed or key in (HEARTBEAT, OUTSIDE)
        floor = self._policy.mixed_floor_s if is_mixed else self._policy.floor_s
        return max(floor, self._policy.safety_factor * longest_s)

    def is_learned(self, key: str) -> bool:
        """Or would be: nobody gave or calculated it."""
        return key not in self._set and key not in self._policy.given

    def is_unlimited_on_purpose(self, key: str) -> bool:
        return self.limit(key) is None and not self.is_learned(key)

    def shortest(self) -> float | None:
        """The least that may be limited next, whatever begins."""
        keys = {**self._set, **self._policy.given, **self._policy.until_learned, **self._longest}
        return min((limit for key in keys if (limit := self.limit(key)) is not None), default=None)

    def set_by(self, rank: object, timeouts: Mapping[str, float | None]) -> None:
        """What this rank's client worked out, for all ranks. Of several the longest counts, None above all."""
        self._of[rank] = dict(timeouts)
        self._combine()

    def note(self, rank: object, observed: Mapping[str, Observed], now: float) -> None:
        if self._seen.get(rank) == observed and now < self._learned_at + FADED_S:
            return
        self._seen[rank] = observed
        self._learn(now)

    def forget(self, rank: object, now: float) -> None:
        """The rank has ended; what it saw counts on, and fades."""
        if self._of.pop(rank, None) is not None:
            self._combine()
        self.keep(self._seen.pop(rank, {}), now)

    def keep(self, observed: Mapping[str, Observed], now: float) -> None:
        """Intervals of ranks that ended."""
        self._kept.add(observed, now)
        self._learn(now)

    def hear(self, observed: Mapping[str, Observed], now: float) -> None:
        """The longest on all nodes, now; what was heard before fades from now on."""
        self._heard.add(self._elsewhere, now)
        self._elsewhere = dict(observed)
        self._learn(now)

    def observed(self, now: float) -> dict[str, Observed]:
        """Over all ranks of this node."""
        every: dict[str, Observed] = {}
        for seen in (*self._seen.values(), self._kept.left(now)):
            merge(every, seen.items())
        return every

    def news(self, now: float) -> dict[str, float] | None:
        """For the other nodes: what ranks of this one saw, where a limit would change by it. None: nothing new."""
        if not self._policy.learns or now < self._said_at + NEWS_S:
            return None
        own = {key: one.longest_s for key, one in self.observed(now).items() if one.count >= ENOUGH}
        limits = {key: self._by(key, longest) for key, longest in own.items() if key not in self._policy.given}
        if limits.keys() == self._said.keys() and not any(_differ(limits[key], self._said[key]) for key in limits):
            return None
        self._said, self._said_at = limits, now
        return {key: own[key] for key in limits}

    def _combine(self) -> None:
        self._set = {}
        for timeouts in self._of.values():
            for key, timeout in timeouts.items():
                before = self._set.get(key, 0.0)
                self._set[key] = None if timeout is None or before is None else max(timeout, before)

    def _learn(self, now: float) -> None:
        if self._policy.learns:
            self._learned_at = now
            every = self.observed(now)
            for heard in (self._elsewhere, self._heard.left(now)):
                merge(every, heard.items())
            self._longest = {key: one.longest_s for key, one in every.items() if one.count >= ENOUGH}


def merge(into: dict[str, Observed], more: Iterable[tuple[str, Observed]]) -> None:
    """The maximum of both in every place."""
    for key, one in more:
        before = into.get(key)
        if before is None:
            into[key] = one
        else:
            into[key] = Observed(max(one.count, before.count), max(one.longest_s, before.longest_s))


def _differ(one: float, other: float) -> bool:
    return abs(one - other) > NEWS_SHARE * max(one, other)


def faded(longest_s: float, after_s: float) -> float:
    """What is left of an interval's claim `after_s` later."""
    if longest_s <= 0.0:
        return 0.0
    return float(longest_s * 0.5 ** max(after_s / (HALF_LIFE * longest_s), 0.0))
