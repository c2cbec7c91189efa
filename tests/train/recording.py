"""What a training process records of itself for tests/checkers: every draw before it counts, every step as it ended."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import xxhash

import everstep as es
from everstep.core.types import Lineage, LineageEntry
from everstep.train.header import Contribution

Record = dict[str, Any]


class HistoryFile:
    """JSON lines. Each is handed to the kernel as a whole, so that a SIGKILL takes none back."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def write(self, record: Record) -> None:
        os.write(self._fd, json.dumps(record).encode() + b"\n")

    def close(self) -> None:
        os.close(self._fd)


class RecordingSampler(es.DistributedSampler):
    """Tells what it drew when the step's first reduction is about to carry it to the others, and not later."""

    def __init__(self, manager: es.Manager, dataset: Any, *, batch_size: int, report: Callable[[Record], None]) -> None:
        super().__init__(manager, dataset, batch_size=batch_size)
        self._report = report

    def positions(self) -> list[int]:
        """In the endless line of epochs, of what the step under way holds so far."""
        return [position for block in self._used for position in block.positions]

    def contribution(self) -> Contribution:
        contribution = super().contribution()
        stepper, presence = self._manager._stepper, self._manager._presence
        assert stepper is not None
        assert presence is not None
        batch = stepper._begun.batch if stepper._begun is not None else None
        with presence.changed:
            member, evictions = str(presence.replica.member), presence.replica.evictions
        if batch is not None and batch.evictions == evictions:  # else it is nobody's: that member is out already
            positions = self.positions()
            draw = {"event": "draw", "member": member, "step": batch.step + 1, "attempt": batch.attempt}
            draw |= {"positions": positions, "ids": [self._index(position) for position in positions]}
            self._report(draw | {"columns": list(contribution.columns)})
        return contribution


class Commits:
    """What the reduction at hand comes to if it commits: the lineage's entry, and the lineage with it."""

    def __init__(self, manager: es.Manager) -> None:
        self._manager = manager
        self._tag: LineageEntry | None = None
        self._lineage: Lineage | None = None

    def note(self) -> None:
        """Belongs into Optimizer(before_step): that runs after each reduction, again when it is repeated."""
        presence = self._manager._presence
        assert presence is not None
        with presence.changed:
            self._tag, lineage = presence.replica.tag, presence.replica.lineage
        self._lineage = lineage.extended(self._tag) if lineage is not None and self._tag is not None else None

    def record(self, step: int) -> Record:
        """After that step has committed: what this member holds now, unless it was evicted a moment ago."""
        presence = self._manager._presence
        assert presence is not None
        with presence.changed:
            lineage, member = presence.replica.lineage, str(presence.replica.member)
        if lineage is None or lineage.step != step:
            lineage = self._lineage
        return {
            "lineage": lineage_text(lineage) if lineage is not None else "",
            "member": member,
            "entry": entry_record(self._tag) if self._tag is not None else None,
        }


def entry_record(entry: LineageEntry) -> Record:
    names = {"step": entry.step, "attempt": entry.attempt, "quorum": str(entry.quorum_id)}
    return {**names, "contributors": entry.contributors, "samples": entry.samples.hex()}


def lineage_text(lineage: Lineage) -> str:
    """With the whole digest."""
    return f"{lineage.history}:{lineage.step}:{lineage.digest.hex()}"


def digest_of(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Of parameters, buffers, gradients and the optimizer's state, all bits of them."""
    digest = xxhash.xxh3_64()
    parameters = list(net.parameters())
    momenta = [optimizer.state[p].get("momentum_buffer") for p in parameters if p in optimizer.state]
    gradients = [p.grad for p in parameters]
    for tensor in [*net.state_dict().values(), *gradients, *momenta]:
        if tensor is not None:
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
