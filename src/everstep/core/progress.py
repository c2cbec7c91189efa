"""Who of a quorum is stuck: alive on its link, while its training thread stands still and all the others wait for it.

Heartbeats say what a member's training thread is doing and for how long. One that computes is given ten times the
longest that any member computed lately between two collectives, counted from when the last of the others began to wait;
one that has not made enough steps yet (imports, compilation, the first batches) gets a long fixed time. Whoever has a
section open is left alone, and so is a majority.

The limit's idea is from adaptive accrual detectors and NVIDIA's resiliency extension (learned section timeouts), the
judgement by others' waiting is our own: a job whose members all compute for an hour is well.
"""

import dataclasses

from everstep.core.messages import Activity, Heartbeat
from everstep.core.types import MemberId, Quorum

FACTOR = 10.0
STEPS_ENOUGH = 10  # of one process, before its limit is the learned one
LAGGARDS_MAX = 16  # with more members still computing nobody is being waited for


@dataclasses.dataclass(frozen=True, kw_only=True)
class StuckPolicy:
    """`timeout_s` replaces the learned limit; `initial_s` holds for a process's first steps."""

    timeout_s: float | None = None
    floor_s: float = 10.0
    initial_s: float = 300.0


@dataclasses.dataclass(frozen=True)
class Stuck:
    member: MemberId
    detail: str


@dataclasses.dataclass
class _Row:
    beat: Heartbeat
    since: float  # on the lighthouse's clock: when its training thread last moved on
    asked_at: float = -1.0


class ProgressJudge:
    """Fed every heartbeat of the current quorum's members; O(1) each, and O(LAGGARDS_MAX) a judgement."""

    def __init__(self, policy: StuckPolicy) -> None:
        self._policy = policy
        self._laggards: dict[MemberId, _Row] = {}
        self._waiting: dict[MemberId, None] = {}
        self._quorum: Quorum | None = None
        self._waited_since = 0.0  # when the last one to begin to wait did so
        self._longest: dict[MemberId, float] = {}
        self._longest_s = 0.0

    def beat(self, member: MemberId, beat: Heartbeat, now: float) -> None:
        if beat.activity is Activity.WAITING:
            self._laggards.pop(member, None)
            self._waiting[member] = None
            self._waited_since = max(self._waited_since, now - beat.activity_s)
        else:
            self._waiting.pop(member, None)
            since = now - beat.activity_s
            row = self._laggards.get(member)
            if row is None or abs(row.since - since) > 0.05 or beat.activity is not row.beat.activity:
                self._laggards[member] = _Row(beat, since)
            else:
                row.beat = beat
        if beat.steps >= STEPS_ENOUGH:
            self._learn(member, beat.longest_s)

    def forget(self, member: MemberId) -> None:
        self._laggards.pop(member, None)
        self._waiting.pop(member, None)
        if self._longest.pop(member, None) == self._longest_s:
            self._longest_s = max(self._longest.values(), default=0.0)

    def keep_only(self, quorum: Quorum | None) -> None:
        """Forget whoever is not in this quorum. Cheap while it is the one that it was."""
        if quorum is self._quorum:
            return
        self._quorum = quorum
        for member in [m for m in {**self._longest, **self._laggards, **self._waiting} if not _is_in(quorum, m)]:
            self.forget(member)

    def next_deadline(self) -> float | None:
        """When somebody's heartbeat is wanted to judge it; None while nobody is being waited for."""
        if not self._are_few():
            return None
        deadlines = []
        for row in self._laggards.values():
            if row.beat.activity is not Activity.COMPUTING or row.beat.section:
                return None
            if row.asked_at < 0:
                deadlines.append(max(row.since, self._waited_since) + self.limit_of(row.beat))
        return max(deadlines, default=None)

    def ask(self, now: float) -> list[MemberId]:
        """Members whose time is up by what is known: their answer, a heartbeat, is judged."""
        deadline = self.next_deadline()
        if deadline is None or now < deadline:
            return []
        for row in self._laggards.values():
            row.asked_at = now
        return list(self._laggards)

    def verdict(self, member: MemberId, now: float) -> Stuck | None:
        """After `member`'s heartbeat: whether it is stuck. All others wait, or are over their own limit."""
        row = self._laggards.get(member)
        if row is None or row.asked_at < 0 or not self._are_few() or now < self._waited_since + self.limit_of(row.beat):
            return None
        if any(not self._is_over(other) for other in self._laggards.values()):
            return None
        limit = self.limit_of(row.beat)
        return Stuck(member, f"no progress for {row.beat.activity_s:.1f} s (limit {limit:.1f} s) while others wait")

    def _are_few(self) -> bool:
        """A majority is never the one that is stuck: what all do for long, they do on purpose."""
        return 0 < len(self._laggards) <= min(LAGGARDS_MAX, len(self._waiting))

    def limit_of(self, beat: Heartbeat) -> float:
        policy = self._policy
        usual = policy.timeout_s or max(policy.floor_s, FACTOR * self._longest_s)
        return usual if beat.steps >= STEPS_ENOUGH else max(policy.initial_s, usual)

    def _is_over(self, row: _Row) -> bool:
        beat = row.beat
        is_computing = beat.activity is Activity.COMPUTING and not beat.section
        return is_computing and beat.activity_s >= self.limit_of(beat)

    def _learn(self, member: MemberId, longest_s: float) -> None:
        before = self._longest.get(member, 0.0)
        self._longest[member] = longest_s
        if longest_s >= self._longest_s:
            self._longest_s = longest_s
        elif before == self._longest_s:
            self._longest_s = max(self._longest.values())


def _is_in(quorum: Quorum | None, member: MemberId) -> bool:
    return quorum is not None and quorum.is_member(member)
