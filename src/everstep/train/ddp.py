"""Data parallelism over the replica groups of a Manager."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from everstep.collectives.torch_private import queue_backward_callback
from everstep.errors import ConfigError
from everstep.train.buckets import Bucket, BufferBucket, make_buckets
from everstep.train.manager import Manager


class DistributedDataParallel(torch.nn.Module):
    """Wraps a module; when `backward()` returns, the gradients are the average over the participants, complete.

    Buckets are reduced while the backward pass still runs. Parameters that no member used keep `.grad = None`; buffers
    (BatchNorm's statistics) are averaged and take effect when the step commits. The module's state is registered with
    the manager as `name`, so that joiners recover it. Use it on the thread that made it.

    Sparse gradients are reduced as dense ones. Raises ConfigError for a module with nothing to train.
    """

    def __init__(self, manager: Manager, module: torch.nn.Module, *, name: str = "model") -> None:
        super().__init__()
        self.module = module
        self._manager = manager
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if not parameters:
            raise ConfigError("the module has no parameter that requires a gradient; there is nothing to train")
        if manager.backend == "gloo" and any(parameter.is_cuda for parameter in parameters):
            raise ConfigError("the model is on a GPU, and gloo reduces on the CPU: use Manager(backend='nccl')")
        self._buckets = make_buckets(parameters)
        self._buffer_buckets = _make_buffer_buckets(module)
        self._launched = 0
        self._is_syncing = True
        self._is_queued = False
        self._rounds = 0  # of reductions in this step
        self._has_forward = False
        manager.register_state_dict_fn(name, self._load, module.state_dict)
        manager.add_reducer(self)
        for bucket in self._buckets:
            for index, parameter in enumerate(bucket.parameters):
                parameter.register_post_accumulate_grad_hook(self._hook(bucket, index))  # type: ignore[no-untyped-call]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and self.training:
            self._manager.start_step()
            if not self._has_forward:
                self._has_forward = True
                for bucket in self._buffer_buckets:
                    bucket.remember()
        return self.module(*args, **kwargs)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within it, backward passes only accumulate; the next one outside reduces the sum."""
        before, self._is_syncing = self._is_syncing, False
        try:
            yield
        finally:
            self._is_syncing = before

    # ---- what the manager calls

    def flush(self) -> None:
        """Before a vote: a member whose step had no backward pass still issues what the others issue."""
        if self._rounds == 0:
            self._begin_round()
            self._finish_round()

    def objection(self) -> str:
        """Why the reductions must not be repeated as they are, or "". Called when they were repeated."""
        if any(bucket.is_chained for bucket in self._buckets):
            return (
                "a failure made the reduction of this step be repeated, but it had reduced the same gradients twice; "
                "accumulate under no_sync() instead"
            )
        if any(bucket.was_changed for bucket in self._buckets):
            return (
                "a failure made the reduction of this step be repeated, but the script had changed .grad by hand; do "
                "that in Optimizer(before_step=...), which runs again"
            )
        return ""

    def settle(self) -> None:
        """`before_step` has run: what it did to the gradients is no change by hand."""
        for bucket in self._buckets:
            bucket.settle()

    def step_decided(self, is_committed: bool) -> None:
        if not is_committed and self._has_forward:
            for buffers in self._buffer_buckets:
                buffers.restore()
        for bucket in self._buckets:
            bucket.reset()
        self._rounds = 0
        self._launched = 0
        self._has_forward = False

    # ---- hooks, on the training thread within backward()

    def _hook(self, bucket: Bucket, index: int) -> Any:
        def keep(_: torch.Tensor) -> None:
            if not self._is_syncing:
                return
            if not self._is_queued:
                self._is_queued = True
                self._begin_round()
                queue_backward_callback(self._backward_ended)
            bucket.keep(index)
            self._launch_ready()

        return keep

    def _launch_ready(self) -> None:
        while self._launched < len(self._buckets) and self._buckets[self._launched].is_ready:
            self._manager.reduce(self._buckets[self._launched])
            self._launched += 1

    def _backward_ended(self) -> None:
        self._is_queued = False
        self._finish_round()
        self._manager.complete_reductions()

    def _begin_round(self) -> None:
        self._launched = 0
        for bucket in self._buckets:
            bucket.begin()

    def _finish_round(self) -> None:
        for bucket in self._buckets[self._launched :]:
            bucket.fill_missing()
        self._launch_ready()
        for buffers in self._buffer_buckets:
            buffers.keep()
            self._manager.reduce(buffers)
        self._launched = 0
        self._rounds += 1

    def _load(self, state: dict[str, Any]) -> object:
        return self.module.load_state_dict(state)


def _make_buffer_buckets(module: torch.nn.Module) -> list[BufferBucket]:
    dtypes = list(dict.fromkeys(buffer.dtype for buffer in module.buffers()))
    return [BufferBucket(_BuffersOf(module, dtype), dtype) for dtype in dtypes]


class _BuffersOf:
    """The module's buffers of one dtype, looked up anew: modules replace their buffers at times."""

    def __init__(self, module: torch.nn.Module, dtype: torch.dtype) -> None:
        self._module = module
        self._dtype = dtype

    def __call__(self) -> Sequence[torch.Tensor]:
        return [buffer for buffer in self._module.buffers() if buffer.dtype == self._dtype]
