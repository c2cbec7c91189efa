"""All Python stacks of a rank, written by faulthandler in a signal handler: C code, which needs no GIL.

The rank's process and its forked children (DataLoader workers) write into the file behind the page. When a dump has
ended the kernel says: the signal waits no more, and no thread blocks it that did not before.
"""

import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Sequence

from everstep.monitor.first import STACKS_OFFSET, STACKS_SIGNAL
from everstep.monitor.processes import blocking, catches, in_group, is_handling, process

LOOK_S = 0.001
CHILDREN_MAX = 16
TEXT_BYTES_MAX = 1 << 20


@dataclasses.dataclass(frozen=True)
class StackSource:
    """A rank's process, and the file that it writes to."""

    pid: int
    fd: int


def dump(source: StackSource, deadline: float) -> str:
    """Of the rank and then of its children, until `deadline` on the monotonic clock. Empty when it cannot say."""
    text = dump_all([source], deadline)[0]
    children = [pid for pid in in_group(process(source.pid).group) if pid != source.pid][:CHILDREN_MAX]
    for pid in children:
        if time.monotonic() < deadline and (more := _dump_one(pid, source.fd, deadline)):
            text += f"Process {pid}, a child of it:\n{more}"
    return text


def dump_all(sources: Sequence[StackSource], deadline: float) -> list[str]:
    """Of several ranks at once, without their children."""
    asked = [_ask(source.pid, source.fd) for source in sources]
    return [_await(one, deadline) if one is not None else "" for one in asked]


@dataclasses.dataclass(frozen=True)
class _Asked:
    pid: int
    fd: int
    from_byte: int
    blocked_before: frozenset[int]


def _dump_one(pid: int, fd: int, deadline: float) -> str:
    asked = _ask(pid, fd)
    return _await(asked, deadline) if asked is not None else ""


def _ask(pid: int, fd: int) -> _Asked | None:
    if not catches(pid, STACKS_SIGNAL):
        return None  # it would end the process: no client runs in it (yet)
    asked = _Asked(pid, fd, max(os.fstat(fd).st_size, STACKS_OFFSET), blocking(pid, STACKS_SIGNAL))
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, STACKS_SIGNAL)
        if process(pid).state == "T":
            os.kill(pid, signal.SIGCONT)
        return asked
    return None


def _await(asked: _Asked, deadline: float) -> str:
    while is_handling(asked.pid, STACKS_SIGNAL, asked.blocked_before) and time.monotonic() < deadline:
        _pause()
    length = min(os.fstat(asked.fd).st_size - asked.from_byte, TEXT_BYTES_MAX)
    return os.pread(asked.fd, max(length, 0), asked.from_byte).decode(errors="replace")


def _pause() -> None:
    time.sleep(LOOK_S)  # of a wait with a deadline, for what sends no event
