"""The lighthouse's port: accepts connections while there is room, and cuts those that come to nothing.

In place of an event loop's own server: out of descriptors, asyncio's says so for each attempt, thousands of times in a
row, and uvloop's turns the newcomers away; and neither keeps descriptors back for the journals. Here newcomers wait in
the kernel's queue until a connection ends, and the log says it once.
"""

import asyncio
import errno
import logging
import math
import os
import resource
import socket
import ssl
import time
from collections.abc import Awaitable, Callable

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from everstep.link.sockets import tune

REQUEST_S = 15.0  # a connection that is neither a link nor an event stream begins a request this often, or is cut
ACCEPTS_A_TURN = 64  # of the loop: the members that are connected are served in between
FDS_RESERVED = 64  # beyond those open at the start: journals, and what the process itself opens
RETRY_S = 0.1
LOG_REPEAT_S = 60.0
_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_LONG_LIVED = ("/link", "/api/v1/events")  # they look after their connections themselves

log = logging.getLogger("everstep.lighthouse")
_http_log = logging.getLogger("everstep.http")


class Door:
    """Serves `runner`'s app on a listening socket. `open` and `close` on the loop's thread; close before `cleanup`."""

    def __init__(
        self, runner: web.AppRunner, listener: socket.socket, tls: ssl.SSLContext | None, request_s: float = REQUEST_S
    ) -> None:
        self.request_s = request_s
        self.connections: dict[_Connection, None] = {}
        self._runner = runner
        self._listener = listener
        self._tls = tls
        self._opening: set[asyncio.Task[None]] = set()
        self._connections_max = 0
        self._retry: asyncio.TimerHandle | None = None
        self._is_paused = True
        self._said_at = -math.inf

    def open(self) -> None:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._connections_max = max(1, soft - len(os.listdir("/proc/self/fd")) - FDS_RESERVED)
        self._resume()

    def close(self) -> None:
        self._pause()
        if self._retry is not None:
            self._retry.cancel()
        for task in self._opening:
            task.cancel()
        self._listener.close()

    def ended(self, connection: "_Connection") -> None:
        self.connections.pop(connection, None)
        if self._retry is not None:
            self._resume()

    # ---- accepting

    def _resume(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        if self._is_paused and self._listener.fileno() >= 0:
            self._is_paused = False
            asyncio.get_running_loop().add_reader(self._listener.fileno(), self._accept)

    def _pause(self) -> None:
        if not self._is_paused:
            self._is_paused = True
            asyncio.get_running_loop().remove_reader(self._listener.fileno())

    def _accept(self) -> None:
        for _ in range(ACCEPTS_A_TURN):
            if len(self.connections) + len(self._opening) >= self._connections_max:
                self._wait_for_room(f"{self._connections_max} connections are open, as many as its descriptors allow")
                return
            try:
                sock, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno in _SHORTAGES:
                    self._wait_for_room(os.strerror(error.errno or 0).lower())
                    return
                continue  # this one has gone again
            sock.setblocking(False)
            task = asyncio.get_running_loop().create_task(self._admit(sock))
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    def _wait_for_room(self, why: str) -> None:
        """Until a connection ends; or, where others use up the descriptors, a little while."""
        self._pause()
        self._retry = asyncio.get_running_loop().call_later(RETRY_S, self._resume)
        if time.monotonic() >= self._said_at + LOG_REPEAT_S:
            self._said_at = time.monotonic()
            log.warning("no room for more connections reason=%r remedy='raise the limit: ulimit -n'", why)

    async def _admit(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        patience = self.request_s if self._tls is not None else None
        try:
            await loop.connect_accepted_socket(self._connection, sock, ssl=self._tls, ssl_handshake_timeout=patience)
        except OSError as error:  # ssl.SSLError is one: it speaks no TLS, or went away
            log.debug("connection not opened reason=%s", error)
            sock.close()
        except BaseException:
            sock.close()
            raise

    def _connection(self) -> "_Connection":
        assert self._runner.server is not None
        return _Connection(self, self._runner.server)


class _Connection(web.RequestHandler):
    """One connection, and the instant until which it must have begun a request."""

    __slots__ = ("_door", "_timer")

    def __init__(self, door: Door, server: web.Server) -> None:
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            access_log=None,  # type: ignore[arg-type]
            logger=_http_log,
            keepalive_timeout=door.request_s,
            lingering_time=0.0,  # nothing here reads a body
        )
        self._door = door
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._door.connections[self] = None
        tune(transport.get_extra_info("socket"))
        super().connection_made(transport)
        self.expect_request()

    def connection_lost(self, exc: BaseException | None) -> None:
        self.expect_nothing()
        super().connection_lost(exc)
        self._door.ended(self)

    def expect_nothing(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def expect_request(self) -> None:
        """From now on; also that what was answered to the last one is taken."""
        self.expect_nothing()
        if self.transport is not None:
            self._timer = asyncio.get_running_loop().call_later(2 * self._door.request_s, self.transport.abort)


@web.middleware
async def look_after(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """The app's middleware that tells connections which begin requests from those that only stay."""
    connection = request.protocol
    if not isinstance(connection, _Connection):
        return await handler(request)
    if request.path in _LONG_LIVED:
        connection.expect_nothing()
    else:
        connection.expect_request()
    try:
        return await handler(request)
    finally:
        connection.expect_request()


def _is_news(record: logging.LogRecord) -> bool:
    """Strangers that speak no HTTP, or go away in the middle, are no errors of this server."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, HttpProcessingError | ConnectionError)


_http_log.addFilter(_is_news)
