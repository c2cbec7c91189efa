"""The TCPStore in which a quorum's members find each other: hosting one, and connecting to one by a socket we know."""

import contextlib
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import TypeVar
from weakref import WeakValueDictionary

from everstep import fork_guard
from everstep.collectives.sockets import Address, Ends, OpenSocket, close_on_exec, find_sockets, joined, open_sockets
from everstep.collectives.torch_private import TCPStore
from everstep.errors import PeerLost, StepInterrupted

CONNECT_TIMEOUT_S = 10.0
_TORCH_CONNECT_TIMEOUT = timedelta(seconds=0.5)
ATTEMPTS_MAX = 20
_BACKLOG = 1024
_POLL_MS = 5  # how soon a connect that is under way notices that it was severed

_Opened = TypeVar("_Opened")


class HostedStore:
    """A TCPStore server of this process, on one address only; torch's own listens on every interface."""

    def __init__(self, bind_host: str) -> None:
        self._bind_host = bind_host
        self._listener: Address | None = None
        self._store: TCPStore | None = None
        self._lift_guard: Callable[[], None] | None = None

    def start(self) -> None:
        """Listen on a free port; waits for nobody. Raises OSError when `bind_host` is not an address of this host."""
        family, kind, protocol, _, target = socket.getaddrinfo(self._bind_host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as server:
            server.bind(target)
            server.listen(_BACKLOG)
            self._listener = (server.getsockname()[0], server.getsockname()[1])
            self._lift_guard = fork_guard.guard(self._fds)
            host, port = self._listener
            self._store = TCPStore(
                host, port, is_master=True, wait_for_workers=False, multi_tenant=False, master_listen_fd=server.detach()
            )

    @property
    def store(self) -> TCPStore:
        assert self._store is not None, "start() it first"
        return self._store

    @property
    def address(self) -> str:
        """`host:port` for `Membership.store`."""
        assert self._listener is not None, "start() it first"
        return joined(self._listener)

    def close(self) -> None:
        """Stop serving: members that still build with it fail. Idempotent."""
        if self._lift_guard is not None:
            self._lift_guard()
        self._store = None

    def __enter__(self) -> "HostedStore":
        if self._store is None:
            self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _fds(self) -> Iterable[int]:
        served = self._listener

        def is_ours(ends: Ends) -> bool:
            return served is not None and (ends.local[1] == served[1] or ends.remote == served)

        return [opened.fd for opened in find_sockets(is_ours)]


def host_store(bind_host: str = "127.0.0.1") -> HostedStore:
    """A running store server: `hosted.address` is for the members, `hosted.store` for use here, `hosted.close()`."""
    hosted = HostedStore(bind_host)
    hosted.start()
    return hosted


@dataclass(frozen=True)
class StoreClient:
    """A connection to a store, and the socket by which it can be severed."""

    store: TCPStore
    socket: OpenSocket


def connect_store(address: Address, timeout_s: float, is_severed: Callable[[], bool]) -> StoreClient:
    """Connect; gives up with StepInterrupted within milliseconds once `is_severed`, with PeerLost when nobody listens.

    `timeout_s` is the store's own, for later waits.
    """
    deadline = time.monotonic() + CONNECT_TIMEOUT_S
    while True:
        numeric = _await_listening(address, deadline, is_severed)

        def connect(numeric: Address = numeric) -> TCPStore:
            # Somebody listened a moment ago. torch tries for long if he is gone by now, and cannot be interrupted.
            return TCPStore(*numeric, is_master=False, wait_for_workers=False, timeout=_TORCH_CONNECT_TIMEOUT)

        try:
            store, opened = open_recognised(connect, lambda ends: ends.remote == numeric, scope=numeric)  # noqa: B023
        except RuntimeError:
            if time.monotonic() >= deadline:
                raise
            continue
        store.set_timeout(timedelta(seconds=timeout_s))
        return StoreClient(store, opened)


def open_recognised(
    open_it: Callable[[], _Opened], matches: Callable[[Ends], bool], scope: object
) -> tuple[_Opened, OpenSocket]:
    """What `open_it` opens, and its one matching socket.

    Our own threads take turns within one `scope`, so that what they open never gets confused.

    What torch opens is new and matches; so may be what another thread opens at that instant. When more than one socket
    is new, nobody can tell whose they are: open once more.
    """
    for _ in range(ATTEMPTS_MAX):
        with _turn(scope):
            before = open_sockets()
            opened = open_it()
            found = find_sockets(matches, among=open_sockets() - before)
        if len(found) == 1:
            close_on_exec(found)
            return opened, found[0]
        del opened
    raise StepInterrupted(f"could not tell this group's sockets from others, {ATTEMPTS_MAX} times in a row")


def _await_listening(address: Address, deadline: float, is_severed: Callable[[], bool]) -> Address:
    """A trial connection, since torch's own cannot be interrupted; returns the numeric address that answered."""
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise PeerLost(f"the store's host {address[0]} is unknown: {error}") from None
    with socket.socket(family, kind, protocol) as trial:
        trial.setblocking(False)
        trial.connect_ex(target)
        poll = select.poll()  # select() knows no descriptor above 1023
        poll.register(trial, select.POLLOUT)
        while not poll.poll(_POLL_MS):
            if is_severed():
                raise StepInterrupted("aborted while connecting to the store")
            if time.monotonic() >= deadline:
                raise PeerLost(f"the store at {joined(address)} did not answer within {CONNECT_TIMEOUT_S:g} s")
        error_number = trial.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if error_number:
        raise PeerLost(f"nothing listens at the store's address {joined(address)}: {os.strerror(error_number)}")
    return str(target[0]), int(target[1])


class _Turn:
    """A lock that a WeakValueDictionary can hold."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


_turns: WeakValueDictionary[object, _Turn] = WeakValueDictionary()
_turns_lock = threading.Lock()


@contextlib.contextmanager
def _turn(scope: object) -> Iterator[None]:
    with _turns_lock:
        turn = _turns.setdefault(scope, _Turn())
    with turn.lock:
        yield


def _renew_locks() -> None:
    """In a forked child, where the thread that held one is not."""
    global _turns, _turns_lock
    _turns = WeakValueDictionary()
    _turns_lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_locks)
