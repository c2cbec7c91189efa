"""Workers as new interpreters, and new interpreters at all: the way that always works."""

import contextlib
import dataclasses
import fcntl
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future

from everstep.launcher.death_watch import Surroundings
from everstep.launcher.handshake import Handshake
from everstep.launcher.starting import Launch, WorkerNotStarted, WorkerProcess

__all__ = ["PlainStarter", "spawn_python"]

_ABOVE_FIXED = 16
# Without the folder of `-c`, the current one: a file in it may have the name of a standard module.
_PRELUDE = "import sys\nif not getattr(sys.flags, 'safe_path', False): del sys.path[0]\n"
_WORKER = "from everstep.launcher.script import main\nmain()"
_CHANNEL, _MUTEX = 3, 4


class PlainStarter:
    """Starts each worker as `python -u ...`, from one thread that lives until this process ends.

    That thread is the workers' parent: the signal that ends them with the agent comes when the *thread* ends.
    """

    def __init__(self, around: Surroundings, python: str = sys.executable) -> None:
        self._around = around
        self._python = python
        self._thread = _LastingThread("everstep-plain-starter")

    def start(self, launch: Launch) -> WorkerProcess:
        with Handshake(self._around) as handshake:
            mutex = handshake.mutex
            args = [_CHANNEL, _MUTEX if mutex is not None else -1, os.getpid(), launch.cwd, launch.run_as.value]
            program = Spawn(
                python=self._python,
                code=_WORKER,
                args=(*(str(arg) for arg in args), launch.target, *launch.args),
                environment=launch.environment,
                fds=tuple(
                    (fd, number)
                    for fd, number in [
                        (launch.stdin, 0),
                        (launch.stdout, 1),
                        (launch.stderr, 2),
                        (handshake.theirs.fileno(), _CHANNEL),
                        (mutex.fd if mutex is not None else None, _MUTEX),
                    ]
                    if fd is not None
                ),
            )
            pid = self._thread.do(lambda: spawn_python(program))
            self._around.know(pid)
            try:
                handshake.await_report()
                return handshake.release()
            except WorkerNotStarted:
                discard(pid, self._around)
                raise

    def wait_ready(self, _: float, /) -> bool:
        return True

    def close(self) -> None:
        """The thread stays for as long as the workers that it started."""
        self._thread.end_after(self._around)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spawn:
    """An interpreter to start. `fds`: descriptors of this process, and the numbers that they get there."""

    python: str
    code: str
    args: tuple[str, ...]
    environment: Mapping[str, str]
    fds: tuple[tuple[int, int], ...]


def spawn_python(program: Spawn) -> int:
    """The pid of `python -u -c CODE ARGS`, a child of the calling thread. Raises WorkerNotStarted.

    Not by `subprocess`, whose objects reap what others wait for.
    """
    copies: list[tuple[int, int]] = []
    try:
        # Out of the way first: one that is moved to its number must not overwrite another that still has to move.
        for fd, number in program.fds:
            copies.append((fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _ABOVE_FIXED), number))
        actions: list[tuple[int, ...] | tuple[int, int, str, int, int]] = []
        if all(number != 0 for _, number in copies):
            actions.append((os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0))
        actions += [(os.POSIX_SPAWN_DUP2, fd, number) for fd, number in copies]
        return os.posix_spawn(
            program.python,
            [program.python, "-u", "-c", _PRELUDE + program.code, *program.args],
            program.environment,
            file_actions=actions,
            setsigmask=(),
            # Python ignores these two, and an exec hands that on.
            setsigdef=(signal.SIGPIPE, signal.SIGXFSZ),
        )
    except (OSError, ValueError) as error:
        raise WorkerNotStarted(f"{program.python} could not be started: {error}") from error
    finally:
        for fd, _ in copies:
            os.close(fd)


def discard(pid: int, around: Surroundings) -> None:
    """Kill and reap a child that is of no use."""
    with contextlib.suppress(OSError):  # the handshake may have done so
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED)
    around.forget(pid)


class _LastingThread:
    """Starts what it is given, in order, in one daemon thread; the pids are its children, and it outlives them."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._work: queue.SimpleQueue[tuple[Callable[[], int], Future[int]] | Surroundings] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._is_started = False

    def do(self, work: Callable[[], int]) -> int:
        result: Future[int] = Future()
        with self._lock:
            if not self._is_started:
                self._is_started = True
                threading.Thread(target=self._run, name=self._name, daemon=True).start()
        self._work.put((work, result))
        return result.result()

    def end_after(self, around: Surroundings) -> None:
        with self._lock:
            if self._is_started:
                self._work.put(around)
                self._is_started = False  # what comes after has a thread of its own

    def _run(self) -> None:
        pids: list[int] = []
        while not isinstance(item := self._work.get(), Surroundings):
            work, result = item
            try:
                pids.append(work())
                result.set_result(pids[-1])
            except BaseException as error:  # thread boundary: the caller gets it
                result.set_exception(error)
        for pid in pids:
            if item.knows(pid):
                with contextlib.suppress(ChildProcessError):
                    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
