"""Tiny MIN and MAX reductions over direct connections: what the vote of every step travels on.

Gloo hands an operation from thread to thread three times on each member, and on busy cores each hand-over may wait for
a scheduler's tick: a one-element allreduce took 0.3 ms in the median and 1 ms on average where two processes exchanging
24 bytes on their own threads took 0.045 ms. MIN and MAX are idempotent, so dissemination serves: in round k each member
sends what it has to the one 2**k ranks after it; after ceil(log2 n) rounds everybody has everything. (The pattern is
that of the dissemination barrier of Hensgen, Finkel and Manber, 1988.)
"""

import contextlib
import secrets
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence

from everstep import fork_guard
from everstep.collectives.process_group import Membership, ReduceOp
from everstep.core.types import LocalProtocolError, QuorumId
from everstep.errors import PeerLost, StepInterrupted

NUMBERS_MAX = 8
CONNECT_TIMEOUT_S = 10.0
_POLL_MS = 5  # how soon connecting notices that it was severed
_SECRET_BYTES = 16
_HELLO = struct.Struct(f"<{_SECRET_BYTES}sqqii")  # secret, epoch, seq, rank, round
_HELLO_TIMEOUT_S = 2.0
_BACKLOG = 1024


class Wires:
    """One quorum's connections: in round k to `ahead[k]` and from `behind[k]`."""

    def __init__(self, membership: Membership) -> None:
        self.membership = membership
        self.rounds = (membership.size - 1).bit_length()
        self.ahead: list[socket.socket] = []
        self.behind: list[socket.socket | None] = [None] * self.rounds
        self.is_severed = False
        self.operations = 0

    def rank_ahead(self, round_: int) -> int:
        return (self.membership.rank + (1 << round_)) % self.membership.size

    def rank_behind(self, round_: int) -> int:
        return (self.membership.rank - (1 << round_)) % self.membership.size

    def sockets(self) -> list[socket.socket]:
        return [*list(self.ahead), *(sock for sock in list(self.behind) if sock is not None)]

    def sever(self) -> None:
        """Any thread. Not closed: the owner may be about to use them, and a number given up is soon another file's."""
        self.is_severed = True
        for sock in self.sockets():
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for sock in self.sockets():
            sock.close()

    def check(self) -> None:
        if self.is_severed:
            raise StepInterrupted(f"quorum {self.membership.quorum_id} was aborted")


class LaneWork:
    """One reduction; a Work (process_group.py). Its rounds are run by `wait`, on the caller's thread."""

    def __init__(
        self,
        wires: Wires,
        numbers: list[int],
        op: ReduceOp,
        finish: Callable[[list[int]], None],
        *,
        is_patient: bool = False,
    ) -> None:
        self._wires = wires
        self._is_patient = is_patient  # it ends with its members, or when it is severed
        self._numbers = numbers
        self._combine = min if op is ReduceOp.MIN else max
        self._finish = finish
        self._is_completed = False
        self._format = struct.Struct(f"<{len(numbers) + 1}q")
        wires.operations += 1
        self._number = wires.operations
        self._send(0)

    def wait(self) -> None:
        if self._is_completed:
            return
        for round_ in range(self._wires.rounds):
            if round_ > 0:
                self._send(round_)
            self._receive(round_)
        self._is_completed = True
        self._finish(self._numbers)

    def is_completed(self) -> bool:
        return self._is_completed

    def _send(self, round_: int) -> None:
        try:
            self._wires.ahead[round_].sendall(self._format.pack(self._number, *self._numbers))
        except OSError as error:
            raise self._lost(self._wires.rank_ahead(round_), error) from None

    def _receive(self, round_: int) -> None:
        sock = self._wires.behind[round_]
        assert sock is not None
        peer = self._wires.rank_behind(round_)
        frame = b""
        while len(frame) < self._format.size:
            try:
                part = sock.recv(self._format.size - len(frame))
            except BlockingIOError as error:
                if not self._is_patient:
                    raise self._lost(peer, error) from None
                self._wires.check()
                continue
            except OSError as error:
                raise self._lost(peer, error) from None
            if not part:
                raise self._lost(peer, ConnectionResetError("closed by peer"))
            frame += part
        number, *numbers = self._format.unpack(frame)
        if number != self._number:
            raise LocalProtocolError(f"rank {peer} is at reduction {number} of the lane, this member at {self._number}")
        self._numbers = [self._combine(mine, theirs) for mine, theirs in zip(self._numbers, numbers, strict=True)]

    def _lost(self, peer: int, error: OSError) -> StepInterrupted:
        self._wires.check()
        return PeerLost(f"quorum {self._wires.membership.quorum_id}: the vote's connection failed: {error}", peer)


class Lane:
    """Owner thread: `address`, `connect`, `reduce`, `release_previous`, `close`; any thread: `abort`."""

    def __init__(self, bind_host: str) -> None:
        self._bind_host = bind_host
        self._secret = secrets.token_bytes(_SECRET_BYTES)
        self._listener: socket.socket | None = None
        self._lock = threading.Lock()
        self._aborted: QuorumId | None = None
        self._building: Wires | None = None
        self._current: Wires | None = None
        self._previous: list[Wires] = []
        self._unguard: Callable[[], None] | None = None

    def address(self) -> bytes:
        """Where peers connect, and the secret that shows that the group told them; 64 bytes."""
        if self._listener is None:
            family = socket.AF_INET6 if ":" in self._bind_host else socket.AF_INET
            self._listener = socket.socket(family, socket.SOCK_STREAM)
            self._listener.bind((self._bind_host, 0))
            self._listener.listen(_BACKLOG)
            self._listener.setblocking(False)
            self._unguard = fork_guard.guard(self._fds)
        host, port = self._listener.getsockname()[:2]
        text = str(host).encode()
        return (self._secret + struct.pack("<H", port) + text).ljust(64, b"\0")

    def connect(self, membership: Membership, addresses: Sequence[bytes]) -> None:
        """Connect this quorum's members; `addresses` by rank. Raises StepInterrupted, PeerLost."""
        wires = Wires(membership)
        with self._lock:
            if self._aborted is not None and membership.quorum_id <= self._aborted:
                raise StepInterrupted(f"quorum {membership.quorum_id} was aborted")
            self._building = wires
        try:
            deadline = time.monotonic() + CONNECT_TIMEOUT_S
            for round_ in range(wires.rounds):
                wires.ahead.append(self._dial(wires, round_, addresses[wires.rank_ahead(round_)], deadline))
            while None in wires.behind:
                self._accept(wires, deadline)
        except BaseException:
            wires.close()
            raise
        finally:
            with self._lock:
                self._building = None
                if None not in wires.behind and not wires.is_severed:
                    if self._current is not None:
                        self._previous.append(self._current)
                    self._current = wires
        wires.check()

    def reduce(
        self, numbers: list[int], op: ReduceOp, finish: Callable[[list[int]], None], *, is_patient: bool = False
    ) -> LaneWork:
        """`finish` gets the result on the thread that waits."""
        assert self._current is not None, "connect first"
        self._current.check()
        return LaneWork(self._current, numbers, op, finish, is_patient=is_patient)

    def abort(self, up_to: QuorumId) -> None:
        with self._lock:
            if self._aborted is None or up_to > self._aborted:
                self._aborted = up_to
            for wires in (self._building, self._current, *self._previous):
                if wires is not None and wires.membership.quorum_id <= up_to:
                    wires.sever()

    def release_previous(self) -> None:
        """Every member has used the current connections: the older ones carry nothing any more."""
        with self._lock:
            released, self._previous = self._previous, []
        for wires in released:
            wires.close()

    def close(self) -> None:
        with self._lock:
            everything = [w for w in (self._building, self._current, *self._previous) if w is not None]
            self._current, self._previous = None, []
        for wires in everything:
            wires.sever()
            wires.close()
        if self._listener is not None:
            self._listener.close()
        if self._unguard is not None:
            self._unguard()

    # ---- connecting

    def _dial(self, wires: Wires, round_: int, address: bytes, deadline: float) -> socket.socket:
        secret, port = address[:_SECRET_BYTES], int.from_bytes(address[_SECRET_BYTES : _SECRET_BYTES + 2], "little")
        host = address[_SECRET_BYTES + 2 :].partition(b"\0")[0].decode(errors="replace")
        peer = wires.rank_ahead(round_)
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        try:
            if not host.isascii():
                raise OSError("that is no address")
            sock.setblocking(False)
            sock.connect_ex((host, port))
            poll = select.poll()
            poll.register(sock, select.POLLOUT)
            while not poll.poll(_POLL_MS):
                wires.check()
                if time.monotonic() >= deadline:
                    raise PeerLost(f"{host}:{port} did not accept the vote's connection", peer)
            sock.setblocking(True)
            _tune(sock, wires.membership.timeout_s)
            quorum_id = wires.membership.quorum_id
            sock.sendall(_HELLO.pack(secret, quorum_id.epoch, quorum_id.seq, wires.membership.rank, round_))
        except OSError as error:
            sock.close()
            wires.check()
            raise PeerLost(f"cannot connect to {host}:{port} for votes: {error}", peer) from None
        except BaseException:
            sock.close()
            raise
        return sock

    def _accept(self, wires: Wires, deadline: float) -> None:
        """Take one connection, if it is one of this quorum's; left-overs of older quorums and strangers are dropped."""
        assert self._listener is not None
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        while not poll.poll(_POLL_MS):
            wires.check()
            if time.monotonic() >= deadline:
                missing = wires.rank_behind(wires.behind.index(None))
                raise PeerLost(f"rank {missing} did not connect for votes within {CONNECT_TIMEOUT_S:g} s", missing)
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
        try:
            sock.settimeout(_HELLO_TIMEOUT_S)
            hello = sock.recv(_HELLO.size, socket.MSG_WAITALL)
            if len(hello) < _HELLO.size:
                raise ConnectionResetError
            secret, epoch, seq, rank, round_ = _HELLO.unpack(hello)
            is_ours = (
                secrets.compare_digest(secret, self._secret) and QuorumId(epoch, seq) == wires.membership.quorum_id
            )
            if not is_ours or not 0 <= round_ < wires.rounds or rank != wires.rank_behind(round_):
                raise ConnectionResetError
            sock.settimeout(None)
            _tune(sock, wires.membership.timeout_s)
        except OSError:
            sock.close()
            return
        wires.behind[round_] = sock

    def _fds(self) -> list[int]:
        """For the fork guard; takes no lock."""
        sockets = [s for w in (self._building, self._current, *self._previous) if w is not None for s in w.sockets()]
        if self._listener is not None:
            sockets.append(self._listener)
        return [sock.fileno() for sock in sockets if sock.fileno() >= 0]


def _tune(sock: socket.socket, timeout_s: float) -> None:
    """Blocking with the kernel's own timeout: Python's would poll before every call."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    seconds = struct.pack("ll", int(timeout_s), 0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, seconds)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, seconds)
