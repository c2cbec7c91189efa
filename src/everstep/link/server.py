"""The server's end of every link: accepts, authenticates, decodes, and sends without waiting for anybody.

One event loop owns it. Frames are written straight into each connection's transport: its write buffer is the send
queue. A reader so slow that the buffer passes SEND_BYTES_MAX loses its link; the others never notice. A message for
many links is encoded once, WebSocket header included.
"""

import asyncio
import itertools
import logging
import struct
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import aiohttp
from aiohttp import web

from everstep import fork_guard
from everstep.core.messages import Refused, ToLighthouse
from everstep.core.node_messages import FromNode
from everstep.core.types import RefusalCode, RemoteProtocolError
from everstep.link import auth, codec
from everstep.link.sockets import tune

SEND_BYTES_MAX = 1 << 20
HANDSHAKES_MAX = 1024  # unauthenticated connections; one more, and the oldest is cut: who means it answers at once
LINKS_MAX = 20_000
FIRST_WORD_S = 900.0  # a member says Hello when its first step begins: it may have data to load before
CLOSE_GRACE_S = 0.5  # for the other side to take its last frames before the connection is cut

_BINARY, _CLOSE, _PONG = 0x82, 0x88, 0x8A  # final frame; opcodes 2, 8 and 10 (RFC 6455, 5.2)
_GOES_ON = (aiohttp.WSMsgType.BINARY, aiohttp.WSMsgType.PING, aiohttp.WSMsgType.PONG)
_CLOSE_BYTES_MAX = 123

log = logging.getLogger("everstep.link")


class LinkListener(Protocol):
    """Who uses the server. Called on the loop's thread; `closed` exactly once for each `opened`, and after it."""

    def admit(self, job_id: str) -> Refused | None:
        """None lets an authenticated client in."""

    def opened(self, link: int, job_id: str) -> None: ...
    def message(self, link: int, message: ToLighthouse) -> None: ...
    def closed(self, link: int, detail: str) -> None: ...


class NodeListener(Protocol):
    """The same for nodes, which speak with a rendezvous."""

    def admit(self, job_id: str) -> Refused | None: ...
    def opened(self, link: int, job_id: str) -> None: ...
    def message(self, link: int, message: FromNode) -> None: ...
    def closed(self, link: int, detail: str) -> None: ...


class LinkServer:
    """`handle` is the aiohttp handler of the link's path. Link numbers are never used twice."""

    def __init__(
        self,
        listener: LinkListener,
        token: bytes | None,
        *,
        nodes: NodeListener | None = None,
        handshake_s: float = auth.HANDSHAKE_S,
        first_word_s: float = FIRST_WORD_S,
    ) -> None:
        self._roles: dict[str, tuple[Any, Callable[[bytes], Any]]] = {"member": (listener, codec.decode_to_lighthouse)}
        if nodes is not None:
            self._roles["node"] = (nodes, codec.decode_from_node)
        self._token = token
        self._handshake_s = handshake_s
        self._first_word_s = first_word_s
        self._links: dict[int, _Link] = {}
        self._connections: dict[_Link, None] = {}  # also those that are not authenticated yet, or closing
        self._numbers = itertools.count(1)
        self._handshakes: dict[_Link, None] = {}  # those that are not authenticated yet
        self._unguard = fork_guard.guard(self._fds)
        self._is_closed = False

    @property
    def links(self) -> int:
        """How many are connected and authenticated. Any thread."""
        return len(self._links)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if "Origin" in request.headers:
            # A web page somewhere would use its reader's access to this port; trainers send no Origin.
            raise web.HTTPForbidden(text="browsers have no business here")
        if len(self._connections) >= LINKS_MAX:
            raise web.HTTPServiceUnavailable(text=f"{LINKS_MAX} links are open; this is the limit")
        websocket = web.WebSocketResponse(
            timeout=CLOSE_GRACE_S, compress=False, max_msg_size=codec.FRAME_BYTES_MAX, autoping=False
        )
        try:
            is_upgrade = websocket.can_prepare(request).ok
        except ValueError:  # of a key that is not ASCII
            is_upgrade = False
        if not is_upgrade:
            raise web.HTTPUpgradeRequired(text="this address speaks WebSocket\n", headers={"Upgrade": "websocket"})
        try:
            await websocket.prepare(request)
        except ConnectionError:
            return web.Response()  # for nobody: it has gone again
        transport = request.transport
        if transport is None or self._is_closed:
            return websocket
        link = _Link(next(self._numbers), transport, request.remote or "?")
        self._connections[link] = None
        try:
            opening = await self._authenticate(link, websocket)
            if isinstance(opening, Refused):
                self._refuse(link, opening)
            elif opening is not None:
                await self._serve(link, websocket, opening)
            while link.why_closed and (await websocket.receive()).type in _GOES_ON:
                pass  # read on until the other side closes: closing over unread bytes would reset our last frames away
        finally:
            self._connections.pop(link, None)
            link.cut()
        return websocket

    def send(self, message: codec.LinkMessage, links: Iterable[int]) -> None:
        """Queue a message on each link that still is open."""
        frame: bytes | None = None
        for number in links:
            link = self._links.get(number)
            if link is None:
                continue
            if frame is None:
                frame = _frame(_BINARY, codec.encode(message))
            self._write(link, frame)

    def close_link(self, number: int, reason: str) -> None:
        """Close a link after what was sent on it before; `closed` follows, not from within this call."""
        link = self._links.get(number)
        if link is not None:
            link.close(reason)
            asyncio.get_running_loop().call_soon(self._forget, link, reason)

    def close(self) -> None:
        """Cut every connection without a word to the listener."""
        self._is_closed = True
        self._links.clear()
        for link in tuple(self._connections):
            link.cut()
        self._unguard()

    # ---- one connection

    async def _authenticate(self, link: "_Link", websocket: web.WebSocketResponse) -> auth.Answer | Refused | None:
        """The client's Answer once it is accepted; None when it went away."""
        self._handshakes[link] = None
        if len(self._handshakes) > HANDSHAKES_MAX:
            oldest = next(iter(self._handshakes))
            del self._handshakes[oldest]
            oldest.cut()
        try:
            return await asyncio.wait_for(self._shake_hands(link, websocket), self._handshake_s)
        except asyncio.TimeoutError:
            return Refused(RefusalCode.BUSY, f"not authenticated within {self._handshake_s:g} s")
        except RemoteProtocolError as error:
            return Refused(RefusalCode.BAD_VERSION, f"{error}: is this a client of the same release of everstep?")
        finally:
            self._handshakes.pop(link, None)

    async def _shake_hands(self, link: "_Link", websocket: web.WebSocketResponse) -> auth.Answer | Refused | None:
        asked = auth.challenge(self._token)
        link.write(_frame(_BINARY, auth.encode(asked)))
        received = await websocket.receive()
        if received.type is aiohttp.WSMsgType.TEXT:
            raise RemoteProtocolError("a text frame")
        if received.type is not aiohttp.WSMsgType.BINARY:
            return None
        answer = auth.decode_from_client(received.data)
        verdict = auth.judge(self._token, asked, answer)
        if isinstance(verdict, Refused):
            return verdict
        if answer.role not in self._roles:
            return Refused(RefusalCode.BAD_CONFIG, f"there is nobody here to talk to a {answer.role}")
        refusal: Refused | None = self._roles[answer.role][0].admit(answer.job_id)
        if refusal is not None:
            return refusal
        link.write(_frame(_BINARY, auth.encode(verdict)))
        return answer

    def _refuse(self, link: "_Link", refusal: Refused) -> None:
        log.warning("client refused address=%s code=%s detail=%r", link.address, refusal.code.value, refusal.detail)
        link.write(_frame(_BINARY, auth.encode(refusal)))
        link.close(refusal.code.value)

    async def _serve(self, link: "_Link", websocket: web.WebSocketResponse, opening: auth.Answer) -> None:
        if self._is_closed:
            return
        self._links[link.number] = link
        link.listener, link.decode = self._roles[opening.role]
        link.listener.opened(link.number, opening.job_id)
        detail = "the server failed"
        try:
            detail = await self._read(link, websocket)
        finally:
            self._forget(link, detail)

    async def _read(self, link: "_Link", websocket: web.WebSocketResponse) -> str:
        """Hand every message on until the link ends; returns why it ended."""
        why = f"not a word within {self._first_word_s:g} s"
        silence = asyncio.get_running_loop().call_later(self._first_word_s, self._drop, link, why)
        while True:
            received = await websocket.receive()
            silence.cancel()
            if received.type is aiohttp.WSMsgType.BINARY:
                if link.why_closed:
                    continue
                try:
                    message = link.decode(received.data)
                except RemoteProtocolError as error:
                    return self._drop(link, str(error))
                link.listener.message(link.number, message)
            elif received.type is aiohttp.WSMsgType.PING:
                # Not left to aiohttp, which would answer behind our close, and wait for a slow reader.
                self._write(link, _frame(_PONG, received.data))
            elif received.type is aiohttp.WSMsgType.PONG:
                pass
            elif received.type is aiohttp.WSMsgType.ERROR:
                return self._drop(link, f"illegal frame: {websocket.exception() or received.data}")
            elif received.type is aiohttp.WSMsgType.TEXT:
                return self._drop(link, "a text frame; messages are binary")
            else:
                return link.why_closed or "the connection closed"

    def _write(self, link: "_Link", frame: bytes) -> None:
        if not link.write(frame):
            log.warning("link dropped link=%d address=%s reason=%r", link.number, link.address, link.why_closed)
            link.cut()

    def _drop(self, link: "_Link", reason: str) -> str:
        if link.number in self._links:
            log.warning("link dropped link=%d address=%s reason=%r", link.number, link.address, reason)
        link.close(reason)
        return reason

    def _forget(self, link: "_Link", detail: str) -> None:
        if self._links.pop(link.number, None) is not None:
            link.listener.closed(link.number, detail)

    def _fds(self) -> list[int]:
        return [link.fd for link in tuple(self._connections) if link.fd >= 0 and not link.transport.is_closing()]


class _Link:
    """One connection's transport, and how it ends."""

    def __init__(self, number: int, transport: asyncio.Transport, address: str) -> None:
        self.number = number
        self.transport = transport
        self.address = address
        self.why_closed = ""
        self.listener: Any = None  # who hears of it, once it is authenticated, and in which messages
        self.decode: Callable[[bytes], Any] = codec.decode_to_lighthouse
        self.fd = tune(transport.get_extra_info("socket"))

    def write(self, frame: bytes) -> bool:
        """False when the link has to be cut, because its reader does not keep up."""
        if self.why_closed or self.transport.is_closing():
            return True
        waiting = self.transport.get_write_buffer_size()
        if waiting > SEND_BYTES_MAX:
            self.why_closed = f"it does not read: {waiting} bytes wait for it"
            return False
        self.transport.write(frame)
        return True

    def close(self, reason: str) -> None:
        """Say goodbye behind what was written; the other side has CLOSE_GRACE_S to take it."""
        if self.why_closed or self.transport.is_closing():
            return
        self.why_closed = reason or "closed"
        text = reason.encode()[:_CLOSE_BYTES_MAX].decode(errors="ignore").encode()
        self.transport.write(_frame(_CLOSE, struct.pack("!H", aiohttp.WSCloseCode.POLICY_VIOLATION) + text))
        # Half-close only: closing over unread bytes resets the connection, and the last frames would be lost.
        if self.transport.can_write_eof():
            self.transport.write_eof()
        asyncio.get_running_loop().call_later(CLOSE_GRACE_S, self.cut)

    def cut(self) -> None:
        self.transport.abort()


def _frame(opcode: int, payload: bytes) -> bytes:
    """An unmasked WebSocket frame, as servers send them."""
    size = len(payload)
    if size < 126:
        return struct.pack("!BB", opcode, size) + payload
    if size < 1 << 16:
        return struct.pack("!BBH", opcode, 126, size) + payload
    return struct.pack("!BBQ", opcode, 127, size) + payload
