"""The store of a group's workers (MASTER_ADDR, MASTER_PORT): a process of its own, since the agent has no torch."""

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Mapping

from everstep.errors import ConfigError
from everstep.launcher.starting import (
    ExitStatus,
    Launch,
    RunAs,
    Starter,
    WorkerDeath,
    WorkerNotStarted,
    WorkerProcess,
)

__all__ = ["StoreHost", "host_store"]

BACKLOG = 1024
CLOSE_S = 10.0

log = logging.getLogger("everstep.launcher")


class StoreHost:
    """A store that is served, or will be. `address` is what workers connect to; they may from the start."""

    def __init__(self, address: tuple[str, int], listener: socket.socket, on_end: Callable[[ExitStatus], None]) -> None:
        self.address = address
        self._listener = listener
        self._on_end = on_end
        self._lock = threading.Lock()
        self._process: WorkerProcess | None = None  # under the lock
        self._is_closing = False
        self._has_ended = threading.Event()

    @property
    def pid(self) -> int:
        return self._process.pid if self._process is not None else 0

    def begin(self, starter: Starter, launch: Launch) -> None:
        """Raises WorkerNotStarted."""
        with self._listener:
            process = starter.start(launch)
        with self._lock:
            self._process, is_closed = process, self._is_closing
        process.watch(_ignore_death, self._note_end)
        if is_closed:
            process.signal_group(signal.SIGKILL)

    def begin_later(self, starter: Starter, launch: Launch) -> None:
        """Return at once: whoever connects is served when `starter` has loaded what it needs."""
        threading.Thread(target=self._begin, args=(starter, launch), name="everstep-store", daemon=True).start()

    def _begin(self, starter: Starter, launch: Launch) -> None:
        try:
            self.begin(starter, launch)
        except WorkerNotStarted as error:
            if not self._is_closing:
                log.error("the workers' store was not started: %s", error)
                self._on_end(ExitStatus())

    def close(self) -> None:
        """End it. `on_end` is not called for that."""
        with self._lock:
            self._is_closing, process = True, self._process
        if process is not None:
            process.signal_group(signal.SIGKILL)
            self._has_ended.wait(CLOSE_S)

    def _note_end(self, status: ExitStatus) -> None:
        self._has_ended.set()
        if not self._is_closing:
            self._on_end(status)


def host_store(
    starter: Starter,
    host: str,
    environment: Mapping[str, str],
    on_end: Callable[[ExitStatus], None],
    port: int = 0,
) -> StoreHost:
    """Serve a TCPStore on this address of this node; port 0 takes any free one. Back before it answers.

    That is soon, or when `starter` is ready: torch may take longer to load than a round waits for its store's address.
    `host` is what this node binds, and what `address` says. `on_end`, from another thread: it ended uncalled for.
    Raises ConfigError where it cannot listen there, WorkerNotStarted.
    """
    with contextlib.ExitStack() as undo:
        listener = undo.enter_context(_listen(host, port))
        store = StoreHost((host, listener.getsockname()[1]), listener, on_end)
        launch = Launch(
            run_as=RunAs.MODULE,
            target="everstep.launcher.store_server",
            args=(host,),
            environment=environment,
            cwd=os.getcwd(),
            stdin=listener.fileno(),
        )
        if starter.wait_ready(0.0):
            store.begin(starter, launch)
        else:
            store.begin_later(starter, launch)
        undo.pop_all()
    return store


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"the workers' store cannot listen on {host} port {port}: {error.strerror or error}; give another "
            "--master-addr, --local-addr or port"
        ) from error
    return listener


def _ignore_death(_: WorkerDeath) -> None:
    """Its exit status tells all."""
