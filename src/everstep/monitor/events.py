"""What the monitor tells its agent."""

import dataclasses

from everstep.monitor.control import WorkloadAction


@dataclasses.dataclass(frozen=True)
class RankEvent:
    """`rank` is the number that `add_rank` was given."""

    rank: int
    detail: str


@dataclasses.dataclass(frozen=True)
class RankSuspected(RankEvent):
    """Past its soft deadline."""

    section: str
    age_s: float


@dataclasses.dataclass(frozen=True)
class RankCleared(RankEvent):
    """It moves on."""


@dataclasses.dataclass(frozen=True)
class RankUnlimited(RankEvent):
    """Nothing limits it: to be said once."""


@dataclasses.dataclass(frozen=True)
class RankHung(RankEvent):
    """Past its hard deadline; the termination signal is on its way to its process group.

    `culprit`: the rank that the others wait for, where it can be told; `waiting`: who waits, and where; `stacks`: of
    this rank (and its children) and of others that were looked at.
    """

    mechanism: str
    section: str
    age_s: float
    limit_s: float
    culprit: int | None
    waiting: tuple[tuple[int, str], ...]
    stacks: dict[int, str]
    signal: int
    names: dict[int, str]

    def report(self) -> str:
        """For the rank's log."""
        name = self.names[self.rank]
        lines = [f"everstep: {name} hangs: {self.detail}"]
        if self.culprit == self.rank:
            lines.append(f"everstep: the others wait for {name}")
        elif self.culprit is not None:
            lines.append(f"everstep: it waits for {self.names[self.culprit]}, which is where the trouble is")
        lines += [f"everstep: {self.names[rank]} waits in {where}" for rank, where in self.waiting]
        if not self.stacks.get(self.rank):
            lines.append("everstep: no stacks: its process could not show them (it is not Python, or just begins)")
        lines += [
            f"everstep: stacks of {self.names[rank]}:\n{text.rstrip()}" for rank, text in self.stacks.items() if text
        ]
        return "\n".join(lines) + "\n"


@dataclasses.dataclass(frozen=True)
class ControlRequested(RankEvent):
    """`detail` is the reason that the script gave."""

    action: WorkloadAction


@dataclasses.dataclass(frozen=True)
class IntervalsNews(RankEvent):
    """What ranks of this node saw, for the other nodes. `rank` is -1."""

    longest: dict[str, float]


@dataclasses.dataclass(frozen=True)
class MonitorFailed(RankEvent):
    """A bug of ours: nothing is watched any more. `rank` is -1."""
