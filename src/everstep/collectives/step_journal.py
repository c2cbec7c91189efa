"""Every reduction of one step, in order, with what it needs to be issued again (DESIGN 4.3, "step journal").

A failure's REDUCE makes each survivor issue its own journal again from the start in the new group: operations match by
order, so gradients and a script's own allreduce calls are covered alike, however far each member had come.
"""

from collections.abc import Callable
from typing import Protocol

import torch

from everstep.collectives.process_group import ReconfigurableProcessGroup, ReduceOp, Work
from everstep.core.types import Quorum, QuorumId


class Reduction(Protocol):
    """One operation of the step. It keeps a copy of its input, so that `issue` may be called again."""

    def issue(self, group: ReconfigurableProcessGroup, quorum: Quorum) -> Work:
        """Hand the input to the group; raises StepInterrupted."""

    def finish(self) -> None:
        """The work ended well: put the result where it belongs."""


class TensorReduction:
    """A script's own allreduce: the result replaces the tensor's content. `AVG` divides the sum by the members."""

    def __init__(self, tensor: torch.Tensor, op: ReduceOp, is_average: bool) -> None:
        self._tensor = tensor
        self._input = tensor.detach().clone(memory_format=torch.contiguous_format)
        self._buffer = torch.empty_like(self._input)
        self._work: Work | None = None
        self._op = op
        self._is_average = is_average
        self._size = 1

    def issue(self, group: ReconfigurableProcessGroup, quorum: Quorum) -> Work:
        if self._work is not None and not self._work.is_completed():  # given up, and the buffer with it
            self._buffer = torch.empty_like(self._input)
        self._buffer.copy_(self._input)
        self._size = len(quorum.members)
        self._work = group.allreduce(self._buffer, self._op)
        return self._work

    def finish(self) -> None:
        with torch.no_grad():
            self._tensor.copy_(self._buffer)
            if self._is_average:
                self._tensor.div_(self._size)


class StepJournal:
    """The training thread's. `issued_in` is the quorum whose group the works belong to."""

    def __init__(self) -> None:
        self.reductions: list[Reduction] = []
        self.issued_in: QuorumId | None = None
        self.replays = 0
        self._works: list[Work] = []
        self._finished = 0

    def __len__(self) -> int:
        return len(self.reductions)

    @property
    def is_finished(self) -> bool:
        return self._finished == len(self.reductions)

    def append(self, reduction: Reduction) -> None:
        self.reductions.append(reduction)

    def enter(self, quorum: QuorumId) -> None:
        """From here on works belong to this quorum; in a new one every reduction is issued again."""
        if self.issued_in == quorum:
            return
        if self._works:
            self.replays += 1
        self.issued_in = quorum
        self._works.clear()
        self._finished = 0

    def issue_pending(self, group: ReconfigurableProcessGroup, quorum: Quorum) -> None:
        while len(self._works) < len(self.reductions):
            self._works.append(self.reductions[len(self._works)].issue(group, quorum))

    def wait(self, until: Callable[[], bool] | None = None) -> None:
        """Wait for the works in order and put their results in place; raises StepInterrupted."""
        while self._finished < len(self._works) and not (until is not None and until()):
            self._works[self._finished].wait()
            self.reductions[self._finished].finish()
            self._finished += 1

    def position(self, reduction: Reduction) -> int:
        return self.reductions.index(reduction)

    def has_finished(self, position: int) -> bool:
        return position < self._finished

    def clear(self) -> None:
        self.reductions.clear()
        self._works.clear()
        self.issued_in = None
        self._finished = 0
        self.replays = 0
