"""How long a rank may take: what was given, what its client worked out, what was learned from all ranks.

A learned limit is a safety factor times the longest interval seen lately on any rank. "Lately": an interval counts for
half after a hundred times its own length, so a phase that takes half a percent of a job's time stays within its limit
for ever, and one slow step is forgotten. The safety factor is from NVIDIA's resiliency extension, the forgetting ours.
"""

import dataclasses
from collections.abc import Iterable, Mapping

HEARTBEAT = "<heartbeat>"  # keys beside the sections' names, which may not begin with <
OUTSIDE = "<outside>"  # of every section

WARM_UP = 3  # first intervals of each kind in a process: compilation, caches, first allocations
ENOUGH = 16  # intervals after them, on one rank, before a limit is learned without a call
HALF_LIFE = 100.0  # times its own length


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


class Limits:
    """Of one job on one node. `limit` is asked often: O(1) after `note`."""

    def __init__(self, policy: LimitPolicy) -> None:
        self._policy = policy
        self._set: dict[str, float | None] = {}
        self._of: dict[object, dict[str, float | None]] = {}
        self._seen: dict[object, Mapping[str, Observed]] = {}
        self._kept: dict[str, tuple[Observed, float]] = {}  # of ranks that ended, of other nodes, of an earlier run
        self._longest: dict[str, float] = {}  # of keys that are learned

    def limit(self, key: str, is_mixed: bool = False) -> float | None:
        if key in self._set:
            return self._set[key]
        if key in self._policy.given:
            return self._policy.given[key]
        longest = self._longest.get(key)
        if longest is None:
            return self._policy.until_learned.get(key)
        is_mixed = is_mixed or key in (HEARTBEAT, OUTSIDE)
        floor = self._policy.mixed_floor_s if is_mixed else self._policy.floor_s
        return max(floor, self._policy.safety_factor * longest)

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
        if self._seen.get(rank) == observed:
            return
        self._seen[rank] = observed
        self._learn(now)

    def forget(self, rank: object, now: float) -> None:
        """The rank has ended; what it saw counts on, and fades."""
        if self._of.pop(rank, None) is not None:
            self._combine()
        self.keep(self._seen.pop(rank, {}), now)

    def keep(self, observed: Mapping[str, Observed], now: float) -> None:
        """Intervals from elsewhere: another node, an earlier process."""
        for key, one in observed.items():
            before = self._kept.get(key)
            count, longest = one.count, one.longest_s
            if before is not None:
                count = max(count, before[0].count)
                longest = max(longest, faded(before[0].longest_s, now - before[1]))
            self._kept[key] = (Observed(count, longest), now)
        self._learn(now)

    def observed(self, now: float) -> dict[str, Observed]:
        """Over all ranks: for other nodes, and for the next process."""
        every: dict[str, Observed] = {}
        kept = {key: Observed(one.count, faded(one.longest_s, now - at)) for key, (one, at) in self._kept.items()}
        for seen in (*self._seen.values(), kept):
            merge(every, seen.items())
        return every

    def _combine(self) -> None:
        self._set = {}
        for timeouts in self._of.values():
            for key, timeout in timeouts.items():
                before = self._set.get(key, 0.0)
                self._set[key] = None if timeout is None or before is None else max(timeout, before)

    def _learn(self, now: float) -> None:
        if self._policy.learns:
            every = self.observed(now)
            self._longest = {key: one.longest_s for key, one in every.items() if one.count >= ENOUGH}


def merge(into: dict[str, Observed], more: Iterable[tuple[str, Observed]]) -> None:
    """The maximum of both in every place."""
    for key, one in more:
        before = into.get(key)
        if before is None:
            into[key] = one
        else:
            into[key] = Observed(max(one.count, before.count), max(one.longest_s, before.longest_s))


def faded(longest_s: float, after_s: float) -> float:
    """What is left of an interval's claim `after_s` later."""
    if longest_s <= 0.0:
        return 0.0
    return float(longest_s * 0.5 ** max(after_s / (HALF_LIFE * longest_s), 0.0))
