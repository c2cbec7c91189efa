"""The two ends of a link for tests: a server on a thread of its own, members, and a client without manners."""

import asyncio
import contextlib
import queue
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web

from everstep.core.messages import Effect, Heartbeat, Hello, Log, Refused, Send, ToLighthouse, ToMember
from everstep.core.moves import LinkDown, LinkUp, ReadyToJoin, ReplicaConfig, ReplicaEvent
from everstep.core.replica import Replica
from everstep.core.types import MemberId, Phase, Report
from everstep.link import auth
from everstep.link.client import LinkClient
from everstep.link.dial import LinkTarget
from everstep.link.driver import Driver
from everstep.link.server import LinkServer

DEADLINE_S = 10.0
TOKEN = b"a token for tests"


@dataclass(frozen=True)
class Seen:
    """Something that one end noticed, and when on the monotonic clock."""

    what: str
    link: int = 0
    value: Any = None
    at: float = field(default_factory=time.monotonic)


class Events:
    """What was seen, in order; read on the test's thread."""

    def __init__(self) -> None:
        self._queue: queue.Queue[Seen] = queue.Queue()

    def add(self, what: str, link: int = 0, value: Any = None) -> None:
        self._queue.put(Seen(what, link, value))

    def expect(self, what: str, fits: Callable[[Seen], bool] = lambda _: True) -> Seen:
        """The next thing of this kind that fits; what came before it is passed over."""
        deadline = time.monotonic() + DEADLINE_S
        passed: list[Seen] = []
        while True:
            try:
                seen = self._queue.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"no {what!r} within {DEADLINE_S:g} s, only {passed}") from None
            if seen.what == what and fits(seen):
                return seen
            passed.append(seen)

    def so_far(self) -> list[Seen]:
        found = []
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self._queue.get_nowait())
        return found


class Recorder:
    """A LinkListener that lets everybody in but for `refusals` by job."""

    def __init__(self) -> None:
        self.events = Events()
        self.refusals: dict[str, Refused] = {}

    def admit(self, job_id: str) -> Refused | None:
        return self.refusals.get(job_id)

    def opened(self, link: int, job_id: str) -> None:
        self.events.add("opened", link, job_id)

    def message(self, link: int, message: ToLighthouse) -> None:
        self.events.add("message", link, message)

    def closed(self, link: int, detail: str) -> None:
        self.events.add("closed", link, detail)


class Server:
    """A LinkServer in an aiohttp app on a thread of its own."""

    def __init__(self, token: bytes | None, handshake_s: float) -> None:
        self.recorder = Recorder()
        self.url = ""
        self._token = token
        self._handshake_s = handshake_s
        self._loop = asyncio.new_event_loop()
        self._server: LinkServer | None = None

    @property
    def events(self) -> Events:
        return self.recorder.events

    def send(self, message: ToMember, *links: int) -> None:
        self.on_loop(lambda server: server.send(message, links))

    def close_link(self, link: int, reason: str) -> None:
        self.on_loop(lambda server: server.close_link(link, reason))

    def on_loop(self, call: Callable[[LinkServer], object]) -> None:
        """Run on the server's loop, and wait until it has."""

        async def run() -> None:
            assert self._server is not None
            call(self._server)

        asyncio.run_coroutine_threadsafe(run(), self._loop).result(DEADLINE_S)

    @contextlib.contextmanager
    def running(self) -> Iterator["Server"]:
        thread = threading.Thread(target=self._loop.run_forever, name="link server of a test")
        thread.start()
        runner = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(DEADLINE_S)
        try:
            yield self
        finally:
            asyncio.run_coroutine_threadsafe(self._stop(runner), self._loop).result(DEADLINE_S)
            self._loop.call_soon_threadsafe(self._loop.stop)
            thread.join(DEADLINE_S)
            self._loop.close()

    async def _start(self) -> web.AppRunner:
        limit_s = self._handshake_s
        self._server = LinkServer(self.recorder, self._token, handshake_s=limit_s, first_word_s=limit_s)
        app = web.Application()
        app.router.add_get("/link", self._server.handle)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = "http://{}:{}".format(*runner.addresses[0][:2])
        return runner

    async def _stop(self, runner: web.AppRunner) -> None:
        assert self._server is not None
        self._server.close()
        await runner.cleanup()


def serving(token: bytes | None = None, handshake_s: float = 5.0) -> contextlib.AbstractContextManager[Server]:
    return Server(token, handshake_s).running()


class Party:
    """A LinkClient, and a handler that notes what it hears. It starts with the `with` block."""

    def __init__(
        self,
        url: str,
        *,
        job_id: str = "job",
        token: bytes | None = None,
        version: int | None = None,
        connect_timeout_s: float = DEADLINE_S,
        **target: Any,
    ) -> None:
        credentials = auth.Credentials(job_id=job_id, token=token)
        if version is not None:
            credentials = auth.Credentials(job_id=job_id, token=token, version=version)
        self.events = Events()
        self.client = LinkClient(
            LinkTarget(url=url, credentials=credentials, connect_timeout_s=connect_timeout_s, **target), self
        )

    def __enter__(self) -> "Party":
        self.client.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def on_start(self, loop: asyncio.AbstractEventLoop) -> None: ...

    def on_open(self) -> None:
        self.events.add("open")

    def on_message(self, message: ToMember) -> None:
        self.events.add("message", value=message)

    def on_close(self, detail: str) -> None:
        self.events.add("close", value=detail)

    def on_failed(self, error: Exception) -> None:
        self.events.add("failed", value=error)


class StuckParty(Party):
    """Stops at its first message, and reads nothing more until `go_on`."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.go_on = threading.Event()

    def __enter__(self) -> "StuckParty":
        super().__enter__()
        return self

    def on_message(self, message: ToMember) -> None:
        super().on_message(message)
        self.go_on.wait(3 * DEADLINE_S)


class Member(Party):
    """A party with the real machine of a member behind it."""

    def __init__(self, url: str, replica_id: str, *, expected_replicas: int = 1, **target: Any) -> None:
        super().__init__(url, **target)
        config = ReplicaConfig(
            replica_id=replica_id, nonce=secrets.token_hex(8), store="host:1", expected_replicas=expected_replicas
        )
        self.lock = threading.RLock()
        self.replica = Replica(config)
        self.driver: Driver[ToMember | ReplicaEvent] = Driver(self.replica, self._perform, lock=self.lock)

    def __enter__(self) -> "Member":
        super().__enter__()
        return self

    def _perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                self.client.send(effect.message)
            elif isinstance(effect, Log):
                self.events.add("log", value=effect.event)

    def on_start(self, loop: asyncio.AbstractEventLoop) -> None:
        self.driver.attach(loop)
        self.driver.receive(ReadyToJoin())

    def on_open(self) -> None:
        super().on_open()
        self.driver.receive(LinkUp())

    def on_message(self, message: ToMember) -> None:
        super().on_message(message)
        self.driver.receive(message)

    def on_close(self, detail: str) -> None:
        super().on_close(detail)
        self.driver.receive(LinkDown())


@contextlib.asynccontextmanager
async def bare_link(url: str, job_id: str = "job") -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
    """An authenticated WebSocket to a server without token, for sending what no client of ours would."""
    async with aiohttp.ClientSession() as session:
        async with session.ws_connect(url + "/link") as websocket:
            asked = auth.decode_from_server(await websocket.receive_bytes())
            assert isinstance(asked, auth.Challenge)
            await websocket.send_bytes(auth.encode(auth.answer(asked, auth.Credentials(job_id=job_id))))
            assert isinstance(auth.decode_from_server(await websocket.receive_bytes()), auth.Accepted)
            yield websocket


def hello(replica_id: str = "a") -> Hello:
    report = Report(MemberId(replica_id, 0), None, True, None, 0, Phase.RUNNING, None, None)
    return Hello(report=report, nonce=f"process of {replica_id}")


def beat(step: int) -> Heartbeat:
    return Heartbeat(step=step)
