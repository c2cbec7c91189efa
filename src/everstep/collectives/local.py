"""A group of one: every operation is the identity."""

from torch import Tensor

from everstep.collectives.process_group import Membership, ReconfigurableProcessGroup, ReduceOp, Work
from everstep.core.types import LocalProtocolError, QuorumId
from everstep.errors import StepInterrupted


class LocalProcessGroup(ReconfigurableProcessGroup):
    """For training alone. No sockets, no threads; `abort` and the growth of ids work as in any group."""

    def __init__(self) -> None:
        self._quorum_id: QuorumId | None = None
        self._aborted: QuorumId | None = None
        self._is_closed = False

    def configure(self, membership: Membership) -> None:
        if membership.size != 1:
            raise ValueError(f"a group of {membership.size} members needs sockets: use GlooProcessGroup")
        if self._quorum_id is not None and membership.quorum_id <= self._quorum_id:
            raise LocalProtocolError(f"quorum {membership.quorum_id} does not follow {self._quorum_id}")
        self._raise_if_severed(membership.quorum_id)
        self._quorum_id = membership.quorum_id

    def abort(self, up_to: QuorumId) -> None:
        if self._aborted is None or up_to > self._aborted:
            self._aborted = up_to

    def release_previous(self) -> None:
        pass

    def allreduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> Work:  # noqa: ARG002 - one value needs no op
        self._raise_if_severed(self._quorum_id)
        return _DONE

    def allgather(self, tensor: Tensor) -> Tensor:
        self._raise_if_severed(self._quorum_id)
        return tensor.unsqueeze(0).clone()

    @property
    def quorum_id(self) -> QuorumId | None:
        return self._quorum_id

    @property
    def rank(self) -> int:
        return 0

    @property
    def size(self) -> int:
        return 1

    def close(self) -> None:
        self._is_closed = True

    def _raise_if_severed(self, quorum_id: QuorumId | None) -> None:
        if self._is_closed:
            raise StepInterrupted("the process group is closed")
        if quorum_id is None:
            raise LocalProtocolError("an operation before the first configure")
        if self._aborted is not None and quorum_id <= self._aborted:
            raise StepInterrupted(f"quorum {quorum_id} was aborted")


class _Done:
    """Work of a group of one."""

    def wait(self) -> None:
        pass

    def is_completed(self) -> bool:
        return True


_DONE = _Done()
