"""What a socket is set to, by where its other end is."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from everstep.recovery.wire import Wire

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
