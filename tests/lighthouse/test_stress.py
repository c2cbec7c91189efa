"""A lighthouse under stress: no descriptors left, everybody at once, connections that come to nothing, slow readers.

Each test has members beside the trouble, which must keep their links and their answers.
"""

import asyncio
import contextlib
import itertools
import resource
import socket
import statistics
import time
from collections.abc import Iterator

import pytest
from aiohttp import web

from everstep.lighthouse.door import Door, look_after
from everstep.link import codec
from everstep.link.server import HANDSHAKES_MAX, SEND_BYTES_MAX
from tests.lighthouse.crowd import (
    UPGRADE,
    Crowd,
    connection_to,
    cpu_s,
    framed,
    is_cut,
    linked,
    round_trips,
)
from tests.link.parties import Party, beat, hello, serving
from tests.support.processes import Spawned, Spawner
from tests.support.waiting import wait_until

DEADLINE_S = 20.0
LATENCY_MAX_S = 2.0  # of any single answer to a healthy member: a machine at ten times its load, and no more
SERVER = """
import resource, sys
if sys.argv[3] == "asyncio":
    sys.modules["uvloop"] = None
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
from everstep.cli import main
sys.argv[1:] = ["lighthouse", "--port", sys.argv[2]]
main()
"""
HOARDER = """
import os, resource, sys
if sys.argv[1] == "asyncio":
    sys.modules["uvloop"] = None
resource.setrlimit(resource.RLIMIT_NOFILE, (400, 400))
from everstep.config import LighthouseSettings
from everstep.lighthouse.app import Lighthouse
from everstep.logs import configure_logging
configure_logging()
with Lighthouse.in_thread(LighthouseSettings(port=0)) as lighthouse:
    print("at", lighthouse.url)
    sys.stdin.readline()
    hoard = []
    try:
        while True:
            hoard.append(os.dup(0))
    except OSError:
        print("hoarded")
    sys.stdin.readline()
    for fd in hoard:
        os.close(fd)
    print("released")
    sys.stdin.readline()
"""
LOOPS = ["asyncio", "uvloop"]


@pytest.fixture(autouse=True)
def _many_descriptors() -> Iterator[None]:
    """These tests hold both ends of many connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 8192)), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def member_beside(url: str) -> Iterator[socket.socket]:
    """A link that must be there at the end, and was answered all the time."""
    with linked(url, "healthy") as sock:
        sock.sendall(framed(codec.encode(hello("a"))))
        round_trips(sock, 5)
        yield sock
        assert max(round_trips(sock, 20)) < LATENCY_MAX_S


def started(spawn: Spawner, limit: int, port: int, loop: str = "uvloop") -> tuple[Spawned, str]:
    process = spawn(["-c", SERVER, str(limit), str(port), loop], until_teardown=True)
    return process, "http://" + process.expect_line("listening on").rpartition(" ")[2]


# ---- descriptors


@pytest.mark.parametrize("loop", LOOPS)
def test_without_descriptors_members_are_served_newcomers_wait_and_the_log_says_it_once(
    spawn: Spawner, loop: str
) -> None:
    process, url = started(spawn, 150, 0, loop)
    with member_beside(url) as member, contextlib.ExitStack() as stack:
        crowd = [stack.enter_context(connection_to(url)) for _ in range(200)]
        wait_until(lambda: "no room for more connections" in process.stderr_path.read_text())
        before, began_at = cpu_s(process.pid), time.monotonic()
        assert max(round_trips(member, 300)) < LATENCY_MAX_S
        never = [is_cut(sock, 0.01) for sock in crowd[-50:]]  # half a second, in which it has nothing to do
        assert not any(never)
        busy = (cpu_s(process.pid) - before) / (time.monotonic() - began_at)
        assert busy < 0.6, f"it spins: {busy:.0%} of a core"
        with connection_to(url) as newcomer:
            newcomer.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
            for sock in crowd:
                sock.close()
            assert newcomer.recv(100).startswith(b"HTTP/1.0 200")
        with linked(url) as late:
            round_trips(late, 1)
    log = process.stderr_path.read_text()
    assert log.count("no room for more connections") == 1
    assert "Traceback" not in log


@pytest.mark.parametrize("loop", LOOPS)
def test_when_others_use_up_the_descriptors_of_its_process_it_waits_for_them(spawn: Spawner, loop: str) -> None:
    process = spawn(["-c", HOARDER, loop])
    url = process.expect_line("at ").removeprefix("at ")
    with member_beside(url) as member:
        process.send("hoard")
        process.expect_line("hoarded")
        with connection_to(url) as newcomer:
            newcomer.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
            before, began_at = cpu_s(process.pid), time.monotonic()
            assert not is_cut(newcomer, 0.5)
            assert max(round_trips(member, 100)) < LATENCY_MAX_S
            busy = (cpu_s(process.pid) - before) / (time.monotonic() - began_at)
            assert busy < 0.6, f"it spins: {busy:.0%} of a core"
            process.send("release")
            process.expect_line("released")
            newcomer.settimeout(DEADLINE_S)
            assert newcomer.recv(100).startswith(b"HTTP/1.0 200")
    process.send("end")
    assert process.wait() == 0
    log = process.stderr_path.read_text()
    assert log.count("no room for more connections") == 1
    assert "Traceback" not in log


# ---- everybody at once


@pytest.mark.parametrize(
    ("size", "within_s"), [(200, 8.0), pytest.param(1000, 20.0, marks=pytest.mark.soak)], ids=["200", "1000"]
)
def test_when_a_lighthouse_comes_back_all_its_members_are_welcome_again_in_time(
    spawn: Spawner, size: int, within_s: float
) -> None:
    process, url = started(spawn, 4000, 0)
    with Crowd(url, size) as crowd:
        wait_until(lambda: crowd.welcomed == size, DEADLINE_S, what="everybody is welcome")
        process.kill()
        process.wait()
        wait_until(lambda: crowd.closed == size, DEADLINE_S, what="everybody has noticed")
        crowd.opened_at.clear()
        process, _ = started(spawn, 4000, int(url.rpartition(":")[2]))
        wait_until(lambda: crowd.welcomed == 2 * size, within_s, what=f"all {size} are back")
        assert not crowd.failures
        spread = max(crowd.opened_at) - min(crowd.opened_at)
        assert spread > 0.02, "they came in lockstep"
    assert "Traceback" not in process.stderr_path.read_text()


def test_members_that_lost_their_links_together_do_not_come_back_in_lockstep() -> None:
    """Each waits at random, longer from one attempt to the next: their late attempts lie apart."""
    with socket.create_server(("127.0.0.1", 0), backlog=256) as closed_at_once:
        closed_at_once.settimeout(DEADLINE_S)
        url = f"http://127.0.0.1:{closed_at_once.getsockname()[1]}"
        instants: list[float] = []
        with Crowd(url, 40):
            for _ in range(40 * 2 * 5):  # five attempts, for each of which aiohttp connects twice
                closed_at_once.accept()[0].close()
                instants.append(time.monotonic())
    late = instants[-120:]
    assert late[-1] - late[0] > 0.08
    # Of a lockstep the two gaps between its beats would be all the time there is. A busy machine may make one, too.
    gaps = sorted(b - a for a, b in itertools.pairwise(late))
    assert sum(gaps[-2:]) < 0.8 * (late[-1] - late[0])


# ---- connections that come to nothing


def test_a_connection_without_a_request_half_a_one_or_an_answer_not_taken_is_cut_after_a_deadline() -> None:
    async def page(_: web.Request) -> web.Response:
        return web.Response(body=b"x" * (8 << 20))

    async def test() -> None:
        app = web.Application(middlewares=[look_after])
        app.router.add_get("/page", page)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        listener = socket.create_server(("127.0.0.1", 0))
        listener.setblocking(False)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        door = Door(runner, listener, None, request_s=0.2)
        door.open()
        said = (b"", b"GET /page HT", b"GET /page HTTP/1.1\r\nHost: a\r\n\r\n", b"POST /page HTTP/1.1\r\nHost: a\r\n")
        with contextlib.ExitStack() as stack:
            for data in said:
                sock = stack.enter_context(connection_to(url, receive_bytes=4096))
                sock.sendall(data)
            deadline = time.monotonic() + DEADLINE_S
            while not door.connections:
                await asyncio.wait_for(asyncio.sleep(0), 1)
            while door.connections and time.monotonic() < deadline:
                await asyncio.wait_for(asyncio.sleep(0), 1)
            assert not door.connections
        door.close()
        await runner.cleanup()

    asyncio.run(test())


def test_half_a_handshake_and_a_link_without_hello_are_cut_after_a_deadline() -> None:
    half = framed(b"x" * 60)[:20]
    with serving(handshake_s=0.2) as server, Party(server.url) as party:
        party.events.expect("open")
        party.client.send(hello("a"))
        for data in (UPGRADE, UPGRADE + half):
            with connection_to(server.url) as stranger:
                stranger.sendall(data)
                assert is_cut(stranger, DEADLINE_S)
        with linked(server.url, "silent") as silent:
            assert is_cut(silent, DEADLINE_S)
            server.events.expect("closed", lambda seen: "not a word" in seen.value)
        party.client.send(beat(1))
        server.events.expect("message", lambda seen: seen.value == beat(1))


def test_silent_handshakes_are_bounded_and_keep_no_member_out() -> None:
    with serving(handshake_s=10 * DEADLINE_S) as server, member_beside(server.url):
        with contextlib.ExitStack() as stack:
            silent = [stack.enter_context(connection_to(server.url)) for _ in range(HANDSHAKES_MAX + 50)]
            for sock in silent:
                sock.sendall(UPGRADE)
            wait_until(lambda: all(is_cut(sock) for sock in silent[:50]), DEADLINE_S, what="the oldest were cut")
            began_at = time.monotonic()
            with linked(server.url) as late:
                round_trips(late, 1)
            assert time.monotonic() - began_at < DEADLINE_S / 4


# ---- slow readers


def test_a_member_that_never_reads_is_cut_at_a_bounded_queue_and_the_others_notice_nothing(spawn: Spawner) -> None:
    process, url = started(spawn, 1000, 0)
    with member_beside(url) as member, linked(url, receive_bytes=4096) as slow:
        slow.sendall(framed(codec.encode(hello("a"))))
        usual = statistics.median(round_trips(member, 200))
        memory = resident_bytes(process.pid)
        ping = b"\x89\xfd" + b"\0\0\0\0" + b"p" * 125  # its answer is as long
        burst, sent, during = ping * 500, 0, []
        slow.settimeout(DEADLINE_S)
        with contextlib.suppress(ConnectionError):
            while sent < 64 << 20:
                slow.sendall(burst)
                sent += len(burst)
                during += round_trips(member, 1)
        assert sent < 32 << 20, "it was never cut"
        assert resident_bytes(process.pid) - memory < 8 * SEND_BYTES_MAX
        assert max(during) < LATENCY_MAX_S
        assert statistics.median(during) < usual + 0.05
        assert "it does not read" in process.stderr_path.read_text()


def resident_bytes(pid: int) -> int:
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
