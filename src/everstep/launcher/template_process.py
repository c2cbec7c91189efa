"""One template process, from the agent's side: started, asked, doubted, ended."""

import contextlib
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping

import msgspec

from everstep.errors import EverstepError
from everstep.launcher.death_watch import Surroundings, is_dying
from everstep.launcher.handshake import Handshake
from everstep.launcher.plain import Spawn, spawn_python
from everstep.launcher.template_messages import MESSAGE_BYTES_MAX, Fork, Preload, decode_to_agent, encode

__all__ = ["TemplateGone", "TemplateProcess", "TemplateUnusable"]

LOAD_S = 240.0  # for one import
SEND_S = 10.0
LOAD_POLL_S = 0.25
_CONTROL = 3
_PADDING = "." * 4096  # room for the titles of the workers, which are written over it
_CODE = "from everstep.launcher.template import main; main()"


class TemplateUnusable(EverstepError):
    """No template with these settings will ever do; the message says why."""


class TemplateGone(EverstepError):
    """This template has ended; another may do better. The message goes on after "the template"."""


class TemplateProcess:
    """`start`, `preload` and `end` from one thread, which must last as long as the process; `fork` from any."""

    def __init__(self, around: Surroundings) -> None:
        self._around = around
        self._lock = threading.Lock()
        self._is_ended = False
        self.pid = 0
        self.control, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def start(self, python: str, environment: Mapping[str, str], search_path: str) -> None:
        """Raises WorkerNotStarted."""
        self.control.settimeout(SEND_S)
        program = Spawn(
            python=python,
            code=_CODE,
            args=(str(_CONTROL), str(os.getpid()), search_path, _PADDING),
            environment=environment,
            fds=((self._theirs.fileno(), _CONTROL),),
        )
        self.pid = spawn_python(program)
        self._around.know(self.pid)
        self._theirs.close()

    def preload(self, module: str) -> None:
        self._send(encode(Preload(module=module)), ())

    def await_loaded(self, what: str, is_given_up: Callable[[], bool]) -> None:
        """Raises TemplateUnusable where the import failed, TemplateGone."""
        deadline = time.monotonic() + LOAD_S
        poll = select.poll()
        poll.register(self.control, select.POLLIN)
        while not poll.poll(LOAD_POLL_S * 1000):
            if is_given_up():
                raise TemplateGone("is not needed any more")
            if time.monotonic() >= deadline:
                raise TemplateUnusable(f"importing {what} took more than {LOAD_S:g} s")
        try:
            packet = self.control.recv(MESSAGE_BYTES_MAX)
            if not packet:
                raise TemplateGone(f"ended while it imported {what}")
            error = decode_to_agent(packet).error
        except (OSError, msgspec.MsgspecError) as problem:
            raise TemplateGone(f"said nothing sensible after importing {what}: {problem}") from problem
        if error:
            raise TemplateUnusable(f"importing {what} failed in it: {error}")

    def fork(self, handshake: Handshake) -> None:
        """Have a worker forked, which reports to this handshake. Raises TemplateGone."""
        mutex = handshake.mutex
        self._send(encode(Fork()), (handshake.theirs.fileno(), *([mutex.fd] if mutex is not None else [])))

    def doubt(self) -> None:
        """Nothing came of a fork, and it still runs: it is stopped or stuck, and no good any more."""
        with self._lock:
            if not self._is_ended:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGKILL)

    def is_alive(self) -> bool:
        with self._lock:
            return not self._is_ended and not is_dying(self.pid)

    def end(self) -> None:
        """Kill and reap it."""
        self.control.close()
        self._theirs.close()
        with self._lock:
            self._is_ended = True
            if self.pid:
                with contextlib.suppress(OSError):
                    os.kill(self.pid, signal.SIGKILL)
                    os.waitid(os.P_PID, self.pid, os.WEXITED)
                self._around.forget(self.pid)

    def _send(self, packet: bytes, fds: tuple[int, ...]) -> None:
        try:
            with self._lock:
                if self._is_ended:
                    raise TemplateGone("has ended")
                socket.send_fds(self.control, [packet], list(fds))
        except OSError as error:
            raise TemplateGone(f"takes no orders: {error}") from error
