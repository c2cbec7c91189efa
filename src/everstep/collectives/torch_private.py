"""Every name of torch that its documentation does not promise, and why Everstep needs it. Checked with torch 2.13.

- `ProcessGroupGloo`, its `_Options`, `_devices`, `_threads` and `_timeout`: `init_process_group` makes one group per
  process and never gives it up; a quorum needs one at will, on an address of our choice.
- `AllreduceOptions` and the backend's `allreduce([tensor], options)`: the public `all_reduce` wants a registered group
  and costs several times as much per call.
- `ProcessGroupGloo._allgather_base`: gathers into one tensor, without a list of outputs.
- `torch._C._distributed_c10d`: where the type checker finds `TCPStore`, `PrefixStore` and `Store`, which are public but
  re-exported without saying so.
- `Tensor._version`: counts changes in place; the only way to see that a script changed a gradient by hand.
- `Variable._execution_engine.queue_callback`: the only way to run code when `backward()` has computed everything but
  has not returned; torch's own FSDP uses it.
"""

import ctypes
from collections.abc import Callable
from datetime import timedelta
from typing import Protocol, cast

import torch
import torch.distributed
from torch import Tensor
from torch._C import _distributed_c10d as _c10d
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from everstep.collectives.process_group import ReduceOp

__all__ = [
    "GlooDevice",
    "PrefixStore",
    "Store",
    "TCPStore",
    "TorchGloo",
    "TorchWork",
    "allreduce_options",
    "connect_gloo",
    "free_at_last",
    "gather_into",
    "gloo_device",
    "keep_beyond_exit",
    "queue_backward_callback",
    "version_of",
]

_TORCH_REDUCE_OPS = {
    ReduceOp.SUM: _c10d.ReduceOp.SUM,
    ReduceOp.MIN: _c10d.ReduceOp.MIN,
    ReduceOp.MAX: _c10d.ReduceOp.MAX,
}


class TorchWork(Protocol):
    """An operation under way on a backend's thread."""

    def wait(self, timeout: timedelta = ...) -> bool: ...

    def is_completed(self) -> bool: ...


class GlooDevice(Protocol):
    """A listening socket and the thread that serves it and the group's connections."""


class TorchGloo(Protocol):
    """What we call on torch's ProcessGroupGloo."""

    def allreduce(self, tensors: list[Tensor], opts: object) -> TorchWork: ...

    def _allgather_base(self, output: Tensor, source: Tensor) -> TorchWork: ...


def gloo_device(host: str) -> GlooDevice:
    """Listens on `host`, any free port. Not lazy, whatever TORCH_GLOO_LAZY_INIT says: see `connect_gloo`."""
    return cast(GlooDevice, torch.distributed.ProcessGroupGloo.create_device(hostname=host, lazy_init=False))


def connect_gloo(store: Store, rank: int, size: int, device: GlooDevice, timeout_s: float, threads: int) -> TorchGloo:
    """Connect to every other rank now, and return the group; blocks without the GIL, raises RuntimeError.

    A lazy device would connect inside the first operation, where its sockets could not be noted beforehand.
    """
    gloo = torch.distributed.ProcessGroupGloo
    options = gloo._Options()  # type: ignore[attr-defined]  # the stub calls it Options
    options._devices = [device]
    options._timeout = timedelta(seconds=timeout_s)
    options._threads = threads
    return cast(TorchGloo, gloo(store, rank, size, options))


def gather_into(group: TorchGloo, output: Tensor, tensor: Tensor) -> TorchWork:
    """`output` has one more dimension than `tensor`, in front: one slice a rank."""
    return group._allgather_base(output, tensor.unsqueeze(0))


def allreduce_options(op: ReduceOp) -> object:
    """Made once and used for every call: building them costs more than issuing the operation."""
    options = _c10d.AllreduceOptions()
    options.reduceOp = _c10d.ReduceOp(_TORCH_REDUCE_OPS[op])
    return options


def keep_beyond_exit(group: TorchGloo) -> None:
    """Let no end of the interpreter free it: that joins its threads, and would wait for a stuck one."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))


def free_at_last(group: TorchGloo) -> None:
    """Undo `keep_beyond_exit`."""
    ctypes.pythonapi.Py_DecRef(ctypes.py_object(group))


def queue_backward_callback(callback: Callable[[], None]) -> None:
    """Run `callback` once when the backward pass that is under way has computed every gradient, before it returns.

    Only from within a backward pass (a hook); from elsewhere torch raises RuntimeError. What `callback` raises comes
    out of `backward()`.
    """
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def version_of(tensor: Tensor) -> int:
    """Grows with every change in place of the tensor or of a view of it."""
    return tensor._version
