"""The lighthouse server: one aiohttp app on one port, many jobs.

    /link             members' WebSocket links
    /api/v1/status    JSON: every job's quorum, round and members (with the job token where one is set)
    /api/v1/events    a job's event log, as server-sent events (the same)
    /api/v1/drain     POST ?job=&group=: let a group leave at a step boundary (the same)
    /api/v1/new-history   POST ?job=: give up the state that the job's members hold (the same)
    /healthz          "ok" to anybody

Embedded in a process with an event loop it is an async context manager; `in_thread` runs it on a thread of its own.
"""

import asyncio
import concurrent.futures
import contextlib
import errno
import resource
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from types import TracebackType

import msgspec
from aiohttp import web

from everstep import __version__, fork_guard
from everstep.config import LighthouseSettings
from everstep.core.messages import PROTOCOL_VERSION
from everstep.errors import ConfigError
from everstep.lighthouse.door import Door, look_after
from everstep.lighthouse.jobs import Jobs, NotDurable
from everstep.lighthouse.journal import StateDir
from everstep.link import auth
from everstep.link.server import LinkServer

BACKLOG = 4096
START_S = 30.0
STOP_S = 10.0


class Lighthouse:
    """`async with Lighthouse(settings) as lighthouse:` serves until the block ends; `address` is where.

    Raises ConfigError when the port is taken, the state directory is in use or damaged, or the certificate unusable.
    """

    def __init__(self, settings: LighthouseSettings) -> None:
        self._settings = settings
        self._state_dir = StateDir(settings.state_dir) if settings.state_dir is not None else None
        self._started_at = 0.0
        self._jobs: Jobs | None = None
        self._server: LinkServer | None = None
        self._runner: web.AppRunner | None = None
        self._door: Door | None = None
        self._unguard: Callable[[], None] | None = None
        self._address = ""

    @property
    def address(self) -> str:
        """host:port, as a trainer's EVERSTEP_LIGHTHOUSE takes it."""
        return self._address

    @property
    def links(self) -> int:
        """How many members and nodes are connected. Any thread."""
        return self._server.links if self._server is not None else 0

    @property
    def url(self) -> str:
        return f"{'https' if self._settings.tls_cert else 'http'}://{self._address}"

    async def __aenter__(self) -> "Lighthouse":
        tls = _tls(self._settings)
        if self._state_dir is not None:
            self._state_dir.open()
        try:
            if self._state_dir is not None:
                self._state_dir.check()
            listener = _listen(self._settings)
            try:
                await self._serve(listener, tls)
            except BaseException:
                listener.close()
                raise
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._close()

    @classmethod
    @contextlib.contextmanager
    def in_thread(cls, settings: LighthouseSettings) -> Iterator["Lighthouse"]:
        """Serve on a thread of its own until the block ends."""
        lighthouse = cls(settings)
        ready: concurrent.futures.Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = concurrent.futures.Future()

        async def serve() -> None:
            stop = asyncio.Event()
            async with lighthouse:
                ready.set_result((asyncio.get_running_loop(), stop))
                await stop.wait()

        def thread_main() -> None:
            try:
                run_until_complete(serve)
            except BaseException as error:
                # Thread boundary: whoever waits for the start gets it; later than that it is a bug, and is printed.
                if ready.done():
                    raise
                ready.set_exception(error)

        thread = threading.Thread(target=thread_main, name="everstep-lighthouse", daemon=True)
        thread.start()
        loop, stop = ready.result(START_S)
        try:
            yield lighthouse
        finally:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(stop.set)
            thread.join(STOP_S)

    async def _serve(self, listener: socket.socket, tls: ssl.SSLContext | None) -> None:
        # A forked child that kept listening would take this port's connections and answer none.
        self._unguard = fork_guard.guard(lambda: [listener.fileno()] if listener.fileno() >= 0 else [])
        self._jobs = Jobs(self._settings, self._state_dir)
        self._server = LinkServer(self._jobs, self._settings.token, nodes=self._jobs.rendezvous)
        self._jobs.attach(self._server)
        app = web.Application(middlewares=[look_after])
        app.router.add_get("/link", self._server.handle)
        app.router.add_get("/api/v1/status", self._status)
        app.router.add_get("/api/v1/events", self._events)
        app.router.add_post("/api/v1/{request:drain|admit|admit-node|new-history}", self._operate)
        app.router.add_get("/healthz", _healthz)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        self._door = Door(self._runner, listener, tls)
        self._door.open()
        host, port = listener.getsockname()[:2]
        self._address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._started_at = time.monotonic()

    async def _close(self) -> None:
        """Members see their links close, and no job hears of it: to its machine this is a sudden end."""
        if self._jobs is not None:
            await self._jobs.close()
        if self._server is not None:
            self._server.close()
        if self._door is not None:
            self._door.close()
        if self._runner is not None:
            await self._runner.cleanup()
        if self._unguard is not None:
            self._unguard()
        if self._state_dir is not None:
            self._state_dir.close()

    # ---- HTTP

    async def _status(self, request: web.Request) -> web.Response:
        self._check(request, "read")
        status = {
            "version": __version__,
            "protocol_version": PROTOCOL_VERSION,
            "uptime_s": round(time.monotonic() - self._started_at, 3),
            "jobs": self._jobs.status() if self._jobs is not None else {},
        }
        return web.Response(body=msgspec.json.encode(status), content_type="application/json")

    async def _events(self, request: web.Request) -> web.StreamResponse:
        self._check(request, "read")
        assert self._jobs is not None
        return await self._jobs.streams.handle(request)

    async def _operate(self, request: web.Request) -> web.Response:
        self._check(request, "operate")
        if "Origin" in request.headers:
            # A web page somewhere would use its reader's access to this port.
            raise web.HTTPForbidden(text="browsers have no business here\n")
        assert self._jobs is not None
        job, group = request.query.get("job", "default"), request.query.get("group", "")
        try:
            match request.match_info["request"]:
                case "drain":
                    await self._jobs.drain(job, group)
                    text = f"group {group} leaves at a step boundary, once another group holds the state"
                case "admit":
                    await self._jobs.pardon(job, group)
                    text = f"group {group} is let in again; its deaths so far are forgotten"
                case "admit-node":
                    node = request.query.get("node", "")
                    self._jobs.rendezvous.admit_node(job, node)
                    text = f"node {node} may join again"
                case _:
                    await self._jobs.start_new_history(job)
                    text = "the state is given up: groups that hold it end, those without it begin anew"
        except LookupError as error:
            raise web.HTTPNotFound(text=f"{error}\n") from error
        except NotDurable as error:
            raise web.HTTPServiceUnavailable(text=f"{error}\n") from error
        return web.Response(text=text + "\n")

    def _check(self, request: web.Request, scope: str) -> None:
        bearer = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if not auth.admits(self._settings.token, bearer, scope):
            text = "the job token is missing or wrong: send it as Authorization: Bearer <token>\n"
            raise web.HTTPUnauthorized(text=text, headers={"WWW-Authenticate": "Bearer"})


async def _healthz(_: web.Request) -> web.Response:
    return web.Response(text="ok\n")


def serve(settings: LighthouseSettings, on_ready: Callable[[Lighthouse], None]) -> None:
    """Serve until SIGTERM or SIGINT; `on_ready` is called once it listens. For the main thread of a process."""

    async def until_signalled() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        async with Lighthouse(settings) as lighthouse:
            on_ready(lighthouse)
            await stop.wait()

    _allow_many_connections()
    run_until_complete(until_signalled)


def _allow_many_connections() -> None:
    """A shell's usual soft limit of 1024 descriptors is a thousand members; the hard limit is ours to use."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def run_until_complete(main: Callable[[], Coroutine[None, None, None]]) -> None:
    """Run on a new event loop, uvloop's when it is installed."""
    loop = _new_event_loop()
    try:
        loop.run_until_complete(main())
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def _new_event_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


def _listen(settings: LighthouseSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.bind else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((settings.bind, settings.port))
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {settings.port} of {settings.bind} is in use: choose another with --port (0 takes any free "
                "one), or stop what listens there"
            ) from error
        raise ConfigError(f"cannot listen on {settings.bind} port {settings.port}: {error.strerror}") from error
    return sock


def _tls(settings: LighthouseSettings) -> ssl.SSLContext | None:
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(
            f"--tls-cert {settings.tls_cert} and --tls-key {settings.tls_key} are no usable pair of PEM files: {error}"
        ) from error
    return context
