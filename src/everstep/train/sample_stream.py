"""Which samples are committed, and which a member takes next: pure bookkeeping of DistributedSampler.

Samples stand in one endless line of positions, epoch after epoch. A step takes blocks from the uncommitted ones in
order: draw j of the member in slot s takes block `j * slots + s`. A commit names the blocks that counted; what a dead
member's blocks held is drawn again first. So the line is a function of the seed and of what was committed, alone.
"""

import dataclasses
from collections.abc import Iterable, Sequence


@dataclasses.dataclass(frozen=True)
class Block:
    """Blocks are numbered within a step."""

    number: int
    positions: tuple[int, ...]


class SampleStream:
    """Positions before `cursor` are committed, but for `holes` (ascending)."""

    def __init__(self) -> None:
        self.cursor = 0
        self.holes: list[int] = []

    @property
    def first_uncommitted(self) -> int:
        return self.holes[0] if self.holes else self.cursor

    def block(self, number: int, batch_size: int) -> Block:
        start, end = number * batch_size, (number + 1) * batch_size
        holes = len(self.holes)
        positions = self.holes[start:end]
        positions += range(self.cursor + max(0, start - holes), self.cursor + max(0, end - holes))
        return Block(number, tuple(positions))

    def commit(self, numbers: Iterable[int], batch_size: int) -> None:
        """These blocks of the step counted; those between them did not."""
        wanted = sorted(numbers)
        if not wanted:
            return
        taken: dict[int, None] = {}
        for number in wanted:
            taken.update(dict.fromkeys(self.block(number, batch_size).positions))
        reached = max(self.cursor, max(taken) + 1)
        candidates = [*self.holes, *range(self.cursor, reached)]
        self.holes = [position for position in candidates if position not in taken]
        self.cursor = reached

    def skip_to(self, position: int) -> None:
        """Give up what is uncommitted before `position`."""
        self.holes = [hole for hole in self.holes if hole >= position]
        self.cursor = max(self.cursor, position)


def slots_of(last_contributors: Sequence[str], members: Sequence[str]) -> list[str]:
    """Who draws in which slot: the last step's contributors in their order, then who is new.

    Members may know of a death or of a joiner at different times; a slot of the last contributors never moves, so what
    they draw never overlaps.
    """
    return [*last_contributors, *(member for member in members if member not in last_contributors)]
