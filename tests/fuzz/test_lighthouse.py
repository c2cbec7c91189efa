"""A lighthouse on its port: whatever strangers send, a member beside them keeps its link and its answers."""

import contextlib
import json
import logging
import socket
import struct
import urllib.request
from collections.abc import Iterator
from urllib.parse import quote_from_bytes, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.config import LighthouseSettings
from everstep.core.messages import Switch, ToLighthouse
from everstep.lighthouse.app import Lighthouse
from everstep.link import auth, codec
from tests.fuzz.damage import packed, spoiled
from tests.fuzz.rounds import Fuzz, rounds
from tests.link.parties import TOKEN, Member, Party, beat, hello
from tests.support.waiting import wait_until

DEADLINE_S = 10.0
QUIET_S = 0.02  # how long a stranger waits for the end of its connection; most are cut at once
UPGRADE = (
    b"GET /link HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
REQUESTS = (
    UPGRADE,
    b"GET /api/v1/status HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer x\r\n\r\n",
    b"GET /api/v1/events?job=default&after=oldest&follow=0 HTTP/1.1\r\nHost: a\r\nLast-Event-ID: 1-2\r\n\r\n",
    b"POST /api/v1/drain?job=fuzz&group=a HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc",
    b"POST /healthz HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
)


class Watched:
    """A lighthouse, a member of it that must notice nothing, and what the servers log."""

    def __init__(self, running: Lighthouse, member: Member, log: pytest.LogCaptureFixture, token: bytes | None) -> None:
        self.url, self.token = running.url, token
        self.port = urlsplit(running.url).port or 0
        self._member = member
        self._log = log

    @contextlib.contextmanager
    def stranger(self) -> Iterator[socket.socket]:
        with socket.create_connection(("127.0.0.1", self.port), DEADLINE_S) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            yield sock

    def check(self) -> None:
        """The member's link is the one it had, it is answered, and nothing was an error to the server."""
        assert self._member.client.is_open
        assert not [seen for seen in self._member.events.so_far() if seen.what == "close"]
        assert self.status() == 1
        errors = [r.getMessage() for r in self._log.records if r.levelno >= logging.ERROR or r.exc_info]
        assert not errors, errors[0]
        self._log.clear()

    def status(self) -> int:
        """How many links the member's job has."""
        headers = {"Authorization": f"Bearer {auth.http_key(self.token, 'read')}"} if self.token else {}
        request = urllib.request.Request(self.url + "/api/v1/status", headers=headers)
        with urllib.request.urlopen(request, timeout=DEADLINE_S) as response:
            links: int = json.loads(response.read())["jobs"]["healthy"]["links"]
        return links


@pytest.fixture(params=[None, TOKEN], ids=["open", "token"])
def watched(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Iterator[Watched]:
    caplog.set_level(logging.WARNING)
    with Lighthouse.in_thread(LighthouseSettings(port=0, token=request.param, jobs_max=8)) as running:
        with Member(running.url, "a", job_id="healthy", token=request.param) as member:
            member.events.expect("message", lambda seen: isinstance(seen.value, Switch))
            yield Watched(running, member, caplog, request.param)


def drained(sock: socket.socket, quiet_s: float = QUIET_S) -> bytes:
    """What it says until it closes, or is silent for a moment."""
    heard = b""
    sock.settimeout(quiet_s)
    with contextlib.suppress(OSError):
        while more := sock.recv(1 << 16):
            heard += more
    return heard


@rounds(50)
def test_any_request_is_answered_without_an_error_of_the_server(fuzz: Fuzz, watched: Watched) -> None:
    requests = spoiled(st.sampled_from(REQUESTS), (*REQUESTS, b"\r\n", b"Content-Length: 99999999999999\r\n"))

    @given(st.lists(requests, min_size=1, max_size=3))
    def holds(parts: list[bytes]) -> None:
        with watched.stranger() as stranger:
            with contextlib.suppress(OSError):
                stranger.sendall(b"".join(parts))
                stranger.shutdown(socket.SHUT_WR)
            heard = drained(stranger)
        assert b"500 Internal" not in heard
        watched.check()

    fuzz(holds)


@rounds(30)
def test_any_job_group_and_cursor_of_a_request_is_answered_in_words(fuzz: Fuzz, watched: Watched) -> None:
    values = st.binary(max_size=40).map(quote_from_bytes) | st.sampled_from(("healthy", "%ED%A0%80", "%00", "a" * 3000))
    key = auth.http_key(watched.token, "operate").encode() if watched.token else b""

    @given(st.sampled_from(("POST /api/v1/drain", "GET /api/v1/events", "GET /api/v1/status")), values, values, values)
    def holds(page: str, job: str, group: str, cursor: str) -> None:
        job = "other" if job == "healthy" and group == "a" else job
        head = f"{page}?job={job}&group={group}&after={cursor}&follow=0 HTTP/1.1\r\nHost: a\r\n".encode()
        with watched.stranger() as stranger:
            stranger.sendall(head + b"Connection: close\r\nAuthorization: Bearer " + key + b"\r\n\r\n")
            heard = drained(stranger, DEADLINE_S)
        assert heard[9:12] in (b"200", b"400", b"404"), heard[:300]
        watched.check()

    fuzz(holds)


def masked(payload: bytes, opcode: int = 2, *, is_final: bool = True, length: int = -1) -> bytes:
    """A WebSocket frame as a client sends it; `length` may lie."""
    size = len(payload) if length < 0 else length
    first = (0x80 if is_final else 0) | opcode
    if size < 126:
        head = struct.pack("!BB", first, 0x80 | size)
    elif size < 1 << 16:
        head = struct.pack("!BBH", first, 0xFE, size)
    else:
        head = struct.pack("!BBQ", first, 0xFF, size)
    return head + b"\0\0\0\0" + payload


FRAMES = st.builds(
    masked,
    spoiled(packed(st.from_type(ToLighthouse)) | st.just(codec.encode(hello("x")))),  # type: ignore[arg-type]
    st.sampled_from((2, 2, 2, 2, 0, 1, 3, 8, 9, 10)),
    is_final=st.sampled_from((True, True, True, False)),
    length=st.sampled_from((-1, -1, -1, -1, 0, 5, 126, 1 << 16, 1 << 40, (1 << 63) - 1)),
)


def opened(stranger: socket.socket, watched: Watched, job_id: str) -> bytes:
    """The WebSocket's upgrade; returns the frame that answers the challenge."""
    stranger.sendall(UPGRADE)
    heard = b""
    while b"challenge" not in heard or len(heard.partition(b"\r\n\r\n")[2]) < 2 + heard.partition(b"\r\n\r\n")[2][1]:
        more = stranger.recv(1 << 12)
        assert more, heard
        heard += more
    asked = auth.decode_from_server(heard.partition(b"\r\n\r\n")[2][2:])
    assert isinstance(asked, auth.Challenge)
    return auth.encode(auth.answer(asked, auth.Credentials(job_id=job_id, token=watched.token)))


@rounds(40)
def test_any_answer_to_the_challenge_ends_in_an_answer_or_a_close(fuzz: Fuzz, watched: Watched) -> None:
    @given(st.data())
    def holds(data: st.DataObject) -> None:
        with watched.stranger() as stranger:
            answer = opened(stranger, watched, "fuzz")
            frame = data.draw(spoiled(st.just(masked(answer)), (masked(answer),)) | FRAMES)
            with contextlib.suppress(OSError):
                stranger.sendall(frame)
                stranger.shutdown(socket.SHUT_WR)
            drained(stranger)
        watched.check()

    fuzz(holds)


@rounds(60)
def test_any_frames_after_the_handshake_leave_other_jobs_alone(fuzz: Fuzz, watched: Watched) -> None:
    """Also well-formed messages that say absurd things: the machine of that job must not fall over them."""

    @given(st.lists(FRAMES | spoiled(FRAMES), min_size=1, max_size=5))
    def holds(frames: list[bytes]) -> None:
        with watched.stranger() as stranger:
            answer = opened(stranger, watched, "fuzz")
            with contextlib.suppress(OSError):
                stranger.sendall(masked(answer) + b"".join(frames))
                stranger.shutdown(socket.SHUT_WR)
            drained(stranger)
        watched.check()

    fuzz(holds)


@rounds(30)
def test_damaged_frames_in_its_own_job_leave_a_member_alone(fuzz: Fuzz, watched: Watched) -> None:
    undecodable = st.binary(min_size=1, max_size=60).map(lambda tail: masked(b"\x82\xa4type\xa5nobody" + tail))
    lies = st.builds(masked, st.binary(max_size=9), st.sampled_from((0, 1, 3)), length=st.integers(0, 1 << 62))

    @given(undecodable | lies | st.just(masked(codec.encode(beat(3)))))
    def holds(frame: bytes) -> None:
        with watched.stranger() as stranger:
            answer = opened(stranger, watched, "healthy")
            with contextlib.suppress(OSError):
                stranger.sendall(masked(answer) + frame)
                drained(stranger)
        # Its end is known to the job before the next look.
        with Party(watched.url, job_id="healthy", token=watched.token) as party:
            party.events.expect("open")
        wait_until(lambda: watched.status() == 1)
        watched.check()

    fuzz(holds)
