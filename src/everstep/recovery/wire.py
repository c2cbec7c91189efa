"""A connected socket that moves whole things: a head, a list of buffers. Blocking, so that the kernel does the work.

Python's own socket timeouts would make the socket non-blocking and take the GIL back from the training thread for every
few hundred KB; SO_RCVTIMEO and SO_SNDTIMEO let one call move a whole chunk. `shut` from any thread wakes both sides.
"""

import contextlib
import math
import socket
import struct
import threading
import time
from collections.abc import Sequence

from everstep.errors import RemoteProtocolError

HEAD_BYTES_MAX = 16 << 10
_BUFFERS_MAX = 512  # of one call; the kernel takes 1024
_LOCAL_SEND_BYTES = 512 << 10
_LIMIT_MAX_S = 1e6  # of what a timeval is sure to hold
_LAST_DATA_RECEIVED = struct.Struct("@52xI")  # tcp_info's tcpi_last_data_recv, in ms: linux/tcp.h


class Wire:
    """One owner thread; only `shut` may be called from others. Every failure is an OSError.

    `stall_timeout_s`: how long the other side may let nothing move at all.
    """

    def __init__(self, sock: socket.socket, stall_timeout_s: float) -> None:
        self._socket = sock
        self._stall_timeout_s = stall_timeout_s
        self._closing = threading.Lock()  # or `shut` could hit another socket that was given the same number
        self._limits: dict[int, float] = {}  # as set, by option
        self._ahead = b""  # received with a head, belongs to the body

    def open(self) -> None:
        self._socket.settimeout(None)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._limit(socket.SO_SNDTIMEO, self._stall_timeout_s)
        if self.is_local:
            suit_one_host(self._socket)

    @property
    def is_local(self) -> bool:
        """Both ends have one address: the same host, or network namespace."""
        return bool(self._socket.getsockname()[0] == self._socket.getpeername()[0])

    def fileno(self) -> int:
        return self._socket.fileno()

    def shut(self) -> None:
        """Wakes the owner, whatever it waits for, with an OSError."""
        with self._closing, contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with self._closing:
            self._socket.close()

    def send(self, *buffers: bytes | memoryview) -> None:
        """All of it, however slow the reader, as long as something moves within the stall timeout."""
        for begin in range(0, len(buffers), _BUFFERS_MAX):
            left: Sequence[bytes | memoryview] = buffers[begin : begin + _BUFFERS_MAX]
            while left:
                try:
                    sent = self._socket.sendmsg(left)
                except BlockingIOError as error:
                    raise TimeoutError(f"the reader took nothing for {self._stall_timeout_s} s") from error
                left = _without(left, sent)

    def receive_into(self, buffers: Sequence[memoryview], deadline: float) -> None:
        """Fill all of them; `deadline` is an instant of time.monotonic()."""
        for begin in range(0, len(buffers), _BUFFERS_MAX):
            left = [buffer for buffer in buffers[begin : begin + _BUFFERS_MAX] if len(buffer)]
            while left and self._ahead:
                left = _without(left, self._take_ahead(left[0]))
            quiet_s = 0.0
            while left:
                self._wait_at_most(deadline, self._stall_timeout_s - quiet_s)
                try:
                    received = self._socket.recvmsg_into(left, 0, socket.MSG_WAITALL)[0]
                except BlockingIOError as error:
                    raise TimeoutError("nothing arrived in time") from error
                if received == 0:
                    raise ConnectionResetError("the connection was closed in the middle")
                left = _without(left, received)
                # The kernel's limit is for the whole call: one that returns some bytes may have waited for more.
                quiet_s = self._quiet_s() if left else 0.0

    def read_head(self, deadline: float, *, is_idle: bool = False) -> bytes:
        """Up to the first empty line; b"" when the other side closed instead. The body, if any, comes next.

        `is_idle`: nothing was asked for, so that only the deadline ends it.
        """
        while (end := self._ahead.find(b"\r\n\r\n")) < 0:
            if len(self._ahead) > HEAD_BYTES_MAX:
                raise RemoteProtocolError(f"a head of more than {HEAD_BYTES_MAX} bytes")
            self._wait_at_most(deadline, math.inf if is_idle else self._stall_timeout_s)
            try:
                received = self._socket.recv(HEAD_BYTES_MAX)
            except BlockingIOError as error:
                raise TimeoutError("nothing arrived in time") from error
            if not received:
                if self._ahead:
                    raise ConnectionResetError("the connection was closed in the middle")
                return b""
            self._ahead += received
        head, self._ahead = self._ahead[:end], self._ahead[end + 4 :]
        return head

    def _take_ahead(self, buffer: memoryview) -> int:
        taken = min(len(self._ahead), len(buffer))
        buffer[:taken] = self._ahead[:taken]
        self._ahead = self._ahead[taken:]
        return taken

    def _wait_at_most(self, deadline: float, patience_s: float) -> None:
        remaining = deadline - time.monotonic()
        if remaining <= 0 or patience_s <= 0:
            raise TimeoutError("the deadline has passed" if remaining <= 0 else "nothing arrived in time")
        self._limit(socket.SO_RCVTIMEO, min(patience_s, remaining, _LIMIT_MAX_S))

    def _quiet_s(self) -> float:
        """How long nothing has arrived at all."""
        info = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _LAST_DATA_RECEIVED.size)
        return float(_LAST_DATA_RECEIVED.unpack(info)[0]) / 1e3

    def _limit(self, option: int, seconds: float) -> None:
        if self._limits.get(option) == seconds:
            return
        self._limits[option] = seconds
        microseconds = max(1, round(seconds * 1e6))  # 0 would mean for ever
        self._socket.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", *divmod(microseconds, 1_000_000)))


def suit_one_host(sock: socket.socket) -> None:
    """For a sender whose reader is on the same host.

    There is no network to be spared: BBR, the default of many hosts, paces what it sends by its estimate of one. And
    what is on its way is best read while it is in the processor's cache: the system lets up to 4 MiB wait at a sender,
    and what three of them have waiting goes to memory and comes from there.
    """
    with contextlib.suppress(OSError):  # allowed everywhere as a rule, but a host may forbid it
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LOCAL_SEND_BYTES)


def _without(buffers: Sequence[bytes | memoryview], moved: int) -> list[memoryview]:
    """The rest of the buffers after `moved` bytes of them."""
    for index, buffer in enumerate(buffers):
        if moved < len(buffer):
            return [memoryview(buffer)[moved:], *(memoryview(rest) for rest in buffers[index + 1 :])]
        moved -= len(buffer)
    return []
