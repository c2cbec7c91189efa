"""What it means to start a worker: what to run, the process that came of it, and how its end is told.

Two starters answer: `plain.PlainStarter` (a new interpreter each time) and `template_client.TemplateStarter` (a fork
of a process that has imported torch already).
"""

import enum
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from everstep.errors import EverstepError

__all__ = ["ExitStatus", "Launch", "RunAs", "Starter", "WorkerDeath", "WorkerNotStarted", "WorkerProcess"]


class WorkerNotStarted(EverstepError):
    """No process came of a launch: the program is missing, or the system gave none; the message says which."""


class RunAs(enum.Enum):
    """How `Launch.target` is run."""

    SCRIPT = "script"  # python script.py
    MODULE = "module"  # python -m module
    COMMAND = "command"  # any program, looked up in the PATH of the launch's environment


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One worker to start. `environment` is all of it; nothing is added from the agent's own.

    `stdin`, `stdout`, `stderr`: descriptors of the agent that the worker gets as its 0, 1 and 2 (it gets duplicates;
    the caller keeps its own, and may close them once `start` is back). None: /dev/null, and the agent's own two.
    """

    run_as: RunAs
    target: str
    args: tuple[str, ...] = ()
    environment: Mapping[str, str]
    cwd: str
    stdin: int | None = None
    stdout: int | None = None
    stderr: int | None = None


@dataclass(frozen=True, kw_only=True)
class ExitStatus:
    """How a process ended: `code` where it exited, `signal` where one ended it, neither where nobody could read it."""

    code: int | None = None
    signal: int | None = None
    is_oom_killed: bool = False

    @property
    def is_clean(self) -> bool:
        return self.code == 0

    def describe(self) -> str:
        """For a log line: "exit code 3", "signal 9 (SIGKILL, out of memory)"."""
        if self.signal is not None:
            return f"signal {self.signal} ({_signal_name(self.signal)}{', out of memory' * self.is_oom_killed})"
        return "unknown exit status" if self.code is None else f"exit code {self.code}"


@dataclass(frozen=True, kw_only=True)
class WorkerDeath:
    """The first that was known of a worker's end. `at` is an instant of `time.monotonic`."""

    at: float
    seen_by: Literal["mutex", "pidfd"]


class WorkerProcess(Protocol):
    """A started worker: leader of a session and process group of its own, and a child of this process."""

    @property
    def pid(self) -> int: ...

    @property
    def pidfd(self) -> int:
        """Of the process while it is watched or not yet reaped; -1 where the system has none, and after its exit."""

    @property
    def started_at(self) -> float:
        """The instant (`time.monotonic`) at which `start` was called."""

    def watch(self, on_death: Callable[[WorkerDeath], None], on_exit: Callable[[ExitStatus], None]) -> None:
        """Call `on_death` as early as its end is known, then `on_exit` once it is reaped: each once, on other threads.

        To be called once. Where it ended before, both come at once. The callbacks must be quick, and not raise.
        """

    def signal_group(self, number: int) -> None:
        """Send a signal to its whole process group; nothing where all of that is gone. Any thread."""

    def state(self) -> str:
        """Its state as in /proc: R S D T Z X, or "" where it is gone. Any thread."""


class Starter(Protocol):
    """Starts workers; any thread may."""

    def start(self, launch: Launch) -> WorkerProcess:
        """Start one, and be back when its pid is known. Raises WorkerNotStarted."""

    def wait_ready(self, timeout_s: float, /) -> bool:
        """Whether nothing has to be loaded any more before `start` can do it, within so many seconds. Any thread."""

    def close(self) -> None:
        """Let go of what starting needs. Workers that run go on; they are still watched."""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "real-time signal" if number >= signal.SIGRTMIN else "unknown signal"
