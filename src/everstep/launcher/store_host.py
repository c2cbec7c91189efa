"""The store of a group's workers (MASTER_ADDR, MASTER_PORT): a process of its own, since the agent has no torch."""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Mapping

from everstep.errors import ConfigError
from everstep.launcher.starting import ExitStatus, Launch, RunAs, Starter, WorkerDeath, WorkerProcess

__all__ = ["StoreHost", "host_store"]

BACKLOG = 1024
CLOSE_S = 10.0


class StoreHost:
    """A store that is served. `address` is what workers connect to; they may from the start."""

    def __init__(self, address: tuple[str, int], process: WorkerProcess, on_end: Callable[[ExitStatus], None]) -> None:
        self.address = address
        self._process = process
        self._on_end = on_end
        self._is_closing = False
        self._has_ended = threading.Event()

    @property
    def pid(self) -> int:
        return self._process.pid

    def watch(self) -> None:
        self._process.watch(_ignore_death, self._note_end)

    def close(self) -> None:
        """End it. `on_end` is not called for that."""
        self._is_closing = True
        self._process.signal_group(signal.SIGKILL)
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
    """Serve a TCPStore on this address of this node; port 0 takes any free one. Back before it answers, which is soon.

    `host` is what this node binds, and what `address` says. `on_end`, from another thread: it ended uncalled for.
    Raises ConfigError where it cannot listen there, WorkerNotStarted.
    """
    with contextlib.ExitStack() as undo:
        listener = undo.enter_context(_listen(host, port))
        process = starter.start(
            Launch(
                run_as=RunAs.MODULE,
                target="everstep.launcher.store_server",
                args=(host,),
                environment=environment,
                cwd=os.getcwd(),
                stdin=listener.fileno(),
            )
        )
        bound: int = listener.getsockname()[1]
    store = StoreHost((host, bound), process, on_end)
    store.watch()
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
