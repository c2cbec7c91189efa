"""A process group whose tiny MIN and MAX reductions travel on a lane of their own (lane.py)."""

import torch
from torch import Tensor

from everstep.collectives.lane import NUMBERS_MAX, Lane
from everstep.collectives.process_group import Membership, ReconfigurableProcessGroup, ReduceOp, Work
from everstep.core.types import QuorumId


class ProcessGroupWithLane(ReconfigurableProcessGroup):
    """`inner` carries bulk, and tells the members each other's lane addresses when it is configured."""

    def __init__(self, inner: ReconfigurableProcessGroup, bind_host: str) -> None:
        self._inner = inner
        self._lane = Lane(bind_host)

    def configure(self, membership: Membership) -> None:
        self._inner.configure(membership)
        if membership.size == 1:
            return
        own = torch.frombuffer(bytearray(self._lane.address()), dtype=torch.uint8)
        addresses = [bytes(row.tolist()) for row in self._inner.allgather(own)]
        self._lane.connect(membership, addresses)

    def abort(self, up_to: QuorumId) -> None:
        self._inner.abort(up_to)
        self._lane.abort(up_to)

    def release_previous(self) -> None:
        self._inner.release_previous()
        self._lane.release_previous()

    def allreduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> Work:
        is_tiny = tensor.dtype is torch.int64 and tensor.numel() <= NUMBERS_MAX and tensor.device.type == "cpu"
        if not is_tiny or op is ReduceOp.SUM or self.size == 1:
            return self._inner.allreduce(tensor, op)

        def finish(numbers: list[int]) -> None:
            tensor.copy_(torch.tensor(numbers, dtype=torch.int64).view_as(tensor))

        return self._lane.reduce(tensor.flatten().tolist(), op, finish)

    def allgather(self, tensor: Tensor) -> Tensor:
        return self._inner.allgather(tensor)

    def meet(self, *, is_patient: bool) -> None:
        if self.size > 1:
            self._lane.reduce([0], ReduceOp.MIN, lambda _: None, is_patient=is_patient).wait()

    @property
    def quorum_id(self) -> QuorumId | None:
        return self._inner.quorum_id

    @property
    def rank(self) -> int:
        return self._inner.rank

    @property
    def size(self) -> int:
        return self._inner.size

    def close(self) -> None:
        self._inner.close()
        self._lane.close()
