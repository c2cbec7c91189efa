"""Gradient buckets of our own, fixed by parameter order and launched in that order.

torch's Reducer rebuilds its buckets after the first iteration, which a joiner has not had; then members would issue
different operations. These never change, so a joiner's equal the veterans', and a missing gradient costs no search.
"""

from collections.abc import Callable, Sequence

import torch

from everstep.collectives.process_group import ReconfigurableProcessGroup, ReduceOp, Work
from everstep.collectives.torch_private import version_of
from everstep.core.types import Quorum
from everstep.train.header import ROW_NUMBERS, StepHeader

FIRST_BUCKET_BYTES = 1 << 20  # small, so that the first reduction starts early
BUCKET_BYTES = 25 << 20


class Bucket:
    """Some parameters' gradients in one flat buffer; a Reduction (collectives/step_journal.py).

    The local gradients stay where autograd put them: they are the kept input of a repeated reduction. The flat buffer
    holds their share of the average, then the average, and the parameters' `.grad` become views of it. One more
    element a parameter counts the members that used it, so that one that nobody used keeps `.grad = None`.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self._header: StepHeader | None = None
        self._lay_out(header_numbers=0)
        self._inputs: list[torch.Tensor | None] = [None] * len(parameters)
        self._missing = len(parameters)
        self._work: Work | None = None  # issued, and not known to have ended
        self._version = -1
        self._is_in_place = False  # the parameters' gradients are this step's average
        self.is_chained = False  # an input holds an average of this very step: it cannot be reduced again
        self.was_changed = False  # the script changed an average that then had to be reduced again

    def _lay_out(self, header_numbers: int) -> None:
        """Allocate the buffer: gradients, use counts, room for the step header."""
        first = self.parameters[0]
        numel = sum(parameter.numel() for parameter in self.parameters)
        counts = len(self.parameters)
        self._flat = torch.zeros(numel + counts + header_numbers, dtype=first.dtype, device=first.device)
        self._views: list[torch.Tensor] = []
        offset = 0
        for parameter in self.parameters:
            self._views.append(self._flat[offset : offset + parameter.numel()].view(parameter.shape))
            offset += parameter.numel()
        self._used = self._flat[offset : offset + counts]
        self._room = self._flat[offset + counts :]

    def _is_held(self) -> bool:
        """An operation that failed, or was given up, may still write to the buffer."""
        return self._work is not None and not self._work.is_completed()

    def _leave_buffer(self, header_numbers: int) -> None:
        """Leave it to that operation, which keeps it alive. Nothing that the script sees lies in it any more."""
        left = self._views
        self._lay_out(header_numbers)
        for parameter, old, new in zip(self.parameters, left, self._views, strict=True):
            if parameter.grad is old:  # an average of before, undefined by now
                parameter.grad = new

    def carry(self, header: StepHeader) -> bool:
        """Let the step header ride along; smaller floats cannot hold its numbers."""
        if self._flat.dtype not in (torch.float32, torch.float64):
            return False
        self._header = header
        return True

    @property
    def is_ready(self) -> bool:
        return self._missing == 0

    def begin(self) -> None:
        """Another backward pass that reduces."""
        self._inputs = [None] * len(self.parameters)
        self._missing = len(self.parameters)

    def keep(self, index: int) -> None:
        """Autograd has finished this parameter's gradient."""
        gradient = self.parameters[index].grad
        assert gradient is not None
        if gradient is self._views[index]:
            self.is_chained = self.is_chained or self._is_in_place
            gradient = gradient.clone()
        elif gradient.is_sparse:
            gradient = gradient.to_dense()
        if self._inputs[index] is None:
            self._missing -= 1
        self._inputs[index] = gradient

    def fill_missing(self) -> None:
        """The backward pass is over: some parameters took no part in it, here, but perhaps in one under no_sync()."""
        for index, parameter in enumerate(self.parameters):
            if self._inputs[index] is None and parameter.grad is not None:
                self.keep(index)
        self._missing = 0

    def issue(self, group: ReconfigurableProcessGroup, quorum: Quorum) -> Work:
        if self._is_in_place and self.is_changed_by_hand():
            self.was_changed = True
        numbers = len(quorum.members) * ROW_NUMBERS if self._header is not None else 0
        if self._is_held():
            self._leave_buffer(numbers)
        elif self._room.numel() != numbers:
            self._lay_out(numbers)
        share = 1.0 / len(quorum.members)
        with torch.no_grad():
            if self._header is not None:
                self._header.write(self._room, quorum, group.rank)
            for index, gradient in enumerate(self._inputs):
                if gradient is None:
                    self._views[index].zero_()
                else:
                    torch.mul(gradient, share, out=self._views[index])
            self._used.fill_(1.0)
            for index, gradient in enumerate(self._inputs):
                if gradient is None:
                    self._used[index] = 0.0
        self._work = group.allreduce(self._flat, ReduceOp.SUM)
        return self._work

    def finish(self) -> None:
        self._work = None
        if self._header is not None:
            self._header.read(self._room)
        is_used = [True] * len(self.parameters)
        if any(gradient is None for gradient in self._inputs):
            is_used = [count > 0 for count in self._used.tolist()]
        for index, parameter in enumerate(self.parameters):
            parameter.grad = self._views[index] if is_used[index] else None
        self._is_in_place = True
        self.settle()

    def settle(self) -> None:
        """The gradients are as we left them; what changes them from here on is the script."""
        self._version = version_of(self._flat)

    def is_changed_by_hand(self) -> bool:
        """Since `settle` somebody replaced or changed a gradient."""
        if version_of(self._flat) != self._version:
            return True
        replaced = (
            parameter.grad is not None and parameter.grad is not view
            for parameter, view in zip(self.parameters, self._views, strict=True)
        )
        return any(replaced)

    def reset(self) -> None:
        """The step is decided: let go of the kept gradients."""
        if self._is_held():
            self._leave_buffer(self._room.numel())
        self._work = None
        self._inputs = [None] * len(self.parameters)
        self._missing = len(self.parameters)
        self._header = None
        self._is_in_place = self.is_chained = self.was_changed = False


def make_buckets(parameters: Sequence[torch.nn.Parameter]) -> list[Bucket]:
    """Last parameters first: their gradients come first. One dtype and device a bucket; same everywhere."""
    buckets: list[list[torch.nn.Parameter]] = []
    open_bucket: dict[tuple[torch.dtype, torch.device], int] = {}
    sizes: list[int] = []
    for parameter in reversed(list(parameters)):
        key = (parameter.dtype, parameter.device)
        limit = FIRST_BUCKET_BYTES if len(buckets) <= 1 else BUCKET_BYTES
        index = open_bucket.get(key)
        if index is None or sizes[index] >= limit:
            index = len(buckets)
            open_bucket[key] = index
            buckets.append([])
            sizes.append(0)
        buckets[index].append(parameter)
        sizes[index] += parameter.numel() * parameter.element_size()
    return [Bucket(members) for members in buckets]


class BufferBucket:
    """The module's buffers (BatchNorm's statistics): averaged over the members, in effect on commit only."""

    def __init__(self, buffers: Callable[[], Sequence[torch.Tensor]], dtype: torch.dtype) -> None:
        self._buffers = buffers
        self._dtype = dtype
        self._committed: list[torch.Tensor] = []
        self._input = torch.empty(0, dtype=dtype)
        self._flat = torch.empty(0, dtype=dtype)

    def remember(self) -> None:
        """These values are what every member has; an aborted step returns to them."""
        self._committed = [buffer.detach().clone() for buffer in self._buffers()]

    def keep(self) -> None:
        self._input = torch.cat([buffer.detach().reshape(-1) for buffer in self._buffers()])

    def issue(self, group: ReconfigurableProcessGroup, quorum: Quorum) -> Work:
        if self._dtype.is_floating_point:
            self._flat = self._input / len(quorum.members)
            return group.allreduce(self._flat, ReduceOp.SUM)
        self._flat = self._input.clone()
        return group.allreduce(self._flat, ReduceOp.MAX)  # counters, masks

    def finish(self) -> None:
        sizes = [buffer.numel() for buffer in self._buffers()]
        self._write(torch.split(self._flat, sizes))

    def restore(self) -> None:
        if self._committed:
            self._write(self._committed)

    def _write(self, values: Sequence[torch.Tensor]) -> None:
        with torch.no_grad():
            for buffer, value in zip(self._buffers(), values, strict=True):
                buffer.copy_(value.view_as(buffer))
