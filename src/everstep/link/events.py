"""Reads a job's event log from the lighthouse: every event once and in order, over reconnects.

    with subscribe(target) as events:
        for event in events: ...              # any thread; blocks, and ends when the subscription is closed
        event = events.next(timeout_s=5.0)    # raises TimeoutError
        async for event in events: ...        # in an event loop

A thread of its own sleeps in its selector until the lighthouse says something; the reader sleeps on a condition. When
the reader is slow the thread stops to read, and the lighthouse keeps the place; past what it keeps comes a `resync`.
"""

import asyncio
import collections
import contextlib
import logging
import random
import selectors
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterator
from urllib.parse import urlencode

import aiohttp
import msgspec

from everstep import fork_guard
from everstep.core.events import EventKind, JobEvent
from everstep.core.types import RefusalCode
from everstep.errors import ConfigError, EverstepError, LighthouseRefused, LighthouseUnreachable
from everstep.link import auth
from everstep.link.dial import CONNECT_S, LinkTarget, trust, why
from everstep.link.sockets import tune

PATH = "/api/v1/events"
LINE_BYTES_MAX = 16 << 20  # a resync of a very large job
QUEUE_MAX = 1024
RETRY_FIRST_S, RETRY_MAX_S = 0.02, 2.0
SILENT_S = 30.0  # the lighthouse says that it lives every ten

log = logging.getLogger("everstep.link")
_decode = msgspec.json.Decoder(JobEvent).decode


class Subscription:
    """Iterate it, from one thread or one event loop; `close` may be called from any. A context manager.

    Raises LighthouseUnreachable (nothing answered within the target's connect timeout) and LighthouseRefused from the
    first event asked for; later it reconnects for as long as it takes.
    """

    def __init__(
        self,
        target: LinkTarget,
        *,
        after: str = "",
        follow: bool = True,
        kinds: Collection[EventKind] | None = None,
    ) -> None:
        self._target = target
        self._follow = follow
        self._kinds = frozenset(kinds) if kinds is not None else None
        self._cursor = after
        self._changed = threading.Condition()
        self._queue: collections.deque[JobEvent] = collections.deque()
        self._error: EverstepError | None = None
        self._is_over = False
        self._is_full = False
        self._on_change: Callable[[], None] | None = None  # of a reader in an event loop
        self._selector: selectors.BaseSelector | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._main: asyncio.Task[None] | None = None
        self._has_room = asyncio.Event()
        self._thread: threading.Thread | None = None

    @property
    def cursor(self) -> str:
        """Give it as `after` to a later subscription to go on behind the last event that was handed out."""
        return self._cursor

    # ---- life

    def open(self) -> "Subscription":
        assert self._thread is None, "a Subscription opens once"
        self._selector = selectors.DefaultSelector()
        self._loop = asyncio.SelectorEventLoop(self._selector)
        self._thread = threading.Thread(target=self._thread_main, name="everstep-events", daemon=True)
        self._thread.start()
        return self

    def close(self) -> None:
        """Wakes whoever waits for an event: the iteration ends. What had arrived is dropped."""
        with self._changed:
            self._queue.clear()
        self._end(None)
        loop, thread = self._loop, self._thread
        if loop is not None and thread is not None and thread is not threading.current_thread():
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._cancel)
            thread.join(CONNECT_S)

    def __enter__(self) -> "Subscription":
        return self.open()

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- readers

    def next(self, timeout_s: float | None = None) -> JobEvent:
        """The next event. Raises TimeoutError after `timeout_s`, StopIteration when the subscription is over."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            while not self._queue and not self._is_over:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError(f"no event within {timeout_s:g} s")
                self._changed.wait(left)
            event = self._take()
        if event is None:
            raise StopIteration
        return event

    def __iter__(self) -> Iterator[JobEvent]:
        return self

    def __next__(self) -> JobEvent:
        return self.next()

    async def __aiter__(self) -> AsyncIterator[JobEvent]:
        loop = asyncio.get_running_loop()
        bell = asyncio.Event()
        with self._changed:
            self._on_change = lambda: _ring(loop, bell)
        try:
            while True:
                bell.clear()
                with self._changed:
                    event, is_over = self._take(), self._is_over
                if event is not None:
                    yield event
                elif is_over:
                    return
                else:
                    await bell.wait()
        finally:
            with self._changed:
                self._on_change = None

    def _take(self) -> JobEvent | None:
        """Under the lock."""
        if self._queue:
            event = self._queue.popleft()
            self._cursor = event.cursor
            if self._is_full and len(self._queue) <= QUEUE_MAX // 2:
                self._is_full = False
                assert self._loop is not None
                with contextlib.suppress(RuntimeError):
                    self._loop.call_soon_threadsafe(self._has_room.set)
            return event
        if self._error is not None:
            raise self._error
        return None

    # ---- the thread

    def _thread_main(self) -> None:
        assert self._loop is not None
        unguard = fork_guard.guard(self._fds)
        error: EverstepError | None = None
        try:
            self._main = self._loop.create_task(self._read_for_ever())
            self._loop.run_until_complete(self._main)
        except asyncio.CancelledError:
            pass
        except EverstepError as ended:
            error = ended
        finally:
            unguard()
            self._loop.close()
            self._end(error)

    async def _read_for_ever(self) -> None:
        give_up_at: float | None = time.monotonic() + self._target.connect_timeout_s
        delay, cursor = RETRY_FIRST_S, self._cursor
        reason = ""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=SILENT_S)
        connector = aiohttp.TCPConnector(ssl=trust(self._target), force_close=True)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            while True:
                try:
                    async with contextlib.aclosing(self._events(session, cursor)) as events:
                        async for event in events:
                            give_up_at, delay, reason = None, RETRY_FIRST_S, ""
                            cursor = event.cursor
                            await self._deliver(event)
                    if not self._follow:
                        return
                    said = "the lighthouse ended the stream"
                except (aiohttp.ClientError, OSError, asyncio.TimeoutError, msgspec.MsgspecError, ValueError) as error:
                    said = why(error)
                if said != reason:
                    log.info("no events lighthouse=%s reason=%s", self._target.url, said)
                reason = said
                if give_up_at is not None and time.monotonic() >= give_up_at:
                    raise LighthouseUnreachable(f"no events from {self._target.url}: {said}")
                await asyncio.sleep(delay * random.uniform(0.5, 1.0))
                delay = min(2 * delay, RETRY_MAX_S)

    async def _events(self, session: aiohttp.ClientSession, cursor: str) -> AsyncGenerator[JobEvent, None]:
        query = {"job": self._target.credentials.job_id, "follow": str(int(self._follow))}
        headers = {"Accept": "text/event-stream"}
        if cursor:
            query["after"] = cursor
        if self._target.credentials.token is not None:
            headers["Authorization"] = f"Bearer {auth.http_key(self._target.credentials.token, 'read')}"
        async with session.get(f"{self._target.url}{PATH}?{urlencode(query)}", headers=headers) as response:
            if response.status != 200:
                text = (await response.content.read(500)).decode(errors="replace").strip()
                raise _refusal(response.status, text)
            if response.connection is not None and response.connection.transport is not None:
                tune(response.connection.transport.get_extra_info("socket"))
            async for event in _parsed(response.content):
                yield event

    async def _deliver(self, event: JobEvent) -> None:
        if self._kinds is not None and event.kind not in self._kinds:
            return
        with self._changed:
            self._queue.append(event)
            self._is_full = len(self._queue) >= QUEUE_MAX
            is_full = self._is_full
            self._notify()
        if is_full:
            self._has_room.clear()
            with self._changed:
                if not self._is_full:
                    return
            await self._has_room.wait()

    def _end(self, error: EverstepError | None) -> None:
        with self._changed:
            self._error = self._error or error
            self._is_over = True
            self._notify()

    def _notify(self) -> None:
        self._changed.notify_all()
        if self._on_change is not None:
            self._on_change()

    def _cancel(self) -> None:
        if self._main is not None:
            self._main.cancel()

    def _fds(self) -> list[int]:
        return list(self._selector.get_map() or ()) if self._selector is not None else []  # type: ignore[arg-type]


async def _parsed(content: aiohttp.StreamReader) -> AsyncIterator[JobEvent]:
    """Server-sent events; only their data matters, which names everything."""
    data: list[bytes] = []
    size = 0
    buffer = b""
    async for chunk in content.iter_any():
        lines = (buffer + chunk).split(b"\n")
        buffer = lines.pop()
        if len(buffer) > LINE_BYTES_MAX:
            raise ValueError(f"a line of more than {LINE_BYTES_MAX} bytes")
        for raw in lines:
            line = raw.rstrip(b"\r")
            if not line and data:
                event = _event(b"\n".join(data))
                if event is not None:
                    yield event
                data, size = [], 0
            elif line.startswith(b"data:"):
                size += len(line)
                if size > LINE_BYTES_MAX:
                    raise ValueError(f"an event of more than {LINE_BYTES_MAX} bytes")
                data.append(line[5:].removeprefix(b" "))


def _event(data: bytes) -> JobEvent | None:
    """None for one of a kind that this release does not know: a newer lighthouse says more, and no less."""
    try:
        return _decode(data)
    except msgspec.ValidationError as error:
        log.info("event skipped: %s", error)
        return None


def _refusal(status: int, text: str) -> Exception:
    if status == 401:
        return LighthouseRefused(RefusalCode.BAD_TOKEN, text or "the job token is missing or wrong")
    if status == 404:
        return ConfigError(text or "no such page: is this a lighthouse of the same release?")
    return aiohttp.ClientError(f"HTTP {status} {text}")


def _ring(loop: asyncio.AbstractEventLoop, bell: asyncio.Event) -> None:
    with contextlib.suppress(RuntimeError):  # the reader's loop has ended
        loop.call_soon_threadsafe(bell.set)
