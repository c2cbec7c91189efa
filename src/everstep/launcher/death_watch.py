"""A started worker as its agent sees it: how its end is noticed, first and for certain, and what is cleared away then.

Two threads a worker. One waits for the mutex that the worker's main thread holds (`robust_mutex`), which tells 0.2 ms
after the end, whatever memory the worker had; it confirms that by the process's state, since an exec, or the end of
the main thread alone, lets go of the mutex as well. The other waits on the pidfd, reaps the worker, and then whatever
else was in its process group, all of which is killed. Where the system lacks either, the rest still works.
"""

import contextlib
import dataclasses
import logging
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator

from everstep.launcher.oom import OomKills
from everstep.launcher.robust_mutex import RobustMutex
from everstep.launcher.starting import ExitStatus, WorkerDeath

__all__ = ["Surroundings", "WatchedProcess", "is_dying", "reap_orphans", "state_of"]

_log = logging.getLogger("everstep.launcher")

GROUP_END_S = 15.0  # for the rest of a process group; longer only in an uninterruptible wait
CLEAN_S = 5.0  # of them for those that clean up, before they are killed, too
CLEANERS = (b"multiprocessing.resource_tracker", b"torch_shm_manager")
GROUP_POLL_S = 0.005
CONFIRM_S = 0.5  # for the other threads of a dying process to have been told
_PF_EXITING = 0x4
_KILL_PENDING = 1 << (signal.SIGKILL - 1)


class Surroundings:
    """What the workers of one agent share. Any thread.

    `adopts_orphans`: every zombie child of this process in another session is a worker's, and is reaped. For a process
    that starts children in sessions of their own by no other means.
    """

    def __init__(self, *, adopts_orphans: bool = False) -> None:
        self.oom_kills = OomKills.of_this_process()
        self._adopts_orphans = adopts_orphans
        self._lock = threading.Lock()
        self._known: set[int] = set()

    def know(self, pid: int) -> None:
        """A child that somebody else reaps, and then forgets."""
        with self._lock:
            self._known.add(pid)

    def forget(self, pid: int) -> None:
        with self._lock:
            self._known.discard(pid)

    def knows(self, pid: int) -> bool:
        with self._lock:
            return pid in self._known

    def reap_orphans(self) -> None:
        if self._adopts_orphans:
            with self._lock:
                reap_orphans(self._known)


@dataclasses.dataclass(frozen=True)
class _Callbacks:
    on_death: Callable[[WorkerDeath], None]
    on_exit: Callable[[ExitStatus], None]


class WatchedProcess:
    """A worker, from its start until it is reaped; see `starting.WorkerProcess`.

    To be made only for a child of this process that nothing else reaps. `mutex` is one that it holds, and is let go of.
    """

    def __init__(self, pid: int, started_at: float, mutex: RobustMutex | None, around: Surroundings) -> None:
        self.pid = pid
        self.started_at = started_at
        self.pidfd = _open_pidfd(pid)
        self._mutex = mutex
        self._around = around
        # Nobody may signal the group once the leader is reaped: its number may be somebody else's then.
        self._lock = threading.Lock()
        self._is_reaped = False
        self._is_killed_by_us = False
        self._is_told = False
        self._telling = threading.Lock()  # held during on_death, so that on_exit comes after it
        self._callbacks: _Callbacks | None = None

    def watch(self, on_death: Callable[[WorkerDeath], None], on_exit: Callable[[ExitStatus], None]) -> None:
        assert self._callbacks is None, "watched twice"
        self._callbacks = _Callbacks(on_death, on_exit)
        threading.Thread(target=self._wait_for_exit, name=f"everstep-exit-{self.pid}", daemon=True).start()
        if self._mutex is not None:
            threading.Thread(target=self._wait_for_mutex, name=f"everstep-death-{self.pid}", daemon=True).start()

    def signal_group(self, number: int) -> None:
        with self._lock:
            if not self._is_reaped:
                self._is_killed_by_us |= number == signal.SIGKILL
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.pid, number)

    def state(self) -> str:
        with self._lock:
            return "" if self._is_reaped else state_of(self.pid)

    def _wait_for_mutex(self) -> None:
        assert self._mutex is not None
        had_holder = self._mutex.wait()
        self._mutex.unmap()
        at = time.monotonic()
        if had_holder and self._is_confirmed():
            self._note_death(WorkerDeath(at=at, seen_by="mutex"))

    def _is_confirmed(self) -> bool:
        deadline = time.monotonic() + CONFIRM_S
        while True:
            with self._lock:
                if self._is_reaped or is_dying(self.pid):
                    return True
            # Its main thread may end a moment before the word to the other threads is out (pthread_exit at the end).
            if not _is_thread_ending(self.pid) or time.monotonic() >= deadline:
                return False
            time.sleep(0.001)

    def _wait_for_exit(self) -> None:
        if self.pidfd >= 0:
            poll = select.poll()
            poll.register(self.pidfd, select.POLLIN)
            poll.poll()
        else:
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        self._note_death(WorkerDeath(at=time.monotonic(), seen_by="pidfd"))
        self._kill_rest()  # again: until it was dead, it may have started something after the first time
        status = self._reap()
        assert self._callbacks is not None
        self._callbacks.on_exit(status)
        _end_group(self.pid)
        self._around.reap_orphans()

    def _note_death(self, death: WorkerDeath) -> None:
        with self._telling:
            if self._is_told:
                return
            self._is_told = True
            assert self._callbacks is not None
            self._callbacks.on_death(death)
            # Not before: it is for milliseconds that the callback exists.
            self._kill_rest()

    def _kill_rest(self) -> None:
        with self._lock:
            if not self._is_reaped:
                _kill_members(self.pid)

    def _reap(self) -> ExitStatus:
        with self._lock:
            try:
                result = os.waitid(os.P_PID, self.pid, os.WEXITED)
            except ChildProcessError:  # somebody else in this process waits for any child
                result = None
            self._is_reaped = True
            self._around.forget(self.pid)
            if self.pidfd >= 0:
                os.close(self.pidfd)
                self.pidfd = -1
        if result is None:
            _log.warning("process %d ended, and its exit status was taken by another part of this process", self.pid)
            return ExitStatus()
        if result.si_code == os.CLD_EXITED:
            self._around.oom_kills.explains(is_killed=False)
            return ExitStatus(code=result.si_status)
        is_killed = result.si_status == signal.SIGKILL and not self._is_killed_by_us
        return ExitStatus(signal=result.si_status, is_oom_killed=self._around.oom_kills.explains(is_killed=is_killed))


def state_of(pid: int) -> str:
    """R, S, D, T, Z, X as /proc has it; "" where there is no such process."""
    fields = _stat(f"/proc/{pid}/stat")
    return fields[0] if fields else ""


def is_dying(pid: int) -> bool:
    """Whether no thread of it will run its own code again: each is ending, or has a SIGKILL waiting."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return True
    return all(
        _is_ending(f"/proc/{pid}/task/{thread}/stat") or _has_kill_pending(f"/proc/{pid}/task/{thread}/status")
        for thread in threads
    )


def reap_orphans(known: set[int]) -> None:
    """Reap each zombie child of this process that is neither known nor of this process's own session."""
    me, session = os.getpid(), os.getsid(0)
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) in known:
            continue
        fields = _stat(f"/proc/{name}/stat")
        if fields and fields[0] == "Z" and int(fields[1]) == me and int(fields[3]) != session:
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, int(name), os.WEXITED | os.WNOHANG)


def _kill_members(leader: int) -> int:
    """Kill what a dead leader leaves, DataLoader workers, subprocesses; how many are still there.

    But not who removes what the dead left in shared memory, and ends by itself then.
    """
    members = [int(name) for name in os.listdir("/proc") if name.isdigit() and _is_member(int(name), leader)]
    for pid in members:
        command = _command_line(pid)
        # None: a zombie, or in the middle of an exec, perhaps of one of those; the next look tells.
        if command and not any(word in command for word in CLEANERS):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
    return len(members)


def _end_group(leader: int) -> None:
    """See to it that nobody of a reaped leader's group is left, and reap those that became this process's children."""
    clean_until = time.monotonic() + CLEAN_S
    for _ in _polls(time.monotonic() + GROUP_END_S):
        with contextlib.suppress(ChildProcessError):
            while os.waitid(os.P_PGID, leader, os.WEXITED | os.WNOHANG) is not None:
                pass
        if not _kill_members(leader):
            return
        if time.monotonic() >= clean_until:
            with contextlib.suppress(OSError):
                os.killpg(leader, signal.SIGKILL)
    _log.warning("processes of worker %d's group are still there %g s after SIGKILL", leader, GROUP_END_S - CLEAN_S)


def _is_member(pid: int, leader: int) -> bool:
    if pid == leader:
        return False
    fields = _stat(f"/proc/{pid}/stat")
    return bool(fields) and int(fields[2]) == leader


def _command_line(pid: int) -> bytes:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read()
    except OSError:
        return b""


def _polls(deadline: float) -> Iterator[None]:
    while time.monotonic() < deadline:
        yield
        time.sleep(GROUP_POLL_S)


def _open_pidfd(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except (OSError, AttributeError):  # before Linux 5.3, or forbidden: plain waits do
        return -1


def _is_thread_ending(pid: int) -> bool:
    return _is_ending(f"/proc/{pid}/stat")


def _is_ending(path: str) -> bool:
    fields = _stat(path)
    return not fields or fields[0] in "ZX" or bool(int(fields[6]) & _PF_EXITING)


def _has_kill_pending(path: str) -> bool:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            pending = next((line for line in file if line.startswith("SigPnd:")), "SigPnd: 0")
    except OSError:
        return True
    return bool(int(pending.split()[1], 16) & _KILL_PENDING)


def _stat(path: str) -> list[str]:
    """The fields after the name: state, parent, group, session, ..."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return []
