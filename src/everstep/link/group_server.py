"""The leader's end of its group's connections: see group_frames.py."""

import contextlib
import logging
import selectors
import socket
import threading
from collections.abc import Callable
from typing import Protocol

import msgspec

from everstep import fork_guard
from everstep.core.group import ToFollower, ToLeader
from everstep.link.auth import new_nonce, sign, verify
from everstep.link.group_frames import (
    FOLLOWER,
    HANDSHAKE_S,
    LEADER,
    READ_BYTES,
    Frames,
    Introduction,
    frame,
    read_frame,
)

UNSENT_BYTES_MAX = 64 * 1024 * 1024
CLOSE_S = 5.0

log = logging.getLogger("everstep.link")
_decoder: msgspec.msgpack.Decoder[ToLeader] = msgspec.msgpack.Decoder(ToLeader)
_introductions = msgspec.msgpack.Decoder(Introduction)


class LeaderHandler(Protocol):
    """On the channel's thread."""

    def on_rank(self, rank: int, message: ToLeader) -> None: ...

    def on_rank_lost(self, rank: int, detail: str) -> None: ...


class _Follower:
    """The leader's end of one connection."""

    def __init__(self, rank: int, sock: socket.socket) -> None:
        self.rank = rank
        self.sock = sock
        self.frames = Frames()
        self.unsent = bytearray()


class GroupServer:
    """The leader's side. `broadcast` and `close` from any thread but the channel's own; `broadcast` never blocks."""

    def __init__(self, size: int, key: bytes, handler: LeaderHandler) -> None:
        self._size = size
        self._key = key
        self._handler = handler
        self._lock = threading.Lock()  # guards the followers' unsent bytes
        self._followers: dict[int, _Follower] = {}
        self._listener: socket.socket | None = None
        self._selector = selectors.DefaultSelector()
        self._wake: tuple[socket.socket, socket.socket] | None = None
        self._workers: dict[int, str] = {}
        self._complete = threading.Event()
        self._is_closing = False
        self._thread: threading.Thread | None = None
        self._unguard: Callable[[], None] | None = None

    def listen(self, host: str, port: int = 0) -> str:
        """Returns `host:port`."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.socket(family, socket.SOCK_STREAM)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind((host, port))
        self._listener.listen(self._size)
        self._listener.setblocking(False)
        self._wake = socket.socketpair()
        for end in self._wake:
            end.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wake[0], selectors.EVENT_READ)
        self._unguard = fork_guard.guard(self._fds)
        self._thread = threading.Thread(target=self._run, name="everstep-group", daemon=True)
        bound = self._listener.getsockname()  # before the thread starts, which closes it when all have come
        self._thread.start()
        return f"[{bound[0]}]:{bound[1]}" if family == socket.AF_INET6 else f"{bound[0]}:{bound[1]}"

    def wait_complete(self, timeout_s: float) -> list[int]:
        """The ranks that have not come within the time."""
        self._complete.wait(timeout_s)
        return [rank for rank in range(1, self._size) if rank not in self._followers]

    def workers(self) -> tuple[str, ...]:
        """The followers' processes, by rank, as their agents name them."""
        return tuple(self._workers.get(rank, "") for rank in range(1, self._size))

    def broadcast(self, message: ToFollower) -> None:
        encoded = frame(message)
        is_left = False
        with self._lock:
            for follower in self._followers.values():
                is_left = self._send(follower, encoded) or is_left
        if is_left:
            self._poke()

    def close(self) -> None:
        """Idempotent. What was broadcast goes out first, as far as the followers take it at once."""
        self._is_closing = True
        self._poke()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(CLOSE_S)
        if self._unguard is not None:
            self._unguard()

    # ---- the channel's thread

    def _run(self) -> None:
        try:
            while not self._is_closing:
                for key, _ in self._selector.select():
                    if key.fileobj is self._listener:
                        self._accept()
                    elif isinstance(key.data, _Follower):
                        self._serve(key.data)
                    else:
                        self._drain_wake()
        finally:
            self._close_all()

    def _serve(self, follower: _Follower) -> None:
        try:
            self._flush(follower)
            data = follower.sock.recv(READ_BYTES)
            if not data:
                raise ConnectionResetError("its connection closed")
            messages = [_decoder.decode(payload) for payload in follower.frames.feed(data)]
        except BlockingIOError:
            return
        except (OSError, msgspec.MsgspecError) as error:
            self._lose(follower, str(error))
            return
        for message in messages:
            self._handler.on_rank(follower.rank, message)

    def _lose(self, follower: _Follower, detail: str) -> None:
        self._selector.unregister(follower.sock)
        with self._lock:
            self._followers.pop(follower.rank, None)
        follower.sock.close()
        if not self._is_closing:
            self._handler.on_rank_lost(follower.rank, detail)

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
        try:
            rank = self._admit(sock)
        except (OSError, msgspec.MsgspecError) as error:
            log.debug("group channel: turned a connection away: %s", error)
            sock.close()
            return
        follower = _Follower(rank, sock)
        self._selector.register(sock, selectors.EVENT_READ, follower)
        with self._lock:
            self._followers[rank] = follower
        if len(self._followers) == self._size - 1:
            self._selector.unregister(self._listener)
            self._listener.close()
            self._complete.set()

    def _admit(self, sock: socket.socket) -> int:
        """The follower's rank; raises OSError for everybody else."""
        sock.setblocking(True)
        sock.settimeout(HANDSHAKE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        nonce = new_nonce()
        sock.sendall(nonce)
        said = _introductions.decode(read_frame(sock))
        is_known = verify(self._key, said.mac, FOLLOWER, nonce, said.nonce, f"{said.rank} {said.worker}")
        if not is_known or not 0 < said.rank < self._size or said.rank in self._followers:
            raise ConnectionRefusedError(f"no rank of this group: {said.rank}")
        sock.sendall(frame(sign(self._key, LEADER, nonce, said.nonce, str(said.rank))))
        sock.setblocking(False)
        self._workers[said.rank] = said.worker
        return said.rank

    # ---- sending

    def _send(self, follower: _Follower, encoded: bytes) -> bool:
        """Under the lock. Whether something is left to send."""
        if len(follower.unsent) > UNSENT_BYTES_MAX:
            with contextlib.suppress(OSError):  # the channel's thread sees the end of it
                follower.sock.shutdown(socket.SHUT_RDWR)
            return False
        if not follower.unsent:
            try:
                encoded = encoded[follower.sock.send(encoded) :]
            except BlockingIOError:
                pass
            except OSError:
                return False
        follower.unsent += encoded
        return bool(follower.unsent)

    def _flush(self, follower: _Follower) -> None:
        with self._lock:
            while follower.unsent:
                try:
                    sent = follower.sock.send(follower.unsent)
                except BlockingIOError:
                    break
                del follower.unsent[:sent]
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if follower.unsent else 0)
        self._selector.modify(follower.sock, events, follower)

    def _poke(self) -> None:
        if self._wake is not None:
            with contextlib.suppress(OSError):
                self._wake[1].send(b"x")

    def _drain_wake(self) -> None:
        assert self._wake is not None
        with contextlib.suppress(BlockingIOError):
            self._wake[0].recv(4096)
        for follower in tuple(self._followers.values()):
            with contextlib.suppress(OSError):  # the read that follows tells
                self._flush(follower)

    def _close_all(self) -> None:
        for follower in self._followers.values():
            follower.sock.close()
        assert self._wake is not None
        for end in self._wake:
            end.close()
        if self._listener is not None:
            self._listener.close()
        self._selector.close()

    def _fds(self) -> list[int]:
        """For the fork guard; takes no lock."""
        sockets = [follower.sock for follower in tuple(self._followers.values())]
        sockets += [sock for sock in (self._listener, *(self._wake or ())) if sock is not None]
        return [sock.fileno() for sock in sockets if sock.fileno() >= 0]
