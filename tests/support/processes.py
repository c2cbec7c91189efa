"""Real processes for tests: started, heard line by line, killed by pid, and gone at the end."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO

from tests.support import proc
from tests.support.waiting import wait_until

DEADLINE_S = 20.0
KILL_TIMEOUT_S = 5.0
OUTPUT_SHOWN_CHARS = 4000


class Spawned:
    """A python process in a session of its own. Its output goes to `stdout_path` and `stderr_path` as it comes."""

    def __init__(self, process: subprocess.Popen[bytes], stdout_path: Path, stderr_path: Path) -> None:
        self.process = process
        self.pid = process.pid
        self.stdout_path = stdout_path
        self.stderr_path = stderr_path
        self._lines: list[str] = []
        self._read = 0
        self._is_at_end = False
        self._changed = threading.Condition()
        self._reader: threading.Thread | None = None

    def start_reading(self) -> None:
        """Drain stdout from now on, so that the child never blocks on a full pipe."""
        self._reader = threading.Thread(target=self._drain, name=f"stdout of {self.pid}", daemon=True)
        self._reader.start()

    def read_line(self, deadline_s: float = DEADLINE_S) -> str:
        """The next line of stdout without its newline; fails at the end of output or after `deadline_s`."""
        return self.expect_line(lambda _line: True, deadline_s)

    def expect_line(self, wanted: str | Callable[[str], object], deadline_s: float = DEADLINE_S) -> str:
        """The next line that contains (or satisfies) `wanted`; lines before it are passed over."""
        fits = (lambda line: wanted in line) if isinstance(wanted, str) else wanted
        deadline = time.monotonic() + deadline_s
        with self._changed:
            while True:
                while self._read < len(self._lines):
                    line = self._lines[self._read]
                    self._read += 1
                    if fits(line):
                        return line
                if self._is_at_end:
                    raise AssertionError(f"output ended without {wanted!r}\n{self.output()}")
                if not self._changed.wait(deadline - time.monotonic()):
                    raise AssertionError(f"no {wanted!r} within {deadline_s:g} s\n{self.output()}")

    def send(self, text: str) -> None:
        """Write a line to its stdin."""
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode() + b"\n")
        self.process.stdin.flush()

    def wait(self, deadline_s: float = DEADLINE_S) -> int:
        """Its exit status (minus the signal's number when a signal ended it)."""
        try:
            return self.process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {deadline_s:g} s\n{self.output()}") from None

    def kill(self, with_signal: int = signal.SIGKILL) -> None:
        """Signal this one process; its children live on. `wait()` says when it has ended."""
        self.process.send_signal(with_signal)  # Popen: never another process that got the pid meanwhile

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def output(self) -> str:
        """The end of both outputs, for a failing test's message."""
        out = self.stdout_path.read_text(errors="replace")[-OUTPUT_SHOWN_CHARS:]
        err = self.stderr_path.read_text(errors="replace")[-OUTPUT_SHOWN_CHARS:]
        return f"--- stdout of {self.pid}\n{out}\n--- stderr of {self.pid}\n{err}"

    def end(self) -> list[str]:
        """Kill what is left of the session, close everything; returns a line for each process that was still there."""
        left = proc.of_session(self.pid)
        lines = [f"process {stat.pid}: {proc.command_line(stat.pid)[:200]}" for stat in left]
        deadline = time.monotonic() + KILL_TIMEOUT_S
        while left:  # again, since a process may fork while it is being killed
            for stat in left:
                _kill(stat)
            if self.process.poll() is None:
                self.wait(KILL_TIMEOUT_S)
            assert time.monotonic() < deadline, f"survived SIGKILL: {left}"
            wait_until(partial(_all_ended, left), KILL_TIMEOUT_S)
            left = proc.of_session(self.pid)
        self.process.wait(KILL_TIMEOUT_S)
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
        if self._reader is not None:
            self._reader.join(KILL_TIMEOUT_S)
            assert not self._reader.is_alive(), f"a process outside its session holds the stdout of {self.pid}"
        return lines

    def _drain(self) -> None:
        pipe: IO[bytes] | None = self.process.stdout
        assert pipe is not None
        with pipe, self.stdout_path.open("wb", buffering=0) as copy:
            for line in pipe:
                copy.write(line)
                with self._changed:
                    self._lines.append(line.decode(errors="replace").rstrip("\n"))
                    self._changed.notify_all()
        with self._changed:
            self._is_at_end = True
            self._changed.notify_all()


class Spawner:
    """Starts python processes and answers for them; a context manager. The `spawn` fixture hands one to a test."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._spawned: list[tuple[Spawned, bool]] = []

    def __call__(
        self, argv: Sequence[str], *, env: Mapping[str, str | None] | None = None, until_teardown: bool = False
    ) -> Spawned:
        """Run `python argv...`, e.g. `["-m", "everstep.sim", "--seed", "7"]` or `["-c", source]`.

        `env` is laid over this process's environment (None removes a name). A test ends its processes itself, and
        fails when one is left; `until_teardown` is for a server that may simply be killed afterwards.
        """
        number = len(self._spawned)
        stdout_path = self._folder / f"child{number}.stdout"
        stderr_path = self._folder / f"child{number}.stderr"
        stdout_path.touch()
        environment = dict(os.environ) | {k: v for k, v in (env or {}).items() if v is not None}
        for name in [name for name, value in (env or {}).items() if value is None]:
            environment.pop(name, None)
        with stderr_path.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-u", *argv],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,
            )
        spawned = Spawned(process, stdout_path, stderr_path)
        self._spawned.append((spawned, until_teardown))
        spawned.start_reading()
        return spawned

    def __enter__(self) -> "Spawner":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end_all()

    def end_all(self) -> None:
        """End everything, the youngest first; fails when a process survived that should have ended."""
        survivors: list[str] = []
        for spawned, until_teardown in reversed(self._spawned):
            was_alive = spawned.is_alive()
            left = spawned.end()
            if left and not (until_teardown and was_alive):
                survivors += [*left, spawned.output()]
        self._spawned.clear()
        assert not survivors, "processes outlived the test that started them:\n" + "\n".join(survivors)


def _kill(stat: proc.Stat) -> None:
    if proc.is_same_alive(stat):
        with contextlib.suppress(ProcessLookupError):
            os.kill(stat.pid, signal.SIGKILL)


def _all_ended(stats: list[proc.Stat]) -> bool:
    return not any(proc.is_same_alive(stat) for stat in stats)
