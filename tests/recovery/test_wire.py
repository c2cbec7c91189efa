"""What a socket is set to, by where its other end is, and how long it is waited for."""

import math
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from everstep.recovery.wire import Wire

STALL_S = 0.5
CONGESTION_CONTROLS = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control")


@contextmanager
def connected(from_host: str) -> Iterator[tuple[socket.socket, dict[str, object]]]:
    """A socket whose other end is 127.0.0.1, and what the system had it set to when it was made."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname(), source_address=(from_host, 0)) as near,
    ):
        far, _ = listener.accept()
        with far:
            as_made = settings_of(near)
            Wire(near, 1.0).open()
            yield near, as_made


def settings_of(sock: socket.socket) -> dict[str, object]:
    name = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0").decode()
    return {"congestion": name, "send_bytes": sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)}


def test_to_the_same_host_a_socket_holds_what_fits_the_cache_and_does_not_pace_it() -> None:
    with connected("127.0.0.1") as (near, _):
        assert Wire(near, 1.0).is_local
        found = settings_of(near)
        # The kernel doubles it, for its own records; some systems allow less.
        assert 256 << 10 < int(str(found["send_bytes"])) <= 1 << 20
        allowed = CONGESTION_CONTROLS.read_text().split() if CONGESTION_CONTROLS.exists() else []
        assert found["congestion"] == "reno" or "reno" not in allowed


def test_to_another_address_a_socket_stays_as_the_system_has_it() -> None:
    with connected("127.0.0.2") as (near, as_made):
        assert not Wire(near, 1.0).is_local
        assert settings_of(near) == as_made


@contextmanager
def hearing() -> Iterator[tuple[Wire, socket.socket]]:
    """A wire, and the socket at its other end."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as near:
        far, _ = listener.accept()
        with far:
            wire = Wire(near, STALL_S)
            wire.open()
            yield wire, far


def test_silence_counts_from_the_last_byte_also_in_the_middle_of_a_block() -> None:
    with hearing() as (wire, far):
        far.sendall(b"some")
        began_at = time.monotonic()
        with pytest.raises(TimeoutError):
            wire.receive_into([memoryview(bytearray(100))], math.inf)
        assert time.monotonic() - began_at < 1.9 * STALL_S


def test_who_sends_slowly_is_waited_for() -> None:
    with hearing() as (wire, far):
        received = bytearray(12)

        def send() -> None:
            never = threading.Event()
            for value in range(len(received)):
                far.sendall(bytes([value]))
                never.wait(STALL_S / 4)

        sender = threading.Thread(target=send)
        sender.start()
        wire.receive_into([memoryview(received)], math.inf)
        sender.join()
        assert received == bytes(range(12))


def test_a_connection_of_which_nothing_is_wanted_may_be_silent() -> None:
    with hearing() as (wire, far):
        speaker = threading.Timer(1.5 * STALL_S, far.sendall, [b"GET /\r\n\r\n"])
        speaker.start()
        assert wire.read_head(time.monotonic() + 20.0, is_idle=True) == b"GET /"
        speaker.join()
