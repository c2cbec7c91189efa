"""The step header: the step's first reduction, by which every member learns who put in which samples.

Each member fills one row of a small integer matrix and leaves the others zero; the sum is everybody's rows. It travels
while the backward pass still computes. Its digest makes the lineage depend on the samples (DESIGN 4.1).
"""

import dataclasses
import hashlib

import torch

from everstep.collectives.process_group import ReconfigurableProcessGroup, ReduceOp, Work
from everstep.core.types import MemberId, Quorum

_COLUMNS = 7  # participates, samples, digest, slot, slots, draws, batch size


@dataclasses.dataclass(frozen=True)
class Contribution:
    """What one member puts into a step. `digest` is of its sample ids; the rest is where its sampler drew them."""

    samples: int = 0
    digest: int = 0  # 63 bits
    slot: int = 0
    slots: int = 0  # 0: it does not draw from a DistributedSampler
    draws: int = 0
    batch_size: int = 0


class StepHeader:
    """A Reduction (collectives/step_journal.py) of everybody's contributions."""

    def __init__(self, own: Contribution) -> None:
        self._own = own
        self._rows = torch.zeros((1, _COLUMNS), dtype=torch.int64)
        self._members: tuple[MemberId, ...] = ()

    def issue(self, group: ReconfigurableProcessGroup, quorum: Quorum) -> Work:
        self._members = quorum.member_ids
        self._rows = torch.zeros((len(self._members), _COLUMNS), dtype=torch.int64)
        self._rows[group.rank] = torch.tensor([1, *dataclasses.astuple(self._own)], dtype=torch.int64)
        return group.allreduce(self._rows, ReduceOp.SUM)

    def finish(self) -> None:
        pass

    @property
    def contributions(self) -> dict[MemberId, Contribution]:
        """Everybody who put something in, in rank order."""
        found = {}
        for member, row in zip(self._members, self._rows.tolist(), strict=True):
            if row[0]:
                found[member] = Contribution(*row[1:])
        return found

    def digest(self, reductions: int) -> bytes:
        """Over all rows, and how many reductions the step has: members that issued more or fewer hold other results."""
        content = self._rows.numpy().tobytes() + reductions.to_bytes(8, "little")
        return hashlib.blake2b(content, digest_size=16).digest()
