"""The server's end: who breaks the rules, or dies, loses a link; nobody else notices."""

import asyncio
import contextlib
import signal
import time
from collections.abc import Awaitable, Callable

import aiohttp
import msgspec
import pytest

from everstep.core.messages import Drain, Goodbye, Heartbeat, ToLighthouse, Waiting
from everstep.link import codec
from everstep.link.server import CLOSE_GRACE_S, SEND_BYTES_MAX
from tests.link.parties import Party, Server, StuckParty, bare_link, beat, hello, serving
from tests.support.processes import Spawner

CLIENT = """
import sys
from everstep.link.auth import Credentials
from everstep.link.client import LinkClient
from everstep.link.dial import LinkTarget

class Handler:
    def on_start(self, loop): pass
    def on_open(self): print("open")
    def on_message(self, message): print("message", message)
    def on_close(self, detail): print("close", detail)
    def on_failed(self, error): print("failed", error)

client = LinkClient(LinkTarget(url=sys.argv[1], credentials=Credentials(job_id="job")), Handler())
client.start()
sys.stdin.readline()
client.close()
"""


def test_messages_arrive_in_order_in_both_directions() -> None:
    with serving() as server, Party(server.url) as party:
        link = server.events.expect("opened").link
        party.events.expect("open")
        messages: list[ToLighthouse] = [hello(), *map(beat, range(300)), Drain()]
        for message in messages:
            assert party.client.send(message) == ""
        assert server.events.expect("message").value == hello()
        assert [server.events.expect("message").value for _ in range(300)] == list(map(beat, range(300)))
        assert server.events.expect("message").value == Drain()
        for n in range(100):
            server.send(Waiting(str(n)), link)
        assert [party.events.expect("message").value for _ in range(100)] == [Waiting(str(n)) for n in range(100)]


def test_a_message_to_many_links_reaches_each_of_them_once() -> None:
    with serving() as server, Party(server.url) as a, Party(server.url) as b:
        links = [server.events.expect("opened").link for _ in range(2)]
        server.send(Waiting("all"), *links, 999)
        server.send(Waiting("end"), *links)
        for party in (a, b):
            assert [party.events.expect("message").value.reason for _ in range(2)] == ["all", "end"]


@pytest.mark.parametrize(
    ("misbehave", "reason"),
    [
        (lambda ws: ws.send_bytes(b"\xc1 no message"), "undecodable frame of 12 bytes"),
        (lambda ws: ws.send_str("text"), "text frame"),
        (lambda ws: ws.send_bytes(msgspec.msgpack.encode(Heartbeat(activity_s=float("nan")))), "activity_s is nan"),
        (lambda ws: ws.send_bytes(b"\0" * (codec.FRAME_BYTES_MAX + 1)), "4194305"),
    ],
)
def test_an_illegal_frame_costs_its_sender_the_link_and_nobody_else(
    misbehave: Callable[[aiohttp.ClientWebSocketResponse], Awaitable[None]], reason: str
) -> None:
    with serving() as server, Party(server.url) as other:
        other_link = server.events.expect("opened").link

        async def offend() -> None:
            async with bare_link(server.url) as websocket:
                # A sender in the midst of a frame too large sees a reset; its own codec makes none such.
                with contextlib.suppress(ConnectionError):
                    await misbehave(websocket)
                    assert (await websocket.receive()).type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED)

        asyncio.run(offend())
        closed = server.events.expect("closed")
        assert closed.link != other_link
        assert reason in closed.value
        server.send(Waiting("still there"), other_link)
        assert other.events.expect("message").value == Waiting("still there")


def test_a_reader_that_stops_reading_loses_its_link_while_the_others_are_served() -> None:
    with serving() as server, StuckParty(server.url) as stuck:
        stuck_link = server.events.expect("opened").link
        with Party(server.url) as other:
            other_link = server.events.expect("opened").link
            large = Waiting("x" * (SEND_BYTES_MAX // 4))
            for n in range(80):  # some 20 MB, more than the kernel's buffers take
                server.send(large, stuck_link)
                server.send(Waiting(str(n)), other_link)
                assert other.events.expect("message").value == Waiting(str(n))
            closed = server.events.expect("closed")
            assert closed.link == stuck_link
            assert "does not read" in closed.value
            stuck.go_on.set()
            stuck.events.expect("close")
            stuck.events.expect("open")


def test_the_death_of_a_client_process_is_noticed_at_once(spawn: Spawner) -> None:
    with serving() as server:
        child = spawn(["-c", CLIENT, server.url])
        child.expect_line("open")
        link = server.events.expect("opened").link
        killed_at = time.monotonic()
        child.kill(signal.SIGKILL)
        closed = server.events.expect("closed")
        child.wait()
        assert closed.link == link
        assert closed.at - killed_at < 0.5  # measured: about 1 ms on an idle machine


def test_what_was_sent_before_a_close_arrives_although_the_client_sends_on() -> None:
    with serving() as server, Party(server.url) as party:
        link = server.events.expect("opened").link
        party.events.expect("open")
        for step in range(200):
            party.client.send(beat(step))
        server.send(Waiting("last words"), link)
        server.close_link(link, "go away")
        assert party.events.expect("message").value == Waiting("last words")
        assert "go away" in party.events.expect("close").value
        closed = server.events.expect("closed")
        assert (closed.link, closed.value) == (link, "go away")
        again = server.events.expect("opened").link
        assert again != link


def test_each_opened_link_is_closed_exactly_once_and_nothing_comes_after_it() -> None:
    with serving() as server:
        for n in range(5):
            with Party(server.url) as party:
                party.events.expect("open")
                party.client.send(hello(str(n)))
                party.client.close(Goodbye("done"))
                server.events.expect("closed")
        assert server.events.so_far() == []


def test_a_client_that_does_not_authenticate_is_sent_away() -> None:
    async def stay_silent(server: Server) -> float:
        async with aiohttp.ClientSession() as session, session.ws_connect(server.url + "/link") as websocket:
            began_at = time.monotonic()
            while (await websocket.receive()).type is aiohttp.WSMsgType.BINARY:
                pass
            return time.monotonic() - began_at

    with serving(handshake_s=0.1) as server:
        assert asyncio.run(stay_silent(server)) < 0.1 + 2 * CLOSE_GRACE_S
        assert server.events.so_far() == []


@pytest.mark.parametrize(
    ("headers", "status"),
    [({}, 426), ({"Origin": "http://example.org", "Upgrade": "websocket", "Connection": "Upgrade"}, 403)],
)
def test_browsers_and_plain_http_get_no_link(headers: dict[str, str], status: int) -> None:
    async def get(url: str) -> int:
        async with aiohttp.ClientSession() as session, session.get(url, headers=headers) as response:
            return response.status

    with serving() as server:
        assert asyncio.run(get(server.url + "/link")) == status
