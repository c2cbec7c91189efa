"""Workers as tests see them: started by a real starter, their output read, their end awaited."""

import contextlib
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from everstep.launcher.starting import ExitStatus, Launch, RunAs, Starter, WorkerDeath, WorkerProcess
from tests.support.waiting import wait_until

DEADLINE_S = 30.0


def environment(**more: str) -> dict[str, str]:
    """What a worker gets: this process's, one thread for each, and no colours in tracebacks."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON_COLORS": "0", **more}


class Worker:
    """A started worker. Context manager: it has ended, and its group with it, when the block has."""

    def __init__(self, starter: Starter, launch: Launch) -> None:
        self._reads, writes = os.pipe()
        self._error_reads, error_writes = os.pipe()
        fields = {name: getattr(launch, name) for name in launch.__dataclass_fields__}
        fields |= {"stdout": writes, "stderr": error_writes}
        try:
            self.asked_at = time.monotonic()
            self.process: WorkerProcess = starter.start(Launch(**fields))
            self.started_s = time.monotonic() - self.asked_at
        except BaseException:
            os.close(self._reads)
            os.close(self._error_reads)
            raise
        finally:
            os.close(writes)
            os.close(error_writes)
        self.deaths: queue.SimpleQueue[WorkerDeath] = queue.SimpleQueue()
        self.exits: queue.SimpleQueue[ExitStatus] = queue.SimpleQueue()
        self.has_ended = threading.Event()
        self._lines: queue.SimpleQueue[tuple[float, str]] = queue.SimpleQueue()
        self.out, self.err = bytearray(), bytearray()
        self._readers = [
            threading.Thread(target=self._read, args=(self._reads, self.out), daemon=True),
            threading.Thread(target=self._read, args=(self._error_reads, self.err), daemon=True),
        ]
        for reader in self._readers:
            reader.start()
        self.process.watch(self.deaths.put, self._note_exit)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.process.signal_group(9)
        assert self.has_ended.wait(DEADLINE_S)
        for reader in self._readers:
            reader.join(DEADLINE_S)

    @property
    def pid(self) -> int:
        return self.process.pid

    def read_line(self) -> str:
        return self.read_timed_line()[1]

    def read_timed_line(self) -> tuple[float, str]:
        """The next line of its stdout, and when it came."""
        try:
            return self._lines.get(timeout=DEADLINE_S)
        except queue.Empty:
            raise AssertionError(f"no line within {DEADLINE_S:g} s; stderr: {self.err.decode()}") from None

    def wait(self) -> ExitStatus:
        """Its exit status, once its output is read to the end, too."""
        status = self.exits.get(timeout=DEADLINE_S)
        for reader in self._readers:
            reader.join(DEADLINE_S)
        return status

    def _note_exit(self, status: ExitStatus) -> None:
        self.exits.put(status)
        self.has_ended.set()

    def _read(self, fd: int, into: bytearray) -> None:
        rest = b""
        while chunk := os.read(fd, 65536):
            at = time.monotonic()
            into += chunk
            if into is self.out:
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    self._lines.put((at, line.decode()))
        os.close(fd)


class Scripts:
    """A folder of scripts, and launches of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def script(self, text: str, *args: str, name: str = "script.py", **more: str) -> Launch:
        (self.folder / name).write_text(text)
        return self.launch(RunAs.SCRIPT, name, *args, **more)

    def launch(self, run_as: RunAs, target: str, *args: str, **more: str) -> Launch:
        return Launch(run_as=run_as, target=target, args=args, environment=environment(**more), cwd=str(self.folder))


def without_python(command: list[str]) -> Launch:
    return Launch(
        run_as=RunAs.COMMAND, target=command[0], args=tuple(command[1:]), environment=environment(), cwd=os.getcwd()
    )


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    """This process has no more descriptors and threads after the block than before."""
    before = _own()
    yield
    wait_until(
        lambda: all(after <= was for after, was in zip(_own(), before, strict=True)),
        what=f"no more than {before} descriptors and threads",
    )


def _own() -> tuple[int, int]:
    return len(os.listdir("/proc/self/fd")), threading.active_count()


PYTHON = sys.executable
