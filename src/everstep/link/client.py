"""A member's end of the link: one connection to the lighthouse, kept up for ever.

The link has a thread with an event loop of its own, so that it answers while the training thread computes. Nothing is
kept for a link that is down: the protocol says everything again in the next Hello.
"""

import asyncio
import collections
import contextlib
import logging
import random
import selectors
import threading
import time
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import aiohttp

from everstep import fork_guard
from everstep.core.messages import Goodbye
from everstep.core.types import RefusalCode, RemoteProtocolError
from everstep.errors import ConfigError, LighthouseRefused, LighthouseUnreachable
from everstep.link import auth, codec
from everstep.link.dial import CLOSE_S, CONNECT_S, LinkTarget, dial, trust, why
from everstep.link.sockets import tune

RETRY_FIRST_S = 0.02
RETRY_MAX_S = 2.0
STABLE_S = 1.0  # a link that lived so long makes the next retry a quick one again
LAST_ATTEMPT_S = 0.2  # the least time an attempt gets; the first connection may fail so much after its timeout
QUEUE_MESSAGES_MAX = 1024

log = logging.getLogger("everstep.link")


MessageT = TypeVar("MessageT", contravariant=True)


class LinkHandler(Protocol[MessageT]):
    """Who uses the link; every method runs on the link's thread and must not block. on_open and on_close alternate."""

    def on_start(self, loop: asyncio.AbstractEventLoop) -> None:
        """The thread runs; nothing is connected yet."""

    def on_open(self) -> None:
        """Authenticated. What is sent from here on goes out on this link, or nowhere."""

    def on_message(self, message: MessageT) -> None: ...

    def on_close(self, detail: str) -> None: ...

    def on_failed(self, error: Exception) -> None:
        """The link has ended for good, and its thread with it.

        LighthouseRefused, LighthouseUnreachable or ConfigError before the first connection; anything else is a bug. A
        client that was connected once is never given up: a refusal then is logged, and it tries on.
        """


class LinkClient(Generic[MessageT]):
    """`start` returns at once. `send` may be called from any thread, `close` from any but the link's own.

    `decode` makes a message of a frame; a member's by default.
    """

    def __init__(
        self,
        target: LinkTarget,
        handler: LinkHandler[MessageT],
        decode: Callable[[bytes], MessageT] = codec.decode_to_member,  # type: ignore[assignment]
    ) -> None:
        self._target = target
        self._handler = handler
        self._decode = decode
        self._lock = threading.Lock()  # guards _outbox, _is_open and _is_woken
        self._outbox: collections.deque[bytes] = collections.deque()
        self._ending: asyncio.Future[str] | None = None  # of the open link: set it to end the link
        self._is_open = False
        self._is_woken = False
        self._was_open = False
        self._first = threading.Event()  # the first connection, or the failure of it
        self._error: Exception | None = None
        self._last_reason = ""
        self._thread: threading.Thread | None = None
        self._selector: selectors.BaseSelector | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake = asyncio.Event()
        self._stop = asyncio.Event()
        self._fd = -1
        self.local_host = ""  # this host's address on the link that was opened last

    def __enter__(self) -> "LinkClient[MessageT]":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- any thread

    def start(self) -> None:
        assert self._thread is None, "a LinkClient starts once"
        # A selector of our own lists every socket, also one that is still connecting, for the fork guard.
        self._selector = selectors.DefaultSelector()
        self._loop = asyncio.SelectorEventLoop(self._selector)
        self._thread = threading.Thread(target=self._thread_main, name="everstep-link", daemon=True)
        self._thread.start()

    def wait_open(self, timeout_s: float) -> bool:
        """Whether it was connected within `timeout_s`; raises what ended it if it failed for good."""
        self._first.wait(timeout_s)
        if self._error is not None:
            raise self._error
        return self._was_open

    @property
    def is_open(self) -> bool:
        return self._is_open

    def send(self, message: codec.LinkMessage) -> str:
        """Queue it for the open link; returns "" or why it was dropped."""
        frame = codec.encode(message)
        with self._lock:
            if not self._is_open:
                return "the link is down"
            if len(self._outbox) < QUEUE_MESSAGES_MAX:
                self._outbox.append(frame)
                if self._is_woken:
                    return ""
                self._is_woken = True
                self._call(self._wake.set)
                return ""
            self._is_open = False
        reason = f"{QUEUE_MESSAGES_MAX} messages wait already: the lighthouse does not read"
        self._call(lambda: self._end_link(reason))
        return reason

    def close(self, goodbye: Goodbye | None = None, timeout_s: float = 2.0) -> bool:
        """Say goodbye if the link is open, end the link and its thread. False: not within the time, so it was cut."""
        if self._thread is None:
            return True
        if goodbye is not None:
            self.send(goodbye)
        self._call(self._begin_stop)
        self._thread.join(timeout_s)
        if not self._thread.is_alive():
            return True
        self._call(self._cancel)
        self._thread.join(CLOSE_S)
        return False

    # ---- the link's thread

    async def run(self) -> None:
        """Keep the link until `_stop`; what `start` runs on the thread. Await it to use a loop of your own instead."""
        self._loop = asyncio.get_running_loop()
        unguard = fork_guard.guard(self._fds)
        try:
            self._handler.on_start(self._loop)
            await self._keep_connected()
        except (ConfigError, LighthouseRefused, LighthouseUnreachable) as error:
            self._fail(error)
        finally:
            unguard()
            self._first.set()

    def _thread_main(self) -> None:
        assert self._loop is not None
        try:
            self._loop.run_until_complete(self.run())
        except asyncio.CancelledError:
            log.warning("link cut: it did not close in time")
        except Exception as error:
            # Thread boundary: a bug in a callback must reach the training thread instead of ending the link silently.
            log.exception("the link thread failed")
            self._fail(error)
        finally:
            self._loop.close()

    def _fail(self, error: Exception) -> None:
        self._error = error
        self._first.set()
        self._handler.on_failed(error)

    async def _keep_connected(self) -> None:
        give_up_at = time.monotonic() + self._target.connect_timeout_s
        delay = RETRY_FIRST_S
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S)
        connector = aiohttp.TCPConnector(ssl=trust(self._target), force_close=True)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            while not self._stop.is_set():
                began_at = time.monotonic()
                try:
                    await self._connect_once(session, None if self._was_open else give_up_at)
                except LighthouseRefused as error:
                    if not self._was_open and error.code is not RefusalCode.BUSY:
                        raise
                    self._report_once(f"the lighthouse refuses this process ({error.code.value}): {error}")
                except (aiohttp.ClientError, OSError, asyncio.TimeoutError, RemoteProtocolError) as error:
                    self._report_once(why(error))
                now = time.monotonic()
                if not self._was_open and now >= give_up_at:
                    raise LighthouseUnreachable(self._unreachable())
                if now - began_at > STABLE_S and self._was_open:
                    delay = RETRY_FIRST_S
                pause = delay * random.uniform(0.5, 1.0)
                await self._pause(pause if self._was_open else min(pause, give_up_at - now))
                delay = min(delay * 2, RETRY_MAX_S)

    async def _connect_once(self, session: aiohttp.ClientSession, give_up_at: float | None) -> None:
        """One link from its connection to its end."""
        limit = CONNECT_S + auth.HANDSHAKE_S
        if give_up_at is not None:
            limit = min(limit, max(LAST_ATTEMPT_S, give_up_at - time.monotonic()))
        opening = asyncio.create_task(dial(session, self._target))
        stop = asyncio.create_task(self._stop.wait())
        await asyncio.wait({opening, stop}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if not opening.done():
            opening.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await opening
            raise asyncio.TimeoutError
        websocket = opening.result()
        self._fd = tune(websocket.get_extra_info("socket"))
        self.local_host = (websocket.get_extra_info("sockname") or ("",))[0]
        detail = "closed by this process"
        try:
            self._begin()
            detail = await self._serve(websocket)
        finally:
            self._end(detail)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(websocket.close(), 2 * CLOSE_S)

    async def _serve(self, websocket: aiohttp.ClientWebSocketResponse) -> str:
        """Read and write until the link ends; returns why."""
        assert self._ending is not None
        reader = asyncio.create_task(self._read(websocket))
        writer = asyncio.create_task(self._write(websocket))
        ends: list[asyncio.Future[Any]] = [reader, writer, self._ending]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if reader.done():
                return reader.result()
            if writer.done():
                return why(writer.exception())
            writer.cancel()
            await asyncio.wait({writer})
            while self._stop.is_set() and self._outbox:
                await websocket.send_bytes(self._outbox.popleft())
            return self._ending.result()
        except ConnectionError as error:
            return why(error)
        finally:
            reader.cancel()
            writer.cancel()
            await asyncio.gather(reader, writer, return_exceptions=True)

    async def _read(self, websocket: aiohttp.ClientWebSocketResponse) -> str:
        while True:
            received = await websocket.receive()
            if received.type is aiohttp.WSMsgType.BINARY:
                try:
                    message = self._decode(received.data)
                except RemoteProtocolError as error:
                    return f"the lighthouse sent {error}"
                self._handler.on_message(message)
            elif received.type is aiohttp.WSMsgType.TEXT:
                return "the lighthouse sent a text frame"
            elif received.type is aiohttp.WSMsgType.CLOSE:
                return f"closed by the lighthouse: {received.extra or received.data}"
            else:
                error_ = websocket.exception()
                return why(error_) if error_ is not None else "the connection to the lighthouse closed"

    async def _write(self, websocket: aiohttp.ClientWebSocketResponse) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            with self._lock:
                self._is_woken = False
            while self._outbox:
                # Cancelled within this await, the frame has been handed over whole.
                await websocket.send_bytes(self._outbox.popleft())

    def _begin(self) -> None:
        with self._lock:
            self._outbox.clear()
            self._is_open, self._is_woken = True, False
        self._ending = asyncio.get_running_loop().create_future()
        if self._stop.is_set():
            self._begin_stop()
        self._wake.clear()
        self._was_open, self._last_reason = True, ""
        self._first.set()
        self._handler.on_open()

    def _end(self, detail: str) -> None:
        with self._lock:
            self._is_open = False
            self._outbox.clear()
        if not self._stop.is_set():
            self._report_once(detail)
        self._handler.on_close(detail)

    def _begin_stop(self) -> None:
        self._stop.set()
        self._end_link("closed by this process")

    def _end_link(self, reason: str) -> None:
        if self._ending is not None and not self._ending.done():
            self._ending.set_result(reason)

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._stop.wait(), seconds)

    def _report_once(self, reason: str) -> None:
        if reason != self._last_reason and not self._stop.is_set():
            level = logging.WARNING if self._was_open else logging.INFO
            log.log(level, "no link lighthouse=%s reason=%s", self._target.url, reason)
        self._last_reason = reason

    def _unreachable(self) -> str:
        return (
            f"no lighthouse at {self._target.url} within {self._target.connect_timeout_s:g} s ({self._last_reason}): "
            f"start one with `everstep lighthouse`, or correct {self._target.named_by}"
        )

    # ---- threads and forks

    def call(self, action: Callable[[], object]) -> None:
        """Run it on the link's thread, soon. Any thread, and signal handlers."""
        self._call(action)

    def _call(self, action: Callable[[], object]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            if self._loop is not None:
                self._loop.call_soon_threadsafe(action)

    def _cancel(self) -> None:
        for task in asyncio.all_tasks(self._loop):
            task.cancel()

    def _fds(self) -> list[int]:
        if self._selector is not None:
            return list(self._selector.get_map() or ())  # type: ignore[arg-type]
        return [self._fd] if self._is_open and self._fd >= 0 else []
