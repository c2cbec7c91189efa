"""An operation that severing does not end: a debugger holds Gloo's threads, which so neither end nor fall asleep."""

import ctypes
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from everstep.collectives.gloo_group import GIVE_UP_AFTER_S
from everstep.collectives.store import host_store
from tests.collectives.members import Member, configure, members
from tests.support.waiting import wait_until

SEIZE, INTERRUPT, DETACH = 0x4206, 0x4207, 17  # linux/ptrace.h
WALL = 0x40000000  # wait for a thread, too
_libc = ctypes.CDLL(None, use_errno=True)


def _trace(request: int, thread: int) -> None:
    if _libc.ptrace(request, thread, None, None) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


@contextmanager
def held(member: Member) -> Iterator[None]:
    """Gloo's threads that run the member's operations do not get on."""
    every = [int(name) for name in os.listdir(f"/proc/{member.pid}/task")]
    threads = [thread for thread in every if "runloop" in _name(member.pid, thread)]
    assert threads
    for thread in threads:
        try:
            _trace(SEIZE, thread)
        except PermissionError as error:
            pytest.skip(f"no process may be traced here: {error}")
        _trace(INTERRUPT, thread)
        os.waitpid(thread, WALL)
    try:
        yield
    finally:
        for thread in threads:
            _trace(DETACH, thread)


def _name(pid: int, thread: int) -> str:
    with open(f"/proc/{pid}/task/{thread}/comm") as name:
        return name.read()


@pytest.mark.soak
def test_a_member_goes_on_without_an_operation_that_does_not_end() -> None:
    with host_store() as hosted, members(2) as group:
        stuck, store = group[0], hosted.address
        configure(group, 1, store)
        before = stuck.do("census")
        with held(stuck):
            stuck.do("issue", [1.0])
            waiting = stuck.begin("wait")
            stuck.do("ping")
            aborted_at = time.monotonic()
            for member in group:
                member.do("abort", 1)
            result = stuck.outcome(waiting)
            assert result.error == "StepInterrupted"
            assert result.ended_at - aborted_at < GIVE_UP_AFTER_S + 1.0
            built = configure(group, 2, store)
            assert max(outcome.took_s for outcome in built) < 2.0  # it has been waited for already
            sums = [member.begin("allreduce", [1.0]) for member in group]
            assert [m.outcome(number).value for m, number in zip(group, sums, strict=True)] == [[2.0]] * 2
        for member in group:
            member.do("release_previous")
        wait_until(lambda: _is_as_before(stuck.do("census"), before), what="the operation ended, and left nothing")


def _is_as_before(now: tuple[int, int], before: tuple[int, int]) -> bool:
    return now[0] <= before[0] and now[1] <= before[1]
