"""Options of the link's TCP sockets, the same at both ends."""

import contextlib
import socket

KEEPALIVE_IDLE_S = 5
KEEPALIVE_INTERVAL_S = 2
KEEPALIVE_PROBES = 3
# Bytes that the other host has not acknowledged for so long: the path is gone.
USER_TIMEOUT_MS = 10_000


def tune(sock: socket.socket | None) -> int:
    """Send small frames at once, and let the kernel notice a dead path. Returns the descriptor, -1 when it is gone.

    `sock` is what asyncio calls a transport's extra info "socket".
    """
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return -1
    with contextlib.suppress(OSError):  # the other end may have reset the connection already
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)
    return sock.fileno()
