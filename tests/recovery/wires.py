"""The two ends of a transfer for tests, and a TCP proxy between them that damages or holds back what passes."""

import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import torch

from everstep.recovery import Fetch, FetchRequest, RecoveryServer, ServerOptions, Snapshot, TransferAuth

DEADLINE_S = 10.0
KEY = "1.2/3/abc"
AUTH = TransferAuth(b"a token for tests")

Tamper = Callable[[int, bytes], bytes | None]


def state_of(mib: float = 0.25) -> dict[str, Any]:
    """A model that fills several chunks of a test, or as many MiB as wanted."""
    elements = int(mib * (1 << 18))
    return {"model": {"w": torch.arange(elements, dtype=torch.float32).view(-1, 64)}, "step": 7, "lr": 0.125}


@contextlib.contextmanager
def serving(
    snapshot: Snapshot | None = None, auth: TransferAuth | None = None, **options: Any
) -> Iterator[tuple[RecoveryServer, str]]:
    with RecoveryServer(ServerOptions(auth=auth, **options)) as server:
        url = server.start("127.0.0.1", "127.0.0.1")
        if snapshot is not None:
            server.offer(KEY, snapshot)
        yield server, url


def request_to(url: str, timeout_s: float = DEADLINE_S, **fields: Any) -> FetchRequest:
    """Over HTTP, unless told otherwise: on one host a fetch would not use the wire."""
    fields.setdefault("may_read_memory", False)
    return FetchRequest(source_url=url, key=fields.pop("key", KEY), deadline=time.monotonic() + timeout_s, **fields)


def fetched(url: str, timeout_s: float = DEADLINE_S, **fields: Any) -> dict[str, Any]:
    return Fetch(request_to(url, timeout_s, **fields)).run()


class Running:
    """A fetch on a thread of its own. `error` and `state` are set when it has ended, at `ended_at`."""

    def __init__(self, fetch: Fetch) -> None:
        self.fetch = fetch
        self.error: Exception | None = None
        self.state: dict[str, Any] | None = None
        self.ended_at = 0.0
        self._thread = threading.Thread(target=self._run, name="a fetch under test")

    def __enter__(self) -> "Running":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.fetch.abort()
        self.wait()

    def wait(self) -> "Running":
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive(), f"the fetch did not end within {DEADLINE_S:g} s"
        return self

    def _run(self) -> None:
        try:
            self.state = self.fetch.run()
        except Exception as error:  # boundary of a thread: the test looks at it
            self.error = error
        self.ended_at = time.monotonic()


class Proxy:
    """Passes connections on to `url`; `tamper(offset, data)` makes of the source's bytes what arrives.

    None for bytes cuts the connection there. `without`: what it takes out of requests. `cut_at`: the first connection
    on which this is asked for is cut. It runs until the context ends.
    """

    def __init__(self, url: str, tamper: Tamper, without: bytes = b"", cut_at: bytes = b"") -> None:
        self._target = urlsplit(url)
        self._tamper = tamper
        self._without = without
        self._cut_at = cut_at
        self.has_cut = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._stop, self._stopped = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="proxy")
        self._threads = [self._thread]
        self.passed = 0  # bytes of the source, on the latest connection
        self.asked: list[bytes] = []
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> "Proxy":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.close()
        for thread in self._threads:
            thread.join(DEADLINE_S)
            assert not thread.is_alive()
        self._listener.close()
        self._stopped.close()

    def _run(self) -> None:
        while self._stopped not in select.select([self._listener, self._stopped], [], [])[0]:
            near, _ = self._listener.accept()
            thread = threading.Thread(target=self._serve, args=(near,), name="proxy of a connection")
            self._threads.append(thread)
            thread.start()

    def _serve(self, near: socket.socket) -> None:
        assert self._target.port is not None
        with near, socket.create_connection(("127.0.0.1", self._target.port)) as far:
            with contextlib.suppress(OSError):
                self._pass_on(near, far)

    def _pass_on(self, near: socket.socket, far: socket.socket) -> None:
        self.passed = passed = 0
        near.settimeout(DEADLINE_S)
        while True:
            ready = select.select([near, far, self._stopped], [], [])[0]
            if self._stopped in ready:
                return
            if near in ready:
                if not (asked := near.recv(1 << 16)):
                    return
                self.asked.append(asked)
                if self._cut_at and self._cut_at in asked and not self.has_cut:
                    self.has_cut = True
                    return
                far.sendall(asked.replace(self._without, b"") if self._without else asked)
            if far in ready:
                if not (answer := far.recv(1 << 16)):
                    return
                sent = self._tamper(passed, answer)
                self.passed = passed = passed + len(answer)
                if sent is None:
                    return
                near.sendall(sent)


def flipping(position: int, bit: int = 0) -> Tamper:
    """Flips one bit of the source's stream."""

    def tamper(offset: int, data: bytes) -> bytes:
        if not offset <= position < offset + len(data):
            return data
        damaged = bytearray(data)
        damaged[position - offset] ^= 1 << bit
        return bytes(damaged)

    return tamper


@contextlib.contextmanager
def saying(*answers: bytes) -> Iterator[str]:
    """A source without manners: to the n-th head that it receives it says `answers[n]`, and then it closes."""
    listener = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        with contextlib.suppress(OSError):
            near, _ = listener.accept()
            with near:
                near.settimeout(DEADLINE_S)
                for answer in answers:
                    heard = b""
                    while b"\r\n\r\n" not in heard:
                        if not (more := near.recv(1 << 16)):
                            return
                        heard += more
                    near.sendall(answer)
                near.shutdown(socket.SHUT_WR)
                while near.recv(1 << 16):
                    pass

    thread = threading.Thread(target=run, name="a source without manners")
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        thread.join(DEADLINE_S)
        listener.close()
        assert not thread.is_alive()
