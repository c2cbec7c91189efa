"""What the process groups over Gloo and over NCCL share: one group a quorum, the newest of them current.

What a transport does for one quorum is a `QuorumGroup`; `RebuiltProcessGroup` builds them on threads of their own, puts
each in the place of the one before, and takes down those that are lost or released.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from typing import Protocol

from torch import Tensor

from everstep import fork_guard
from everstep.collectives.heap import give_back
from everstep.collectives.process_group import Membership, ReconfigurableProcessGroup, ReduceOp, Work
from everstep.core.types import LocalProtocolError, QuorumId
from everstep.errors import PeerLost, StepInterrupted

# Severing ends an operation, or a build, in milliseconds; these are for a machine that is out of breath.
DRAIN_TIMEOUT_S = 10.0
UNWIND_TIMEOUT_S = 0.05
CLOSE_TIMEOUT_S = 10.0
BUILD_GRACE_S = 15.0
_CUT_INTERVAL_S = 0.001

_log = logging.getLogger(__name__)


class QuorumGroup(Protocol):
    """One quorum's group. `build` and `take_down` run on helper threads; `condemn` and `cut` may come from any."""

    membership: Membership
    changed: threading.Event  # condemned, or the build ended
    ended: threading.Event  # the build ended, one way or the other
    is_severed: bool

    @property
    def is_usable(self) -> bool: ...

    def build(self) -> None:
        """Connect to every member; the outcome is `is_usable` or `failure()`."""

    def after_build(self) -> None:
        """What is left to do, off the critical path, when it is usable."""

    def allreduce(self, tensor: Tensor, op: ReduceOp) -> Work: ...

    def allgather(self, tensor: Tensor) -> Tensor: ...

    def failure(self) -> BaseException:
        """Why it is of no use, as an exception of its own for each that raises it."""

    def condemn(self, failure: StepInterrupted | None = None) -> None:
        """No operation is issued any more, and a build gives up at its next step. Instant; `cut` does the rest."""

    def cut(self) -> None:
        """Sever a condemned group, without waiting; while it is being built, again and again until it has `ended`."""

    def drain(self, deadline: float) -> bool:
        """Wait until no operation of a severed group can touch its tensor any more; False when `deadline` passed."""

    def give_up(self) -> None:
        """After a failed `drain`: leave their tensors to the operations; LocalProtocolError where nobody can."""

    def take_down(self) -> None:
        """Sever it and free its threads and descriptors."""

    def fds(self) -> list[int]:
        """Descriptors that a forked child must let go of. Takes no lock."""

    def keep(self) -> None:
        """In a forked child: never free what would wait for threads that are the parent's alone."""


class RebuiltProcessGroup(ReconfigurableProcessGroup):
    """`make` makes the group of a membership, not yet built; `helper_name` is that of the threads that build."""

    def __init__(self, make: Callable[[Membership], QuorumGroup], helper_name: str) -> None:
        self._make = make
        self._helper_name = helper_name
        # Guards the fields below for an instant at a time: `abort` must never wait.
        self._lock = threading.Lock()
        self._aborted: QuorumId | None = None
        self._newest: QuorumId | None = None
        self._is_closed = False
        self._building: QuorumGroup | None = None
        self._current: QuorumGroup | None = None
        self._previous: list[QuorumGroup] = []
        # Only the owner thread's:
        self._helpers: list[threading.Thread] = []
        self._lift_guard: Callable[[], None] | None = None
        self._pid = os.getpid()

    def configure(self, membership: Membership) -> None:
        started_at = time.monotonic()
        group = self._make(membership)
        with self._lock:
            self._admit(membership.quorum_id)
            self._newest = membership.quorum_id
            self._building = group
        if self._lift_guard is None:
            self._lift_guard = fork_guard.guard(self._fds_in_child)
        try:
            self._start(lambda: build_aside(group))
            await_build(group)
        except BaseException:  # an interrupt from the keyboard, say
            group.condemn()
            group.cut()
            raise
        finally:
            lost = self._admit_built(group)
        if lost:
            _drain(lost)
            self._start(lambda: _take_down(lost))
        if self._current is not group:
            raise group.failure()
        _log.info(
            "quorum %s: rank %d of %d, connected in %.1f ms",
            membership.quorum_id,
            membership.rank,
            membership.size,
            (time.monotonic() - started_at) * 1e3,
        )

    def abort(self, up_to: QuorumId) -> None:
        with self._lock:
            if self._aborted is None or up_to > self._aborted:
                self._aborted = up_to
            groups = [g for g in (self._current, self._building, *self._previous) if g is not None]
            severed = [g for g in groups if g.membership.quorum_id <= up_to]
            for group in severed:
                group.condemn()
        for group in severed:
            if group.ended.is_set():  # one that is being built is cut by the thread that waits for it
                group.cut()

    def release_previous(self) -> None:
        with self._lock:
            released, self._previous = self._previous, []
        if released:
            self._start(lambda: _take_down(released))

    def allreduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> Work:
        group = self._current
        if group is None:
            raise LocalProtocolError("an operation before the first configure")
        return group.allreduce(tensor, op)

    def allgather(self, tensor: Tensor) -> Tensor:
        group = self._current
        if group is None:
            raise LocalProtocolError("an operation before the first configure")
        return group.allgather(tensor)

    @property
    def quorum_id(self) -> QuorumId | None:
        return self._current.membership.quorum_id if self._current is not None else None

    @property
    def rank(self) -> int:
        return self._current.membership.rank if self._current is not None else 0

    @property
    def size(self) -> int:
        return self._current.membership.size if self._current is not None else 1

    def close(self) -> None:
        if os.getpid() != self._pid:  # a forked child: the threads are not here, and taking it down waits for them
            return
        with self._lock:
            self._is_closed = True
            groups = [g for g in (self._building, self._current, *self._previous) if g is not None]
            self._previous = []
        _take_down(groups)
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        for helper in self._helpers:
            helper.join(max(0.0, deadline - time.monotonic()))
        if self._lift_guard is not None:
            self._lift_guard()

    def _admit(self, quorum_id: QuorumId) -> None:
        if self._is_closed:
            raise StepInterrupted("the process group is closed")
        if self._aborted is not None and quorum_id <= self._aborted:
            raise StepInterrupted(f"quorum {quorum_id} was aborted before it was configured")
        if self._building is not None or (self._newest is not None and quorum_id <= self._newest):
            raise LocalProtocolError(f"quorum {quorum_id} does not follow {self._newest}")

    def _admit_built(self, group: QuorumGroup) -> list[QuorumGroup]:
        """Make it the current one if it is of use; returns the severed groups before it, which no longer are."""
        with self._lock:
            self._building = None
            if not group.is_usable:
                return []
            before = [g for g in (*self._previous, self._current) if g is not None]
            self._previous = [g for g in before if not g.is_severed]
            self._current = group
            return [g for g in before if g.is_severed]

    def _start(self, run: Callable[[], None]) -> None:
        self._helpers = [helper for helper in self._helpers if helper.is_alive()]
        helper = threading.Thread(target=run, name=self._helper_name, daemon=True)
        self._helpers.append(helper)
        helper.start()

    def _fds_in_child(self) -> Iterable[int]:
        groups = [g for g in (self._building, self._current, *self._previous) if g is not None]
        for group in groups:
            group.keep()
        return [fd for group in groups for fd in group.fds()]


def build_aside(group: QuorumGroup) -> None:
    """A helper thread's work: the build, and what is left of it off the critical path."""
    group.build()
    if group.is_usable:
        group.after_build()
    else:
        group.take_down()


def await_build(group: QuorumGroup) -> None:
    """Until it is built, has failed or is condemned; then cuts what it opens until it ends, or seems stuck."""
    # The build has its own deadline, which says more; this one is for what cannot be given a deadline.
    if not group.changed.wait(group.membership.timeout_s + BUILD_GRACE_S):
        group.condemn(PeerLost(f"quorum {group.membership.quorum_id} was not built in time"))
    deadline = time.monotonic() + UNWIND_TIMEOUT_S
    while not group.ended.is_set() and time.monotonic() < deadline:
        group.cut()
        group.ended.wait(_CUT_INTERVAL_S)


def _drain(groups: list[QuorumGroup]) -> None:
    deadline = time.monotonic() + DRAIN_TIMEOUT_S
    for group in groups:
        if not group.drain(deadline):
            group.give_up()


def _take_down(groups: list[QuorumGroup]) -> None:
    for group in groups:
        group.take_down()
    give_back()
