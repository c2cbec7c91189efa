"""The agent's end of a starting worker's channel: it reports its place, gets the word to go on, and is a process then.

A worker that nobody answers leaves, so that of a start that failed half-way no process remains. See `script` for the
other end.
"""

import contextlib
import os
import select
import signal
import socket
import time
from types import TracebackType

from everstep.launcher import script
from everstep.launcher.death_watch import Surroundings, WatchedProcess, state_of
from everstep.launcher.robust_mutex import RobustMutex
from everstep.launcher.starting import WorkerNotStarted

__all__ = ["Handshake", "WorkerSilent", "WorkerVanished"]

ARRIVE_S = 30.0  # from the fork, or the start of an interpreter, to the report
EXEC_S = 30.0  # from the word to go on to the program's first instruction
LOOK_S = 0.25  # while nothing is heard, between looks at whether a signal has stopped who is to answer


class WorkerVanished(WorkerNotStarted):
    """The process, or the template that was to fork it, ended without a word."""


class WorkerSilent(WorkerVanished):
    """Nothing was heard of it in time: it is stopped or stuck, or the template that was to fork it."""


class Handshake:
    """Context manager around one start. `theirs` and `mutex` go to the worker; the mutex may be missing."""

    def __init__(self, around: Surroundings) -> None:
        self._around = around
        self.started_at = time.monotonic()
        self._ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.mutex: RobustMutex | None = None
        with contextlib.suppress(OSError, AttributeError):  # an old kernel or libc: pidfds alone then
            self.mutex = RobustMutex.create()
        self._pid = 0

    def __enter__(self) -> "Handshake":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ours.close()
        self.theirs.close()
        if self.mutex is not None:
            self.mutex.close_fd()
            self.mutex.unmap()
        if self._pid:  # its start failed; it has seen the channel's end
            self._discard()

    @property
    def pid(self) -> int:
        """Of the worker that reported and waits; 0 before and after."""
        return self._pid

    def await_report(self, timeout_s: float = ARRIVE_S, forked_by: int = 0) -> int:
        """The pid of the worker, which now waits. Raises WorkerVanished, or WorkerNotStarted with its own words.

        `forked_by`: the process that is to fork it; when a signal has stopped that one it is not waited for."""
        self.theirs.close()  # the copy of it that is left is the worker's
        report = self._receive("report", forked_by, timeout_s)
        if not report:
            raise WorkerVanished("the process ended before it came to the script; its stderr may say why")
        _raise_problem(report)
        _, self._pid, is_held = script.REPORT.unpack(report)
        self._around.know(self._pid)
        if not is_held and self.mutex is not None:
            self.mutex.close_fd()
            self.mutex.unmap()
            self.mutex = None
        return self._pid

    def release(self, fds: tuple[int, ...] = ()) -> WatchedProcess:
        """Let it run, and be back when it does. Raises as `await_report`."""
        self._ours.settimeout(EXEC_S)
        if state_of(self._pid) == "T":
            raise WorkerSilent(f"a signal has stopped worker {self._pid}, which was waiting for work")
        try:
            socket.send_fds(self._ours, [script.GO], list(fds))
        except OSError as error:
            raise WorkerVanished(f"worker {self._pid} ended before it was let go on: {error}") from error
        going = self._receive("word of its program", self._pid, EXEC_S)
        _raise_problem(going)
        if going != script.GOING:
            raise WorkerVanished(f"worker {self._pid} ended before it came to its work")
        _raise_problem(self._receive("program", self._pid, EXEC_S))  # nothing, an end, when all is well
        if self.mutex is not None:
            self.mutex.close_fd()
        process = WatchedProcess(self._pid, self.started_at, self.mutex, self._around)
        self._pid, self.mutex = 0, None
        return process

    def _receive(self, what: str, whom: int, timeout_s: float) -> bytes:
        """`whom`: the pid of who is to answer, or 0."""
        deadline = time.monotonic() + timeout_s
        poll = select.poll()
        poll.register(self._ours, select.POLLIN)
        while not poll.poll(LOOK_S * 1000):
            if whom and state_of(whom) == "T":
                raise WorkerSilent(f"no {what} from a starting worker: a signal has stopped process {whom}")
            if time.monotonic() >= deadline:
                raise WorkerSilent(f"no {what} from a starting worker within {timeout_s:g} s")
        try:
            return self._ours.recv(script.PROBLEM_BYTES_MAX + 1)
        except OSError as error:
            raise WorkerVanished(f"no {what} from a starting worker: {error}") from error

    def _discard(self) -> None:
        with contextlib.suppress(OSError):
            os.kill(self._pid, signal.SIGKILL)
            os.waitid(os.P_PID, self._pid, os.WEXITED)
        self._around.forget(self._pid)


def _raise_problem(message: bytes) -> None:
    if message.startswith(script.PROBLEM):
        raise WorkerNotStarted(message[1:].decode(errors="replace"))
