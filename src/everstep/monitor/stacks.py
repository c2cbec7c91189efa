"""All Python stacks of a rank, written by faulthandler in a signal handler: C code, which needs no GIL.

The rank's process and its forked children (DataLoader workers) write into the file behind the page. When a dump has
ended the kernel says: something was written, the signal waits no more, and no thread blocks it that did not before.
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
STARVED_S = 0.8  # longer, for a process that would show its stacks, if only it were given a processor
CHILDREN_MAX = 16
TEXT_BYTES_MAX = 1 << 20
GONE = ("", "Z", "X")


@dataclasses.dataclass(frozen=True)
class StackSource:
    """A rank's process, and the file that it writes to."""

    pid: int
    fd: int


def dump(source: StackSource, deadline: float) -> str:
    """Of the rank and then of its children, until `deadline` on the monotonic clock. Empty when it cannot say.

    STARVED_S later at most on a machine so busy that the rank has not run since.
    """
    asked = _ask(source.pid, source.fd)
    text = _await(asked, deadline, STARVED_S) if asked is not None else ""
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


def _await(asked: _Asked, deadline: float, starved_s: float = 0.0) -> str:
    while _is_unfinished(asked):
        now = time.monotonic()
        if now >= deadline + starved_s or (now >= deadline and process(asked.pid).state != "R"):
            break
        _pause()
    return os.pread(asked.fd, min(_written(asked), TEXT_BYTES_MAX), asked.from_byte).decode(errors="replace")


def _is_unfinished(asked: _Asked) -> bool:
    """Until something is written, too: the kernel takes a signal off its list just before its handler blocks it."""
    if is_handling(asked.pid, STACKS_SIGNAL, asked.blocked_before):
        return True
    return not _written(asked) and process(asked.pid).state not in GONE


def _written(asked: _Asked) -> int:
    return max(os.fstat(asked.fd).st_size - asked.from_byte, 0)


def _pause() -> None:
    time.sleep(LOOK_S)  # of a wait with a deadline, for what sends no event
