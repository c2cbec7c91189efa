"""Operations of a Gloo group, and what to do with one that Gloo itself has lost track of.

When a connection ends, Gloo wakes whoever waits to send or to receive on it, but for two cases (seen with torch 2.13,
pair.cc): a send whose bytes it has queued because the socket was full or just reset, and a receive of which part has
arrived. The thread of such an operation then sleeps until the operation's timeout. Nothing can wake it, and it touches
its tensor no more: all connections are closed, and all that it will ever do is wake and raise.
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Protocol

from torch import Tensor

from everstep.collectives import torch_private

# A wait in C++ runs no Python signal handler, and a stuck one is only found out by looking: it comes up for air.
WAIT_SLICE = timedelta(milliseconds=20)


class Issuer(Protocol):
    """What an operation asks of its group."""

    def lost_by(self, error: str) -> BaseException: ...

    def failure(self) -> BaseException: ...

    def forget(self, work: "GlooWork") -> None: ...

    def park(self, work: torch_private.TorchWork) -> None: ...

    def is_stuck(self) -> bool: ...

    def watch(self) -> None: ...

    def is_given_up(self) -> bool: ...


class GlooWork:
    """An operation of a GlooGroup."""

    __slots__ = ("_failure", "_group", "_work")

    def __init__(self, group: Issuer, work: torch_private.TorchWork) -> None:
        self._group = group
        self._work: torch_private.TorchWork | None = work
        # Makes what `wait` raises. An exception kept here would keep its traceback, whose frames keep this object and
        # the whole training step (the loss and its graph) until the garbage collector finds the cycle.
        self._failure: Callable[[], BaseException] | None = None

    def wait(self) -> None:
        work = self._work
        if work is not None:
            while not self._has_ended(work, WAIT_SLICE):
                if self._group.is_given_up():
                    raise self._group.failure()
        if self._failure is not None:
            raise self._failure()

    def is_completed(self) -> bool:
        work = self._work
        return work is None or work.is_completed()

    def unended(self) -> torch_private.TorchWork | None:
        """torch's part of it, as long as it still has the tensor."""
        work = self._work
        return None if work is None or work.is_completed() else work

    def settle(self, deadline: float) -> bool:
        """Wait, but do not raise; False when it has not ended by `deadline` (monotonic)."""
        work = self._work
        while work is not None and not self._has_ended(work, WAIT_SLICE):
            if time.monotonic() >= deadline:
                return False
        return True

    def _has_ended(self, work: torch_private.TorchWork, timeout: timedelta) -> bool:
        """False when it has not in time: then its thread still has the tensor, and nothing is decided."""
        if _error_of(work, timeout) is not None:
            if work.is_completed():
                # What the wait raised may have been that it ran out of time just before the end.
                error = _error_of(work, WAIT_SLICE)
                if error is not None:
                    self._group.lost_by(error)  # now: the group is lost, whether or not anybody waits again
                    self._failure = partial(self._group.lost_by, error)
            elif self._group.is_stuck():
                self._failure = self._group.failure
                self._group.park(work)
            else:
                self._group.watch()
                return False
        # torch's Work holds on to the tensor, and to the group's sockets.
        self._work = None
        self._group.forget(self)
        return True


def _error_of(work: torch_private.TorchWork, timeout: timedelta) -> str | None:
    """What waiting raises, as text: an exception would keep its frames, and they the Work, until garbage collection."""
    try:
        work.wait(timeout)
    except RuntimeError as error:
        return str(error)
    return None


@dataclass
class Parked:
    """A group that cannot be freed yet: freeing it joins its threads, and one sleeps until its operation times out."""

    gloo: torch_private.TorchGloo
    works: list[torch_private.TorchWork]


_parked: list[Parked] = []


def park(gloo: torch_private.TorchGloo, works: list[torch_private.TorchWork]) -> None:
    torch_private.keep_beyond_exit(gloo)
    _parked.append(Parked(gloo, works))


def free_parked() -> None:
    """Free the groups whose last operation has timed out meanwhile."""
    for parked in tuple(_parked):
        if all(work.is_completed() for work in parked.works):
            with contextlib.suppress(ValueError):  # another thread was faster
                _parked.remove(parked)
                torch_private.free_at_last(parked.gloo)


class Alone:
    """Gloo for a group of one: the identity."""

    def allreduce(self, tensors: list[Tensor], opts: object) -> "_Ended":  # noqa: ARG002 - one value needs no op
        return _Ended()

    def _allgather_base(self, output: Tensor, source: Tensor) -> "_Ended":
        output.copy_(source)
        return _Ended()


class _Ended:
    def wait(self, timeout: timedelta = timedelta(0)) -> bool:  # noqa: ARG002 - as torch's
        return True

    def is_completed(self) -> bool:
        return True
