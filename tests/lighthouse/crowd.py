"""Many members on one event loop, and strangers without manners, for tests of a lighthouse under stress."""

import asyncio
import os
import socket
import struct
import threading
import time
from urllib.parse import urlsplit

import msgspec

from everstep.core.messages import ToMember, Welcome
from everstep.link import auth
from everstep.link.client import LinkClient
from everstep.link.dial import LinkTarget
from tests.link.parties import hello

DEADLINE_S = 20.0
UPGRADE = (
    b"GET /link HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
PING = struct.pack("!BB", 0x89, 0x80) + b"\0\0\0\0"


class OneOfMany:
    """A handler that says Hello whenever its link is open, and counts the welcomes."""

    def __init__(self, crowd: "Crowd", number: int) -> None:
        self._crowd = crowd
        self._number = number
        target = LinkTarget(url=crowd.url, credentials=auth.Credentials(job_id="crowd"), connect_timeout_s=DEADLINE_S)
        self.client = LinkClient(target, self)

    def on_start(self, loop: asyncio.AbstractEventLoop) -> None: ...

    def on_open(self) -> None:
        self._crowd.opened_at.append(time.monotonic())
        # The job waits for more members than there are: nothing is founded, and each is a joiner.
        name = f"member{self._number}"
        self.client.send(msgspec.structs.replace(hello(name), expected_replicas=2 * self._crowd.size))

    def on_message(self, message: ToMember) -> None:
        if isinstance(message, Welcome):
            self._crowd.welcomed += 1

    def on_close(self, detail: str) -> None:
        self._crowd.closed += 1

    def on_failed(self, error: Exception) -> None:
        self._crowd.failures.append(error)


class Crowd:
    """`size` links to one lighthouse; the counts are over all of them."""

    def __init__(self, url: str, size: int) -> None:
        self.url, self.size = url, size
        self.welcomed = 0
        self.closed = 0
        self.opened_at: list[float] = []
        self.failures: list[Exception] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="a crowd of members")
        self._tasks: list[asyncio.Task[None]] = []

    def __enter__(self) -> "Crowd":
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(DEADLINE_S)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(DEADLINE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(DEADLINE_S)
        self._loop.close()

    async def _start(self) -> None:
        members = [OneOfMany(self, number) for number in range(self.size)]
        self._tasks = [asyncio.ensure_future(member.client.run()) for member in members]

    async def _stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def connection_to(url: str, receive_bytes: int = 0) -> socket.socket:
    """`receive_bytes`: how little of what it does not read its kernel takes."""
    parts = urlsplit(url)
    sock = socket.socket()
    if receive_bytes:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    sock.settimeout(DEADLINE_S)
    sock.connect((parts.hostname, parts.port))
    return sock


def linked(url: str, job_id: str = "job", receive_bytes: int = 0) -> socket.socket:
    """An authenticated link as a bare socket, of a lighthouse without token."""
    sock = connection_to(url, receive_bytes)
    sock.sendall(UPGRADE)
    heard = b""
    while b"challenge" not in heard or len(heard.partition(b"\r\n\r\n")[2]) < 2 + heard.partition(b"\r\n\r\n")[2][1]:
        heard += sock.recv(1 << 12)
    asked = auth.decode_from_server(heard.partition(b"\r\n\r\n")[2][2:])
    assert isinstance(asked, auth.Challenge)
    answer = auth.encode(auth.answer(asked, auth.Credentials(job_id=job_id)))
    sock.sendall(framed(answer))
    assert b"accepted" in sock.recv(1 << 12)
    return sock


def framed(payload: bytes) -> bytes:
    """A binary WebSocket frame as a client sends it."""
    size = len(payload)
    head = struct.pack("!BB", 0x82, 0x80 | size) if size < 126 else struct.pack("!BBH", 0x82, 0xFE, size)
    return head + b"\0\0\0\0" + payload


def round_trips(sock: socket.socket, count: int) -> list[float]:
    """How long each of `count` pings on a link takes, in seconds."""
    found = []
    for _ in range(count):
        began_at = time.monotonic()
        sock.sendall(PING)
        while b"\x8a\x00" not in sock.recv(1 << 12):
            pass
        found.append(time.monotonic() - began_at)
    return found


def is_cut(sock: socket.socket, timeout_s: float = 0.0) -> bool:
    """Whether the other side has ended it; what it said before that is passed over."""
    sock.settimeout(timeout_s)
    try:
        while sock.recv(1 << 16):
            pass
    except (BlockingIOError, TimeoutError):
        return False
    except OSError:
        pass
    return True


def cpu_s(pid: int) -> float:
    """Processor time that a process has used."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
