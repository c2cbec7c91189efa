"""Nothing is left behind (DESIGN I6): processes, threads, listening sockets, shared memory, temporary files.

What exists is noted after each test module, with the module's name, and judged once, after the last fixture is gone:
a server that several modules share is no leak, and what is one still bears the name of the module that made it.
"""

import gc
import os
import tempfile
import threading
from pathlib import Path

from tests.support import proc
from tests.support.waiting import wait_until

SHARED_MEMORY = Path("/dev/shm")
END_TIMEOUT_S = 3.0
# Helpers of multiprocessing that live until the interpreter ends, by its own design.
INTERPRETER_OWNED = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")
# Where the fork server listens; the cache that torch makes when the first optimizer is built in this process; where
# torchrun keeps logs, and leaves them.
INTERPRETER_TEMP = ("pymp-", "torchinductor_", "torchelastic_")
# In a folder that older torches (2.6) make in every process, and leave where one is killed.
TORCHS_OWN_FILE = "_remote_module_non_scriptable.py"


class LeakWatch:
    """Compares this process and its surroundings with how they were at construction.

    `temp_dir` must be the TMPDIR of this test session and of no other: temporary files are looked for in it, and
    processes whose parent has died are recognised by having it in their environment.
    """

    def __init__(self, temp_dir: Path) -> None:
        self._temp_dir = temp_dir
        self._before = self._existing() | {f"shared memory {path}" for path in _shared_memory()}
        self._origins: dict[str, str] = {}

    def note(self, origin: str) -> None:
        """Ascribe whatever is new to `origin`, the test module that has just ended."""
        for thing in self._new():
            self._origins.setdefault(thing, origin)

    def leaks(self, timeout_s: float = END_TIMEOUT_S) -> list[str]:
        """What is still there after `timeout_s`, one line each."""
        gc.collect()  # a socket in a reference cycle is closed late, but it is closed
        try:
            wait_until(lambda: not self._new(), timeout_s)
        except AssertionError:
            return [f"{thing}, from {self._origins.get(thing, 'the last fixtures')}" for thing in sorted(self._new())]
        return []

    def _new(self) -> set[str]:
        return (self._existing() | self._orphaned_shared_memory()) - self._before

    def _existing(self) -> set[str]:
        me = os.getpid()
        processes = {s.pid: s for s in proc.descendants(me) + proc.with_environment(f"TMPDIR={self._temp_dir}")}
        processes.pop(me, None)
        commands = {f"process {pid}: {command}" for pid in processes if not _is_exempt(command := _command(pid))}
        threads = {f"thread {t.name!r}" for t in threading.enumerate() if _counts(t)}
        sockets = {f"listening socket {socket}" for socket in proc.listening_sockets(me)}
        files = {f"temporary file {path}" for path in self._temp_dir.glob("*") if not _is_interpreters(path)}
        return commands | threads | sockets | files

    def _orphaned_shared_memory(self) -> set[str]:
        """New files that no live process uses. A file that another test session has open is that session's affair."""
        new = {path for path in _shared_memory() if f"shared memory {path}" not in self._before}
        return {f"shared memory {path}" for path in new - proc.mapped_files()} if new else set()


def _is_interpreters(path: Path) -> bool:
    return path.name.startswith(INTERPRETER_TEMP) or (path / TORCHS_OWN_FILE).exists()


def _command(pid: int) -> str:
    return proc.command_line(pid)[:200]


def _is_exempt(command: str) -> bool:
    return command in ("", "(ended)") or any(name in command for name in INTERPRETER_OWNED)


def _counts(thread: threading.Thread) -> bool:
    # A thread of torch that once ran Python shows up as a dummy for ever.
    return thread.is_alive() and not isinstance(thread, threading._DummyThread)


def _shared_memory() -> set[str]:
    return {str(path) for path in SHARED_MEMORY.glob("*")} if SHARED_MEMORY.is_dir() else set()


def use_temp_dir(path: Path) -> None:
    """Make `path` this session's TMPDIR, for this process and all that it starts."""
    os.environ["TMPDIR"] = str(path)
    tempfile.tempdir = str(path)
