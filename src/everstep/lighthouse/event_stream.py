"""The event logs of a lighthouse's jobs, and their readers: server-sent events on /api/v1/events.

    GET /api/v1/events?job=default              from now on, after the state as it is
    GET /api/v1/events?job=default&after=CURSOR  what came after; the header Last-Event-ID does the same
    GET /api/v1/events?job=default&after=oldest  everything that is kept first; with &follow=0 nothing after it

A reader holds a cursor, not a queue: however slow it is, it costs the lighthouse one connection's write buffer. One
that the log has overtaken gets a `resync` event with the state now. Format: the HTML standard, "Server-sent events".
"""

import asyncio
import secrets
import time
from collections.abc import Callable

import msgspec
from aiohttp import web

from everstep.core.events import EventLog, JobEvent

READERS_MAX = 1000
BATCH = 256
KEEPALIVE_S = 10.0
WRITE_S = 30.0  # a reader that takes nothing for so long is cut
JOBS_MAX = 2000  # that readers may wait for, besides those that exist

Snapshot = Callable[[str], "dict[str, object] | None"]


class Feed:
    """One job's log, over all its lives, and who waits for more of it."""

    def __init__(self) -> None:
        self.log: EventLog | None = None
        self.readers = 0
        self._waiting: list[asyncio.Future[None]] = []

    def append(self, event: JobEvent) -> None:
        assert self.log is not None
        self.log.append(event, time.time())
        self.wake()

    def begin(self, job_id: str, kept_max: int) -> None:
        """A new life: whoever read the one before is told to start from the state as it is."""
        self.log = EventLog(job_id, secrets.token_hex(4), kept_max)
        self.wake()

    async def changed(self, timeout_s: float) -> bool:
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiting)
        done, _ = await asyncio.wait({waiting}, timeout=timeout_s)
        if not done:
            self._waiting.remove(waiting)
        return bool(done)

    def wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)


class EventStreams:
    """All jobs' feeds. On the server's loop. `snapshot` gives a job's status, or None for a job that is not served."""

    def __init__(self, snapshot: Snapshot, kept_max: int) -> None:
        self._snapshot = snapshot
        self._kept_max = kept_max
        self._feeds: dict[str, Feed] = {}
        self._readers = 0
        self._is_closed = False

    def begin(self, job_id: str) -> Callable[[JobEvent], None]:
        """A job (re)starts; call what is returned with each of its events."""
        feed = self._feeds.setdefault(job_id, Feed())
        feed.begin(job_id, self._kept_max)
        return feed.append

    def forget(self, job_id: str) -> None:
        """The job was dropped; its log goes with it, once nobody reads."""
        feed = self._feeds.get(job_id)
        if feed is not None and not feed.readers:
            del self._feeds[job_id]

    def close(self) -> None:
        """Every stream ends."""
        self._is_closed = True
        for feed in self._feeds.values():
            feed.wake()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        job_id = request.query.get("job", "default")
        follow = request.query.get("follow", "1") not in ("0", "false", "no")
        cursor = request.headers.get("Last-Event-ID") or request.query.get("after", "")
        feed = self._feeds.get(job_id)
        if feed is None or feed.log is None:
            if not follow:
                known = ", ".join(j for j, f in self._feeds.items() if f.log is not None) or "none"
                raise web.HTTPNotFound(text=f"no job {job_id!r} here; jobs: {known}\n")
            if len(self._feeds) >= JOBS_MAX and feed is None:
                raise web.HTTPServiceUnavailable(text="readers wait for too many jobs that do not exist\n")
            feed = self._feeds.setdefault(job_id, Feed())
        if self._readers >= READERS_MAX:
            raise web.HTTPServiceUnavailable(text=f"{READERS_MAX} readers are subscribed; this is the limit\n")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
        await response.prepare(request)
        self._readers += 1
        feed.readers += 1
        try:
            await self._stream(feed, job_id, response, cursor, follow)
        except (ConnectionError, asyncio.TimeoutError):
            pass  # it went away, or does not read
        finally:
            self._readers -= 1
            feed.readers -= 1
            if not feed.readers and self._feeds.get(job_id) is feed and self._snapshot(job_id) is None:
                del self._feeds[job_id]
        return response

    async def _stream(self, feed: Feed, job_id: str, response: web.StreamResponse, cursor: str, follow: bool) -> None:
        await _write(response, b": everstep events\n\n")
        why = "the log does not reach back so far" if cursor else "subscribed"
        while not self._is_closed:
            log = feed.log
            if log is not None:
                cursor = log.oldest_cursor if cursor == "oldest" else cursor
                events = log.after(cursor, BATCH)
                if events is None:
                    events = [log.resync(why, self._snapshot(job_id) or {}, time.time())]
                why = "the lighthouse started this job anew, or the reader fell behind"
                if events:
                    cursor = events[-1].cursor
                    await _write(response, b"".join(map(encode, events)))
                    continue
                if not follow:
                    return
            if not await feed.changed(KEEPALIVE_S):
                await _write(response, b": alive\n\n")


def encode(event: JobEvent) -> bytes:
    """One server-sent event. JSON has no raw line breaks, so one data line holds it."""
    data = msgspec.json.encode(event)
    return b"id: %s\nevent: %s\ndata: %s\n\n" % (event.cursor.encode(), event.kind.value.encode(), data)


async def _write(response: web.StreamResponse, data: bytes) -> None:
    await asyncio.wait_for(response.write(data), WRITE_S)
