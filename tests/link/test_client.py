"""The client's end: it connects, says why it cannot, comes back after every loss, and leaves nothing behind."""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from everstep.core.messages import Goodbye, ToMember, Waiting
from everstep.errors import LighthouseUnreachable
from everstep.link.client import QUEUE_MESSAGES_MAX
from tests.link.parties import Party, StuckParty, beat, serving
from tests.support import proc
from tests.support.processes import Spawner
from tests.support.waiting import wait_until

FORKING_CLIENT = """
import os, sys
from everstep.link.auth import Credentials
from everstep.link.client import LinkClient
from everstep.link.dial import LinkTarget

class Handler:
    def on_start(self, loop): pass
    def on_open(self): pass
    def on_message(self, message): pass
    def on_close(self, detail): pass
    def on_failed(self, error): print("failed", error)

client = LinkClient(LinkTarget(url=sys.argv[1], credentials=Credentials(job_id="job")), Handler())
client.start()
client.wait_open(10)
child = os.fork()
if child == 0:
    os.write(1, f"forked {os.getpid()}\\n".encode())
    sys.stdin.readline()
    os._exit(0)
os.waitpid(child, 0)
"""


@contextlib.contextmanager
def listening(backlog: int = 8) -> Iterator[tuple[socket.socket, str]]:
    with socket.create_server(("127.0.0.1", 0), backlog=backlog) as listener:
        yield listener, f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_nobody_at_the_address_is_said_with_address_and_remedy() -> None:
    with listening() as (listener, url):
        listener.close()
        with Party(url, connect_timeout_s=0.1) as party:
            error = party.events.expect("failed").value
            with pytest.raises(LighthouseUnreachable):
                party.client.wait_open(1.0)
    assert isinstance(error, LighthouseUnreachable)
    assert url in str(error)
    assert "refused" in str(error)
    assert "everstep lighthouse" in str(error)


def test_something_else_at_the_address_is_called_no_lighthouse() -> None:
    with serving() as server, Party(server.url + "/elsewhere", connect_timeout_s=0.1) as party:
        assert "no lighthouse (HTTP 404)" in str(party.events.expect("failed").value)


def test_a_listener_that_never_answers_does_not_hold_the_client_back_from_closing() -> None:
    with listening() as (_, url), Party(url) as party:
        assert not party.client.wait_open(0.05)
        began_at = time.monotonic()
        assert party.client.close()
        assert time.monotonic() - began_at < 1.0


def test_a_lighthouse_that_starts_later_is_found() -> None:
    with serving() as server:
        server.recorder.refusals.clear()
        with Party(server.url) as party:
            assert party.client.wait_open(10.0)


def test_a_lost_link_is_back_within_a_blink_and_carries_nothing_old() -> None:
    with serving() as server, Party(server.url) as party:
        link = server.events.expect("opened").link
        party.events.expect("open")
        server.close_link(link, "lost")
        closed = party.events.expect("close")
        assert party.client.send(beat(1)) == "the link is down"
        opened = party.events.expect("open")
        assert party.client.send(beat(2)) == ""
        assert opened.at - closed.at < 0.5
        server.events.expect("opened")
        assert server.events.expect("message").value == beat(2)


def test_a_goodbye_is_delivered_before_the_link_closes() -> None:
    with serving() as server:
        with Party(server.url) as party:
            party.events.expect("open")
            for step in range(50):
                party.client.send(beat(step))
            assert party.client.close(Goodbye("done"))
        assert [server.events.expect("message").value for _ in range(50)] == list(map(beat, range(50)))
        assert server.events.expect("message").value == Goodbye("done")
        server.events.expect("closed")


def test_a_handlers_bug_ends_the_link_and_is_handed_on() -> None:
    class Buggy(Party):
        def on_message(self, message: ToMember) -> None:
            raise AssertionError("a bug")

    with serving() as server, Buggy(server.url) as party:
        server.send(Waiting("x"), server.events.expect("opened").link)
        error = party.events.expect("failed").value
        assert isinstance(error, AssertionError)
        server.events.expect("closed")


def test_a_client_whose_queue_is_full_gives_the_link_up_and_comes_back() -> None:
    with serving() as server, StuckParty(server.url) as party:
        server.send(Waiting("stop"), server.events.expect("opened").link)
        party.events.expect("open")
        party.events.expect("message")
        reasons = [party.client.send(beat(step)) for step in range(QUEUE_MESSAGES_MAX + 2)]
        party.go_on.set()
        assert set(reasons[:QUEUE_MESSAGES_MAX]) == {""}
        assert "wait already" in reasons[-2]
        assert reasons[-1] == "the link is down"
        party.events.expect("close")
        party.events.expect("open")


def test_threads_may_send_at_the_same_time() -> None:
    with serving() as server, Party(server.url) as party:
        party.events.expect("open")

        def send(first: int) -> None:
            for step in range(first, first + 100):
                assert party.client.send(beat(step)) == ""

        threads = [threading.Thread(target=send, args=(first,)) for first in (0, 1000, 2000)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        steps = [server.events.expect("message").value.step for _ in range(300)]
    assert sorted(steps) == [*range(100), *range(1000, 1100), *range(2000, 2100)]
    for first in (0, 1000, 2000):
        own = [step for step in steps if first <= step < first + 1000]
        assert own == sorted(own)


def test_a_forked_child_does_not_keep_its_dead_parents_link_open(spawn: Spawner) -> None:
    with serving() as server:
        parent = spawn(["-c", FORKING_CLIENT, server.url])
        child = int(parent.expect_line("forked").split()[1])
        link = server.events.expect("opened").link
        parent.kill(signal.SIGKILL)
        closed = server.events.expect("closed")
        assert closed.link == link
        os.kill(child, 0)  # the child still lives
        os.kill(child, signal.SIGKILL)
        parent.wait()
        wait_until(lambda: not proc.of_session(parent.pid), what="the child has ended")


def test_nothing_is_left_of_a_closed_client() -> None:
    with serving() as server:
        before = len(os.listdir("/proc/self/fd"))
        with Party(server.url) as party:
            party.events.expect("open")
        server.events.expect("closed")
        assert not any(thread.name == "everstep-link" for thread in threading.enumerate())
        wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before, what="its descriptors are closed")
