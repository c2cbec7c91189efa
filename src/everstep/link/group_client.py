"""A follower's end of the connection to its group's leader: see group_frames.py."""

import contextlib
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Protocol

import msgspec

from everstep import fork_guard
from everstep.core.group import RankBeat, ToFollower, ToLeader
from everstep.link.auth import NONCE_BYTES, sign, verify
from everstep.link.group_frames import (
    FOLLOWER,
    HANDSHAKE_S,
    LEADER,
    READ_BYTES,
    Frames,
    Introduction,
    frame,
    read_exactly,
    read_frame,
)

RETRY_S = 0.05
CLOSE_S = 5.0

_decoder: msgspec.msgpack.Decoder[ToFollower] = msgspec.msgpack.Decoder(ToFollower)


class FollowerHandler(Protocol):
    """On the channel's thread."""

    def beat(self) -> tuple[RankBeat, float]:
        """What to say, and after how many seconds to ask again."""
        ...

    def on_leader(self, message: ToFollower) -> None: ...

    def on_leader_lost(self, detail: str) -> None: ...


class GroupClient:
    """A follower's side. `send` from any thread, `close` from any but the channel's own; `send` never blocks."""

    def __init__(self, rank: int, handler: FollowerHandler, worker: str = "") -> None:
        self._rank = rank
        self._worker = worker
        self._handler = handler
        self._sock: socket.socket | None = None
        self._lock = threading.Lock()
        self._is_closing = False
        self._thread: threading.Thread | None = None
        self._unguard: Callable[[], None] | None = None

    def connect(self, locate: Callable[[], tuple[str, int, bytes]], timeout_s: float) -> None:
        """`locate` says where the leader listens, and the group's key. Raises OSError when nobody is there in time."""
        deadline = time.monotonic() + timeout_s
        pause = threading.Event()
        while True:
            try:
                host, port, key = locate()
                self._sock = self._dial(host, port, key, max(RETRY_S, deadline - time.monotonic()))
                break
            except OSError:
                if time.monotonic() + RETRY_S >= deadline:
                    raise
                pause.wait(RETRY_S)
        self._unguard = fork_guard.guard(self._fds)
        self._thread = threading.Thread(target=self._run, args=(self._sock,), name="everstep-group", daemon=True)
        self._thread.start()

    def send(self, message: ToLeader) -> None:
        encoded = frame(message)
        with self._lock:
            if self._sock is None:
                return
            try:
                if self._sock.send(encoded, socket.MSG_DONTWAIT) < len(encoded):
                    raise BlockingIOError("the leader does not read")
            except OSError:
                with contextlib.suppress(OSError):  # the channel's thread sees the end of it
                    self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Idempotent."""
        self._is_closing = True
        with self._lock:
            if self._sock is not None:
                with contextlib.suppress(OSError):
                    self._sock.shutdown(socket.SHUT_RDWR)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(CLOSE_S)
        if self._unguard is not None:
            self._unguard()

    def _dial(self, host: str, port: int, key: bytes, timeout_s: float) -> socket.socket:
        sock = socket.create_connection((host, port), timeout=min(timeout_s, HANDSHAKE_S))
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            theirs, mine = read_exactly(sock, NONCE_BYTES), secrets.token_bytes(NONCE_BYTES)
            rank = str(self._rank)
            mac = sign(key, FOLLOWER, theirs, mine, f"{rank} {self._worker}")
            sock.sendall(frame(Introduction(self._rank, mine, mac, self._worker)))
            mac = msgspec.msgpack.decode(read_frame(sock), type=str)
            if not verify(key, mac, LEADER, theirs, mine, rank):
                raise ConnectionRefusedError(f"what listens at {host}:{port} is not this group's leader")
            sock.setblocking(True)
        except msgspec.MsgspecError as error:
            sock.close()
            raise ConnectionRefusedError(f"what listens at {host}:{port} is no leader of a group: {error}") from None
        except BaseException:
            sock.close()
            raise
        return sock

    # ---- the channel's thread

    def _run(self, sock: socket.socket) -> None:
        detail = "its connection closed"
        frames = Frames()
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        beat_at = 0.0
        try:
            while True:
                now = time.monotonic()
                if now >= beat_at:
                    beat, after_s = self._handler.beat()
                    beat_at = now + after_s
                    self.send(beat)
                if not poll.poll(max(0.0, beat_at - now) * 1e3 + 1):
                    continue
                data = sock.recv(READ_BYTES)
                if not data:
                    break
                for payload in frames.feed(data):
                    self._handler.on_leader(_decoder.decode(payload))
        except (OSError, msgspec.MsgspecError) as error:
            detail = str(error)
        with self._lock:
            self._sock = None
            sock.close()
        if not self._is_closing:
            self._handler.on_leader_lost(detail)

    def _fds(self) -> list[int]:
        """For the fork guard; takes no lock."""
        sock = self._sock
        return [sock.fileno()] if sock is not None and sock.fileno() >= 0 else []
