"""Operations of an NCCL group: when one has ended, and whether it had before its communicator was aborted."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

import torch

from everstep.collectives import torch_private
from everstep.collectives.process_group import Membership
from everstep.core.types import LocalProtocolError
from everstep.errors import PeerLost, StepInterrupted

# Aborting a communicator ends its kernels; past this they will not end.
ABORT_TIMEOUT_S = 10.0
_PAUSES_S = (*(30e-6,) * 20, *(100e-6,) * 50)
_LONGEST_PAUSE_S = 500e-6


def pauses() -> Iterator[float]:
    """How long to sleep between two looks. Polled, since CUDA calls back into Python for nothing that we could wait on.

    A look is a query of one event; blocking in `cudaEventSynchronize` instead could not be interrupted by an abort.
    """
    return itertools.chain(_PAUSES_S, itertools.repeat(_LONGEST_PAUSE_S))


class Issuer(Protocol):
    """What an operation asks of its group."""

    membership: Membership
    is_severed: bool
    judged: threading.Event
    broken: threading.Event

    def condemn(self, failure: StepInterrupted | None = None) -> None: ...

    def cut(self) -> None: ...

    def failure(self) -> BaseException: ...

    def lost_by(self, error: str) -> BaseException: ...

    def forget(self, work: "NcclWork") -> None: ...


class NcclWork:
    """An operation of an NcclGroup.

    `wait` returns when the GPU has finished it, and has the current stream wait for it, too, as torch does. It does not
    return as soon as the stream waits, as torch's own does: a vote is a promise that the reductions have completed, and
    kernels of an aborted communicator end like others, with anything in their output.
    """

    __slots__ = ("_failure", "_group", "_had_ended", "_work")

    def __init__(self, group: Issuer, work: torch_private.TorchWork) -> None:
        self._group = group
        self._work: torch_private.TorchWork | None = work
        self._failure: Callable[[], BaseException] | None = None  # makes a fresh one, as in gloo_work.py
        self._had_ended = False

    def wait(self) -> None:
        group = self._group
        deadline = time.monotonic() + group.membership.timeout_s
        severed_at: float | None = None
        for pause_s in pauses():
            if self._has_ended():
                break
            now = time.monotonic()
            if group.is_severed:
                severed_at = now if severed_at is None else severed_at
                if now - severed_at >= ABORT_TIMEOUT_S:
                    raise LocalProtocolError(
                        "an operation of an aborted quorum still holds its tensor; only a restart frees it"
                    )
            elif now >= deadline:
                group.condemn(PeerLost(f"quorum {group.membership.quorum_id}: a collective did not end in time"))
                group.cut()
            time.sleep(pause_s)
        if self._failure is not None:
            raise self._failure()

    def is_completed(self) -> bool:
        """Without blocking: not asked of a communicator that is being aborted, which would wait for the abort."""
        return self._work is None or self._has_ended()

    def judge(self) -> None:
        """The breaker's, before it aborts the communicator."""
        work = self._work
        self._had_ended = work is None or work.is_completed()

    def settle(self, deadline: float) -> bool:
        """Wait, but do not raise; False when it has not ended by `deadline` (monotonic)."""
        for pause_s in pauses():
            if self._has_ended():
                return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(pause_s)
        raise AssertionError("pauses() has no end")

    def _has_ended(self) -> bool:
        work, group = self._work, self._group
        if work is None:
            return True
        if not group.is_severed:
            # In this order: what had ended, and was not severed then, had ended by itself.
            if not work.is_completed() or group.is_severed:
                return False
        elif not group.judged.is_set():
            return False
        elif not self._had_ended:
            if not group.broken.is_set() or not work.is_completed():
                return False
            self._failure = group.failure
            self._finish()
            return True
        try:
            work.wait()  # has the current stream wait for it, too; raises what NCCL reported, after it aborted
        except torch.distributed.DistError as error:
            group.lost_by(str(error))  # now: the group is lost, whether or not anybody waits again
            self._failure = partial(group.lost_by, str(error))
        self._finish()
        return True

    def _finish(self) -> None:
        # torch's Work holds on to the tensor.
        self._work = None
        self._group.forget(self)
