"""A process group that can be rebuilt for each quorum, and cut off at any moment from any thread.

configure(q1) ─ operations ─ configure(q2) ─ operations, the first a barrier ─ release_previous() ─ ...
                    │ abort(up_to=q1), from the link's thread: whatever waits raises StepInterrupted within milliseconds
"""

import enum
from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from torch import Tensor, uint8, zeros

from everstep.core.types import QuorumId


class ReduceOp(enum.Enum):
    """How an allreduce combines the members' values."""

    SUM = "sum"
    MIN = "min"
    MAX = "max"


@dataclass(frozen=True, kw_only=True)
class Membership:
    """This member's place in a quorum, and where the members find each other.

    `store` is the `host:port` of a store (store.py) that some member hosts. `timeout_s` bounds building and each
    operation; it is long because liveness is not its business: who finds out that a member died calls `abort`.
    """

    quorum_id: QuorumId
    rank: int
    size: int
    store: str = ""  # not needed for size 1
    timeout_s: float = 1800.0
    prefix: str = ""  # keeps several groups of one quorum apart in one store

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} is not within a group of {self.size}")
        if not self.timeout_s > 0:
            raise ValueError(f"timeout_s must be positive, not {self.timeout_s}")


class Work(Protocol):
    """An operation under way. Its tensor belongs to the operation until `wait` has returned or raised."""

    def wait(self) -> None:
        """Block until the operation ended here; raises StepInterrupted or, naming a peer, PeerLost.

        When it has returned or raised, the operation's thread is done with the tensor: nothing writes to it any more.
        Unless `is_completed` still says no after an error: then the operation was given up, and the tensor with it; use
        another. After an error its content is undefined. What had completed before the group was aborted returns.
        """

    def is_completed(self) -> bool:
        """Ended, well or not: `wait` will not block, and nothing writes to the tensor any more."""


class ReconfigurableProcessGroup(ABC):
    """One owner thread configures, operates and closes; `abort` may come from any thread at any moment."""

    @abstractmethod
    def configure(self, membership: Membership) -> None:
        """Build the group for that quorum; blocks until all its members are connected.

        Raises StepInterrupted when aborted (also beforehand: see `abort`), PeerLost when the store or a member is
        gone, LocalProtocolError when the quorum id does not grow. The group before it, unless aborted, stays open until
        `release_previous`. Operations of aborted groups have ended, and no longer touch their tensors, when it returns,
        or have been given up (see `Work.wait`); LocalProtocolError where that is impossible.
        """

    @abstractmethod
    def abort(self, up_to: QuorumId) -> None:
        """Sever every group whose quorum id is <= `up_to`: being built, current or previous. Never blocks.

        Whatever waits on one raises StepInterrupted within milliseconds, as does any later operation on it and any
        `configure` with such an id: quorum ids only grow, so a `configure` about to begin on another thread is covered.
        """

    @abstractmethod
    def release_previous(self) -> None:
        """Close the groups before the current one; for when every member has used the current one."""

    @abstractmethod
    def allreduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> Work:
        """Combine `tensor` (dense, contiguous) over all members, in place. Members issue in the same order and shape.

        Raises StepInterrupted or PeerLost at once when the group is already lost.
        """

    @abstractmethod
    def allgather(self, tensor: Tensor) -> Tensor:
        """Every member's `tensor` (same shape and dtype everywhere), stacked by rank; blocks. Raises as `Work.wait`."""

    def meet(self, *, is_patient: bool) -> None:
        """Block until every member has called it; `is_patient`: however long that takes. Raises as `Work.wait`."""
        del is_patient  # here it is an operation like any other
        self.allgather(zeros(1, dtype=uint8))

    @property
    @abstractmethod
    def quorum_id(self) -> QuorumId | None:
        """The quorum of the current group; None before the first."""

    @property
    @abstractmethod
    def rank(self) -> int:
        """This member's rank in the current group; 0 before the first."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Members of the current group; 1 before the first."""

    @abstractmethod
    def close(self) -> None:
        """Sever and free everything; later calls of any kind raise StepInterrupted. Idempotent."""

    def __enter__(self) -> "ReconfigurableProcessGroup":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
