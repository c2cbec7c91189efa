"""What can be told of connections that other code reads."""

import contextlib
import os
import socket
import threading
from collections.abc import Iterator

from everstep.collectives.sockets import (
    OpenSocket,
    find_lasting,
    has_peer_gone,
    is_emptied,
    is_open,
    open_sockets,
    sever,
)
from tests.support.waiting import wait_until


@contextlib.contextmanager
def connection() -> Iterator[tuple[socket.socket, socket.socket, OpenSocket]]:
    """Both ends of one, and the first as whoever does not own it knows it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        here = socket.create_connection(listener.getsockname())
        there, _ = listener.accept()
    with here, there:
        yield here, there, OpenSocket(here.fileno(), os.fstat(here.fileno()).st_ino)


def test_a_peer_that_has_closed_is_seen_although_nobody_has_read_what_it_sent() -> None:
    with connection() as (_, there, known):
        there.sendall(b"x" * 1000)
        assert not has_peer_gone(known)
        there.close()
        wait_until(lambda: has_peer_gone(known), what="the end is known")
        assert is_open(known)


def test_a_reset_is_seen() -> None:
    with connection() as (here, there, known):
        here.sendall(b"unread")
        there.close()
        wait_until(lambda: has_peer_gone(known), what="the reset is known")


def test_a_severed_connection_is_emptied_of_all_that_had_come() -> None:
    with connection() as (here, there, known):
        there.sendall(b"x" * 100_000)
        for kept in sever([known]):
            kept.close()
        wait_until(lambda: is_emptied(known), what="it is at its end")
        assert here.recv(1) == b""


def test_one_that_is_gone_or_reset_is_empty() -> None:
    with connection() as (here, there, known):
        here.sendall(b"unread")
        there.close()
        wait_until(lambda: has_peer_gone(known), what="the reset is known")
        assert is_emptied(known)
    assert is_emptied(known)
    assert has_peer_gone(known)


def test_a_duplicate_through_which_somebody_looks_is_not_taken_for_a_connection() -> None:
    before = open_sockets()
    with connection() as (here, _, known):
        looking = os.dup(here.fileno())
        done = threading.Timer(0.02, os.close, (looking,))
        done.start()
        found = find_lasting(lambda ends: ends.local == here.getsockname(), open_sockets() - before)
        done.join()
    assert found == [known]
