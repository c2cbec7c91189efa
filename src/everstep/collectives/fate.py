"""What becomes of one quorum's group, over whatever transport: in use, condemned, and why it is of no use any more."""

import threading
from typing import Generic, Protocol, TypeVar

from everstep.collectives.process_group import Membership
from everstep.errors import PeerLost, StepInterrupted

PENDING_MAX = 256


class Ending(Protocol):
    """An operation that was issued, as far as its group cares."""

    def is_completed(self) -> bool: ...

    def settle(self, deadline: float, /) -> bool: ...


WorkT = TypeVar("WorkT", bound=Ending)


class GroupFate(Generic[WorkT]):
    """The part of a QuorumGroup (rebuilt.py) that Gloo and NCCL have in common. `condemn` may come from any thread."""

    def __init__(self, membership: Membership) -> None:
        self.membership = membership
        self.changed = threading.Event()  # condemned, or the build ended
        self.ended = threading.Event()  # the build ended, one way or the other
        self.is_severed = False
        self._failure: BaseException | None = None  # why it is of no use, once it is not
        self._pending: set[WorkT] = set()  # issued, and not known to have ended

    def failure(self) -> BaseException:
        """Why it is of no use; fresh each time, since an exception raised twice drags the first one's frames along."""
        failure = self._failure
        if isinstance(failure, PeerLost):
            return PeerLost(str(failure), failure.peer)
        if failure is None or isinstance(failure, StepInterrupted):
            return StepInterrupted(str(failure or f"quorum {self.membership.quorum_id} is not built"))
        return failure

    def condemn(self, failure: StepInterrupted | None = None) -> None:
        """No operation is issued any more, and a build gives up at its next step. Instant; `cut` does the rest."""
        if not self.is_severed:
            if self._failure is None:
                self._failure = failure or StepInterrupted(f"quorum {self.membership.quorum_id} was aborted")
            self.is_severed = True
        self.changed.set()

    def forget(self, work: WorkT) -> None:
        self._pending.discard(work)

    def _note(self, work: WorkT) -> WorkT:
        if len(self._pending) >= PENDING_MAX:  # somebody does not wait for his operations
            self._pending = {other for other in self._pending if not other.is_completed()}
        self._pending.add(work)
        return work
