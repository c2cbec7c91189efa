"""A member's connection to a store: connecting and meeting can be cut off at any moment, from any thread."""

import contextlib
import os
import select
import socket
import threading
import time
from collections.abc import Callable

import msgspec

from everstep.collectives.sockets import Address, joined
from everstep.collectives.store import (
    LENGTH,
    REPLY_BYTES_MAX,
    AskMissing,
    Bring,
    Gathered,
    Left,
    Missing,
    Reply,
    Request,
    frame,
)
from everstep.errors import PeerLost, StepInterrupted

CONNECT_TIMEOUT_S = 10.0
MISSING_TIMEOUT_S = 1.0
_POLL_MS = 5  # how soon a connect that is under way notices that it was severed

_decoder: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


class StoreClient:
    """One thread at a time meets; `sever` may come from any thread."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()  # held for an instant: a descriptor that was closed may be another's by now
        self._is_closed = False

    def gather(self, key: str, rank: int, size: int, value: bytes, timeout_s: float) -> list[bytes]:
        """Bring `value`, wait for everybody's; in rank order. Raises PeerLost, naming who left or did not come."""
        deadline = time.monotonic() + timeout_s
        try:
            self._send(Bring(key, rank, size, value), deadline)
            reply = self._receive(deadline)
        except TimeoutError:
            missing = self._ask_missing(key)
            peer = missing[0] if missing else None
            raise PeerLost(f"ranks {missing} did not come within {timeout_s:g} s", peer) from None
        if isinstance(reply, Left):
            raise PeerLost(f"rank {reply.rank} left while the group was being built", reply.rank)
        if not isinstance(reply, Gathered) or len(reply.values) != size:
            raise PeerLost("the store sent something else than it was asked for")
        return reply.values

    def sever(self) -> None:
        """Whoever waits for an answer gets PeerLost at once."""
        with self._lock:
            if not self._is_closed:
                with contextlib.suppress(OSError):
                    self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Only when no thread meets. Idempotent."""
        with self._lock:
            self._is_closed = True
            self._sock.close()

    def fileno(self) -> int:
        """-1 once it is closed."""
        return self._sock.fileno()

    def _ask_missing(self, key: str) -> list[int]:
        deadline = time.monotonic() + MISSING_TIMEOUT_S
        try:
            self._send(AskMissing(key), deadline)
            reply = self._receive(deadline)
        except (TimeoutError, PeerLost):
            return []
        return reply.ranks if isinstance(reply, Missing) else []

    def _send(self, request: Request, deadline: float) -> None:
        self._sock.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            self._sock.sendall(frame(request))
        except TimeoutError:
            raise
        except OSError as error:
            raise PeerLost(f"the store is gone: {error.strerror or error}") from None

    def _receive(self, deadline: float) -> Reply:
        (length,) = LENGTH.unpack(self._read(LENGTH.size, deadline))
        if length > REPLY_BYTES_MAX:
            raise PeerLost("the store sent something that is too long")
        try:
            return _decoder.decode(self._read(length, deadline))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise PeerLost(f"the store sent something illegible: {error}") from None

    def _read(self, count: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < count:
            self._sock.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                more = self._sock.recv(count - len(data))
            except TimeoutError:
                raise
            except OSError as error:
                raise PeerLost(f"the store is gone: {error.strerror or error}") from None
            if not more:
                raise PeerLost("the store is gone: it closed the connection")
            data += more
        return bytes(data)


def connect_store(address: Address, is_severed: Callable[[], bool]) -> StoreClient:
    """Connect; raises StepInterrupted within milliseconds once `is_severed`, PeerLost when nobody listens."""
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise PeerLost(f"the store's host {address[0]} is unknown: {error.strerror}") from None
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(BlockingIOError):
            sock.connect(target)
        _await_connected(sock, address, is_severed)
    except OSError as error:
        sock.close()
        raise PeerLost(f"nothing listens at the store's address {joined(address)}: {error.strerror or error}") from None
    except BaseException:
        sock.close()
        raise
    return StoreClient(sock)


def _await_connected(sock: socket.socket, address: Address, is_severed: Callable[[], bool]) -> None:
    deadline = time.monotonic() + CONNECT_TIMEOUT_S
    poll = select.poll()  # select() knows no descriptor above 1023
    poll.register(sock, select.POLLOUT)
    while not poll.poll(_POLL_MS):
        if is_severed():
            raise StepInterrupted("aborted while connecting to the store")
        if time.monotonic() >= deadline:
            raise PeerLost(f"the store at {joined(address)} did not answer within {CONNECT_TIMEOUT_S:g} s")
    error_number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if error_number:
        raise OSError(error_number, os.strerror(error_number))
