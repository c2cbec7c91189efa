"""How often the workers of a node may be started again, and how soon.

`max_restarts` counts restarts without progress between them. An attempt made progress when it ran for `progress_s`, or
when one of its processes committed `STEPS_OF_PROGRESS` steps through Everstep (the measure of core/crash_loop.py, which
deals with a group that dies at one step again and again even so). Then everything is given back.

Apart from that, a group is given up whose attempts end, `no_progress_max` times in a row, without a step beyond the
furthest that an earlier one reached. This is counted only once an attempt has said how far it came.

The first restart is immediate. Attempts that end within `quick_s` of their start, one after the other, are followed by
pauses that double, whatever the budget: a broken node must not spin.
"""

import dataclasses

from everstep.core.crash_loop import STEPS_OF_PROGRESS


@dataclasses.dataclass(frozen=True, kw_only=True)
class BudgetPolicy:
    """`max_restarts` 0: never again, progress or not."""

    max_restarts: int = 0
    pause_s: float = 1.0
    pause_max_s: float = 60.0
    quick_s: float = 10.0
    progress_s: float = 3600.0
    no_progress_max: int = 0  # 0: such a group is not given up for that


@dataclasses.dataclass(frozen=True)
class Granted:
    """Start again, `pause_s` from now."""

    pause_s: float


@dataclasses.dataclass(frozen=True)
class Exhausted:
    """No more; `why` is for people. `was_given`: there was a budget, and it did not help."""

    why: str
    was_given: bool


class RestartBudget:
    """One node's, over all its groups. The groups' restarts are numbers that all nodes of a group agree on."""

    def __init__(self, policy: BudgetPolicy) -> None:
        self._policy = policy
        self._restarts: dict[str, int] = {}  # of each group, as agreed last
        self._forgiven: dict[str, int] = {}  # those before its last progress
        self._furthest: dict[str, int] = {}  # step that an attempt of each group reached
        self._idle: dict[str, int] = {}  # attempts in a row that got no further
        self._quick = 0  # attempts in a row that ended soon after their start

    def agreed(self, group: str, restarts: int) -> None:
        """The nodes of a new round have had so many restarts: the most that any of them knows of."""
        self._restarts[group] = max(restarts, self.restarts(group))

    def restarts(self, group: str) -> int:
        return self._restarts.get(group, 0)

    @property
    def used(self) -> int:
        return sum(count - self._forgiven.get(group, 0) for group, count in self._restarts.items())

    def ask(self, group: str, ran_s: float, steps: int, reached: int = 0) -> Granted | Exhausted:
        """An attempt of this group has failed after `ran_s`, having committed `steps` steps, the last with the number
        `reached`."""
        policy = self._policy
        if (given_up := self._no_progress(group, reached)) is not None:
            return given_up
        if ran_s >= policy.progress_s or steps >= STEPS_OF_PROGRESS:
            self._forgiven = dict(self._restarts)
            self._quick = 0
        if self.used >= policy.max_restarts:
            was_given = policy.max_restarts > 0
            why = (
                f"{self.used} of {policy.max_restarts} restarts are used up"
                if was_given
                else "no restarts (--max-restarts)"
            )
            return Exhausted(why, was_given)
        self._quick = self._quick + 1 if ran_s < policy.quick_s else 0
        self._restarts[group] = self.restarts(group) + 1
        doublings = self._quick - 2
        return Granted(min(policy.pause_max_s, policy.pause_s * 2.0 ** min(doublings, 30)) if doublings >= 0 else 0.0)

    def _no_progress(self, group: str, reached: int) -> Exhausted | None:
        furthest = self._furthest.get(group, 0)
        if reached > furthest:
            self._furthest[group], self._idle[group] = reached, 0
            return None
        if furthest == 0:
            return None  # nobody counts its steps
        self._idle[group] = self._idle.get(group, 0) + 1
        if not 0 < self._policy.no_progress_max <= self._idle[group]:
            return None
        return Exhausted(f"{self._idle[group]} attempts in a row ended without passing step {furthest}", True)
