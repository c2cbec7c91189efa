"""The step header: by which every member learns who put which samples into the step.

Each member fills one row of a small matrix of integers and leaves the others zero; the sum is everybody's rows. Where
the step's first reduction is a bucket of gradients the rows ride at its end, as floats that hold 21 bits each exactly;
otherwise they are a reduction of their own. Their digest makes the lineage depend on the samples (DESIGN 4.1).
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch

from everstep.collectives.process_group import ReconfigurableProcessGroup, ReduceOp, Work
from everstep.core.types import MemberId, Quorum, RemoteProtocolError

LIMB_BITS = 21  # exact in float32, whose integers reach 2**24
_LIMBS = 3
_LIMB_MASK = (1 << LIMB_BITS) - 1


@dataclasses.dataclass(frozen=True)
class Contribution:
    """What one member puts into a step. `digest` is of its sample ids; the rest is where its sampler drew them."""

    samples: int = 0
    digest: int = 0  # 63 bits
    slot: int = 0
    slots: int = 0  # 0: it does not draw from a DistributedSampler
    draws: int = 0
    batch_size: int = 0

    @property
    def columns(self) -> tuple[int, ...]:
        return self.samples, self.digest, self.slot, self.slots, self.draws, self.batch_size


_COLUMNS = 1 + len(dataclasses.fields(Contribution))  # the first says that the member participates
ROW_NUMBERS = _COLUMNS * _LIMBS


@runtime_checkable
class HeaderCarrier(Protocol):
    """A reduction with room for the header's rows."""

    def carry(self, header: "StepHeader") -> bool:
        """Take it along; False when its numbers would not survive."""


class StepHeader:
    """Everybody's contributions; by itself a Reduction (collectives/step_journal.py)."""

    def __init__(self, own: Contribution) -> None:
        self._own = _limbs(1, *own.columns)
        self._rows = torch.zeros(0, dtype=torch.int64)
        self._members: tuple[MemberId, ...] = ()
        self.contributions: dict[MemberId, Contribution] = {}  # in rank order, once reduced
        self._content = b""

    # ---- riding on a bucket

    def write(self, room: torch.Tensor, quorum: Quorum, rank: int) -> None:
        """`room` has ROW_NUMBERS elements a member."""
        self._members = quorum.member_ids
        room.zero_()
        room[rank * ROW_NUMBERS : (rank + 1) * ROW_NUMBERS] = torch.tensor(self._own, dtype=room.dtype)

    def read(self, room: torch.Tensor) -> None:
        self._take(room.tolist())

    # ---- as a reduction of its own

    def issue(self, group: ReconfigurableProcessGroup, quorum: Quorum) -> Work:
        self._rows = torch.empty(len(quorum.members) * ROW_NUMBERS, dtype=torch.int64)
        self.write(self._rows, quorum, group.rank)
        return group.allreduce(self._rows, ReduceOp.SUM)

    def finish(self) -> None:
        self._take(self._rows.tolist())

    # ---- results

    def digest(self, reductions: int) -> bytes:
        """Over all rows, and how many reductions the step has: members that issued more or fewer hold other results."""
        return hashlib.blake2b(self._content + reductions.to_bytes(8, "little"), digest_size=16).digest()

    def shares(self) -> bytes:
        """Who drew how much, without which samples: all ranks of one group must say the same."""
        text = [f"{member}:{c.slots}:{c.draws}:{c.batch_size}" for member, c in self.contributions.items()]
        return hashlib.blake2b("\n".join(text).encode(), digest_size=8).digest()

    def _take(self, found: Sequence[float]) -> None:
        if not all(0 <= number <= _LIMB_MASK for number in found):  # nan is not
            raise RemoteProtocolError("the step header's sum holds numbers that no member writes")
        numbers = list(map(int, found))
        self.contributions = {}
        for rank, member in enumerate(self._members):
            row = numbers[rank * ROW_NUMBERS : (rank + 1) * ROW_NUMBERS]
            participates, *columns = (_joined(row[i : i + _LIMBS]) for i in range(0, ROW_NUMBERS, _LIMBS))
            if participates:
                self.contributions[member] = Contribution(*columns)
        self._content = b"".join(number.to_bytes(8, "little") for number in numbers)


def _limbs(*columns: int) -> list[int]:
    return [column >> shift & _LIMB_MASK for column in columns for shift in range(0, LIMB_BITS * _LIMBS, LIMB_BITS)]


def _joined(limbs: Sequence[int]) -> int:
    return sum(limb << LIMB_BITS * position for position, limb in enumerate(limbs))
