"""The reconfigurable process group over NCCL (CUDA tensors), and the one that serves CPU and CUDA tensors together.

NCCL in torch is made for jobs that end with their first failure. What has to be otherwise here:

- torch's watchdog thread looks at each communicator every 100 ms. When a peer has died it finds NCCL's error, and a
  minute later takes the process down. TORCH_NCCL_ASYNC_ERROR_HANDLING=0 makes it write the error to the log instead.
  The minute matters: an abort in the meantime changes nothing, since the watchdog has the error already.
- a second thread takes the process down when the first has not moved for 8 minutes, or when any communicator of the
  process has met an error: TORCH_NCCL_ENABLE_MONITORING=0.
- debugging aids turn the first of these on again behind one's back; they are refused.

Torch reads these where it builds a group, from the environment alone, and Everstep does not write the environment: so
they are looked at, and the error says what to export.

As yet it has not run on a GPU: see nccl_group.py.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from everstep.collectives.nccl_group import HELPER_NAME, NcclGroup, NcclPlace
from everstep.collectives.process_group import Membership, ReconfigurableProcessGroup, ReduceOp, Work
from everstep.collectives.rebuilt import RebuiltProcessGroup
from everstep.core.types import QuorumId
from everstep.errors import ConfigError

# For more, torch (2.13) has several members make an id each; nccl_group.py passes on one.
MEMBERS_MAX = 128
_NEEDED = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}
_REGISTERS = "TORCH_NCCL_USE_TENSOR_REGISTER_ALLOCATOR_HOOK"
_REFUSED = {
    "TORCH_NCCL_DESYNC_DEBUG": ("1", "true", "t", "y", "yes"),
    "TORCH_DISTRIBUTED_DEBUG": ("detail",),
}


class NcclProcessGroup(RebuiltProcessGroup):
    """For tensors on `device`, this process's own GPU; a group of one is the identity, and needs no NCCL.

    `environ` is the process's environment. `even_alone` builds a communicator for one member, too, which is how to try
    NCCL on one GPU. Raises ConfigError where NCCL cannot work, or would end the process when a peer dies.

    An abort takes as long as NCCL's, which is more than Gloo's milliseconds: `abort` returns at once as it must, and
    what waits for an operation raises when no kernel writes to its tensor any more.
    """

    def __init__(self, device: torch.device, *, environ: Mapping[str, str], even_alone: bool = False) -> None:
        check_nccl(device, environ)
        place = NcclPlace(device=device, even_alone=even_alone)
        super().__init__(lambda membership: NcclGroup(membership, place), HELPER_NAME)

    def configure(self, membership: Membership) -> None:
        if membership.size > MEMBERS_MAX:
            raise ConfigError(f"{membership.size} replica groups are more than the {MEMBERS_MAX} that nccl serves here")
        super().configure(membership)


class ProcessGroupByDevice(ReconfigurableProcessGroup):
    """CUDA tensors travel over `cuda`, all others over `cpu`: what the members tell each other is on the CPU.

    Operations of the one are not ordered with those of the other.
    """

    def __init__(self, cpu: ReconfigurableProcessGroup, cuda: ReconfigurableProcessGroup) -> None:
        self._cpu = cpu
        self._cuda = cuda

    def configure(self, membership: Membership) -> None:
        self._cpu.configure(membership)
        self._cuda.configure(membership)

    def abort(self, up_to: QuorumId) -> None:
        self._cpu.abort(up_to)
        self._cuda.abort(up_to)

    def release_previous(self) -> None:
        self._cpu.release_previous()
        self._cuda.release_previous()

    def allreduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> Work:
        return self._for(tensor).allreduce(tensor, op)

    def allgather(self, tensor: Tensor) -> Tensor:
        return self._for(tensor).allgather(tensor)

    @property
    def quorum_id(self) -> QuorumId | None:
        return self._cuda.quorum_id

    @property
    def rank(self) -> int:
        return self._cuda.rank

    @property
    def size(self) -> int:
        return self._cuda.size

    def close(self) -> None:
        self._cpu.close()
        self._cuda.close()

    def _for(self, tensor: Tensor) -> ReconfigurableProcessGroup:
        return self._cuda if tensor.is_cuda else self._cpu


def check_nccl(device: torch.device, environ: Mapping[str, str]) -> None:
    """Raise ConfigError, saying what to do, unless NCCL works here and leaves the process alone."""
    if not torch.distributed.is_nccl_available():
        raise ConfigError(
            f"nccl was asked for, and this torch ({torch.__version__}) was built without it: install a CUDA build of "
            "torch, or use gloo"
        )
    if device.type != "cuda" or not torch.cuda.is_available():
        what = "no GPU can be used here" if device.type == "cuda" else f"{device} is no GPU"
        raise ConfigError(f"nccl was asked for, but {what}: check nvidia-smi and CUDA_VISIBLE_DEVICES, or use gloo")
    check_environment(environ)


def allows_late_writes(environ: Mapping[str, str]) -> bool:
    """Whether a peer may write into a tensor here when this member has aborted: NCCL is told where tensors lie."""
    return environ.get(_REGISTERS, "0").lower() not in ("0", "f", "false", "n", "no")


def check_environment(environ: Mapping[str, str]) -> None:
    """Raise ConfigError unless torch's watchdog, as these variables set it, lets the process live."""
    exports = [f"{name}={value}" for name, value in _NEEDED.items() if environ.get(name) != value]
    if exports:
        raise ConfigError(
            "torch's NCCL watchdog would end this process when a peer dies; before it starts, export "
            f"{' '.join(exports)}"
        )
    for name, values in _REFUSED.items():
        if environ.get(name, "").lower() in values:
            raise ConfigError(
                f"{name}={environ[name]} lets torch's NCCL watchdog end this process when a peer dies: unset it"
            )
