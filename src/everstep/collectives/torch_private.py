"""Every name of torch that its documentation does not promise, and why Everstep needs it. Checked with torch 2.13.

- `ProcessGroupGloo`, its `_Options`, `_devices`, `_threads` and `_timeout`: `init_process_group` makes one group per
  process and never gives it up; a quorum needs one at will, on an address of our choice.
- `AllreduceOptions` and the backend's `allreduce([tensor], options)`: the public `all_reduce` wants a registered group
  and costs several times as much per call.
- `ProcessGroupGloo._allgather_base`: gathers into one tensor, without a list of outputs. Its `send` and `recv`: the
  public ones want a registered group.
- `Store`, subclassed: Gloo asks it for where the other ranks listen. torch's own TCPStore looks names up in the DNS
  (see store.py); ours answers from a meeting of the members.
- `ProcessGroupNCCL`, its `Options` with `config` and `_timeout`, `eager_connect_single_device`, `abort`: as for Gloo.
  `BroadcastOptions` and `broadcast([tensor], options)`: between two members a send. Its own `send`, until some release
  after 2.7, made another communicator for each pair, by way of the group's store, which here is not shared.
  The key "0", under which rank 0 leaves the first communicator's id in its store and the other ranks look for it.
- `distributed_c10d._get_default_store`: the only way to the store that the script's `init_process_group` has made.
- `Variable._execution_engine.queue_callback`: the only way to run code when `backward()` has computed everything but
  has not returned; torch's own FSDP uses it.
- `__dynamo_disable`, where `torch._disable_dynamo` keeps what it has made of a function, and `_torchdynamo_disable`,
  which tells the tracer that it is exempt; `_use_grad`, which torch wraps the `step` of its optimizers in, and
  `_opt_called`, which a scheduler's wrapper around that sets. The first use of an optimizer imports torch._dynamo
  otherwise, a second of work in every process. Where torch changes, that is what happens again.
"""

import ctypes
import functools
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol, cast

import torch
import torch.distributed
from torch import Tensor
from torch._C import _distributed_c10d as _c10d
from torch._C._distributed_c10d import Store

from everstep.collectives.process_group import ReduceOp

__all__ = [
    "GlooDevice",
    "Place",
    "Store",
    "TorchGloo",
    "TorchNccl",
    "TorchWork",
    "allreduce_options",
    "broadcast_options",
    "connect_gloo",
    "default_store",
    "free_at_last",
    "gather_into",
    "gloo_device",
    "import_dynamo",
    "import_for_step",
    "keep_beyond_exit",
    "keep_dynamo_out",
    "nccl_id_in",
    "new_nccl",
    "put_nccl_id",
    "queue_backward_callback",
    "receive_from",
    "send_to",
    "step_optimizer",
    "version_of",
]

_DYNAMO = "torch._dynamo"
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


class _TorchPeers(Protocol):
    """What else there is of it."""

    def send(self, tensors: list[Tensor], rank: int, tag: int) -> TorchWork: ...

    def recv(self, tensors: list[Tensor], rank: int, tag: int) -> TorchWork: ...


@dataclass(frozen=True, kw_only=True)
class Place:
    """This rank's place in a Gloo group, its operations' timeout, and how many threads run them."""

    rank: int
    size: int
    timeout_s: float
    threads: int


def gloo_device(host: str) -> GlooDevice:
    """Listens on `host`, any free port. Not lazy, whatever TORCH_GLOO_LAZY_INIT says: see `connect_gloo`."""
    create = torch.distributed.ProcessGroupGloo.create_device
    if "lazy_init" not in (create.__doc__ or ""):  # torch 2.6: there was no lazy device yet
        return cast(GlooDevice, create(hostname=host))
    return cast(GlooDevice, create(hostname=host, lazy_init=False))


class _MeetingStore(Store):
    """Gloo sets `.../<its rank>` once and gets every rank's; the first get is the meeting."""

    def __init__(self, meet: Callable[[bytes], list[bytes]]) -> None:
        super().__init__()
        self._meet = meet
        self._mine = b""
        self._all: list[bytes] = []

    # The stub says that values are str; Gloo's are bytes.
    def set(self, key: str, value: bytes) -> None:  # type: ignore[override]  # noqa: ARG002
        self._mine = bytes(value)

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._all[int(key.rpartition("/")[2])]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:  # noqa: ARG002 - of the meeting
        if not self._all:
            self._all = self._meet(self._mine)

    def has_extended_api(self) -> bool:
        return False


def connect_gloo(place: Place, device: GlooDevice, meet: Callable[[bytes], list[bytes]]) -> TorchGloo:
    """Connect to every other rank now, and return the group; blocks without the GIL, raises RuntimeError.

    `meet` takes what Gloo says of this rank and returns what it said of each; what it raises comes out of here.
    A lazy device would connect inside the first operation, where its sockets could not be noted beforehand.
    """
    gloo = torch.distributed.ProcessGroupGloo
    options = gloo._Options()  # type: ignore[attr-defined]  # the stub calls it Options
    options._devices = [device]
    options._timeout = timedelta(seconds=place.timeout_s)
    options._threads = place.threads
    return cast(TorchGloo, gloo(_MeetingStore(meet), place.rank, place.size, options))


class TorchNccl(Protocol):
    """What we call on torch's ProcessGroupNCCL; each call releases the GIL."""

    def allreduce(self, tensors: list[Tensor], opts: object) -> TorchWork: ...

    def _allgather_base(self, output: Tensor, source: Tensor) -> TorchWork: ...

    def broadcast(self, tensors: list[Tensor], opts: object) -> TorchWork: ...

    def eager_connect_single_device(self, device: torch.device) -> None: ...

    def abort(self) -> None: ...


_NCCL_ID_KEY = "0"


def new_nccl(rank: int, size: int, timeout_s: float, blocks_max: int | None = None) -> tuple[TorchNccl, Store]:
    """A group that is connected to nobody yet, and the store that it alone uses.

    `eager_connect_single_device` makes the id on rank 0 (see `nccl_id_in`), and needs it there on the others
    (`put_nccl_id`). `blocks_max`: how many of the GPU's thread blocks an operation may occupy.

    Torch's HashStore, without a socket and without Python: torch's own threads come back to the store, at the end of
    the interpreter, too.
    """
    options = _c10d.ProcessGroupNCCL.Options()
    # Connecting returns at once, and can be aborted. A blocking one waits in NCCL for every peer, alive or not.
    options.config.blocking = 0
    if blocks_max is not None:
        options.config.max_ctas = blocks_max
    # Ours ends first (nccl_work.py); torch's would find fault with operations, and leave aborting to others.
    options._timeout = timedelta(seconds=2 * timeout_s)
    store = _c10d.HashStore()
    return cast(TorchNccl, _c10d.ProcessGroupNCCL(store, rank, size, options)), store


def nccl_id_in(store: Store) -> bytes:
    return bytes(store.get(_NCCL_ID_KEY))


def put_nccl_id(store: Store, nccl_id: bytes) -> None:
    store.set(_NCCL_ID_KEY, nccl_id)  # type: ignore[arg-type]  # the stub says str; bytes are taken as they are


def gather_into(group: TorchGloo | TorchNccl, output: Tensor, tensor: Tensor) -> TorchWork:
    """`output` has one more dimension than `tensor`, in front: one slice a rank."""
    return group._allgather_base(output, tensor.unsqueeze(0))


def send_to(group: TorchGloo, tensor: Tensor, rank: int, tag: int) -> TorchWork:
    """Starts at once. Its `wait` blocks; where that times out, every connection of the group is closed."""
    return cast(_TorchPeers, group).send([tensor], rank, tag)


def receive_from(group: TorchGloo, tensor: Tensor, rank: int, tag: int) -> TorchWork:
    """As `send_to`. A message of another size than the tensor breaks the group."""
    return cast(_TorchPeers, group).recv([tensor], rank, tag)


def allreduce_options(op: ReduceOp) -> object:
    """Made once and used for every call: building them costs more than issuing the operation."""
    options = _c10d.AllreduceOptions()
    options.reduceOp = _c10d.ReduceOp(_TORCH_REDUCE_OPS[op])
    return options


def broadcast_options(root: int) -> object:
    """As `allreduce_options`."""
    options = _c10d.BroadcastOptions()
    options.rootRank = root
    return options


def keep_beyond_exit(group: TorchGloo | TorchNccl) -> None:
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


def default_store() -> Store:
    """Of the script's own process group, which must be initialized."""
    return torch.distributed.distributed_c10d._get_default_store()


def import_dynamo() -> None:
    """A second's work, 800 modules."""
    importlib.import_module(_DYNAMO)


def import_for_step(optimizer: torch.optim.Optimizer) -> None:
    """What its first step would import."""
    if _DYNAMO not in sys.modules and _untraced_step(optimizer) is None:
        import_dynamo()


def keep_dynamo_out() -> None:
    """Let optimizers be made and zeroed without an import of torch._dynamo, until something else imports it.

    torch exempts these methods from being traced, which nothing does before that import.
    """
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        method = getattr(torch.optim.Optimizer, name)
        plain = getattr(method, "__wrapped__", None)
        if plain is not None and "__dynamo_disable" not in vars(plain):
            setattr(plain, "__dynamo_disable", _untraced(method, plain))


def _untraced(method: Callable[..., object], plain: Callable[..., object]) -> Callable[..., object]:
    @functools.wraps(plain)
    def call(*args: object, **kwargs: object) -> object:
        if _DYNAMO not in sys.modules:
            return plain(*args, **kwargs)
        vars(plain).pop("__dynamo_disable", None)  # from here on torch's own
        return method(*args, **kwargs)

    vars(call)["_torchdynamo_disable"] = True  # should it be met first while something is traced
    return call


def step_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """`optimizer.step()`, without its import of torch._dynamo unless something else has imported that."""
    step = None if _DYNAMO in sys.modules else _untraced_step(optimizer)
    if step is None:
        optimizer.step()
    else:
        step(optimizer)


def _untraced_step(optimizer: torch.optim.Optimizer) -> Callable[[torch.optim.Optimizer], object] | None:
    """The same but for its graph breaks, which mean nothing where nothing is traced; None where torch differs."""
    hooked = type(optimizer).step
    patched = vars(optimizer).get("step")
    traced = getattr(hooked, "__wrapped__", hooked) if getattr(hooked, "hooked", False) else hooked
    code, plain = getattr(traced, "__code__", None), getattr(traced, "__wrapped__", None)
    if plain is None or code is None or code.co_name != "_use_grad" or _DYNAMO not in code.co_names:
        return None
    if patched is not None and not hasattr(patched, "_wrapped_by_lr_sched"):
        return None  # somebody else's wrapper is to be called

    @functools.wraps(plain)
    def step(it: torch.optim.Optimizer) -> object:
        if patched is not None:
            it._opt_called = True  # type: ignore[attr-defined]
        with torch.set_grad_enabled(it.defaults["differentiable"]):
            return plain(it)

    return torch.optim.Optimizer.profile_hook_step(step)


def version_of(tensor: Tensor) -> int:
    """Grows with every change in place of the tensor or of a view of it."""
    return tensor._version
