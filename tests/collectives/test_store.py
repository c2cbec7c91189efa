"""Members meet at a hosted store; and the one private hook of torch's autograd."""

import socket
import struct
import threading
from collections.abc import Iterator

import pytest
import torch

from everstep.collectives.sockets import Ends, ends_of, find_sockets, host_and_port, joined
from everstep.collectives.store import ENDED_KEPT, HostedStore, host_store
from everstep.collectives.store_client import StoreClient, connect_store
from everstep.collectives.torch_private import queue_backward_callback
from everstep.errors import PeerLost, StepInterrupted

DEADLINE_S = 10.0


@pytest.fixture
def hosted() -> Iterator[HostedStore]:
    with host_store() as store:
        yield store


def client_of(store: HostedStore) -> StoreClient:
    return connect_store(host_and_port(store.address), lambda: False)


class Gathering(threading.Thread):
    """A member that meets on a thread of its own; `result` or `error` says how it ended."""

    def __init__(self, client: StoreClient, key: str, rank: int, size: int, value: bytes) -> None:
        super().__init__()
        self.result: list[bytes] | None = None
        self.error: StepInterrupted | None = None
        self._client = client
        self._brought = (key, rank, size, value, DEADLINE_S)
        self.start()

    def run(self) -> None:
        try:
            self.result = self._client.gather(*self._brought)
        except StepInterrupted as error:
            self.error = error

    def end(self) -> "Gathering":
        self.join(DEADLINE_S)
        assert not self.is_alive()
        return self


def test_a_hosted_store_listens_on_the_given_address_only_and_not_after_close() -> None:
    with host_store("127.0.0.1") as hosted:
        port = host_and_port(hosted.address)[1]
        assert [e.local for e in listeners(port)] == [("127.0.0.1", port)]
    assert not listeners(port)
    hosted.close()


def listeners(port: int) -> list[Ends]:
    found = [ends_of(sock) for sock in find_sockets(lambda ends: ends.is_listening and ends.local[1] == port)]
    return [ends for ends in found if ends is not None]


def test_everybody_gets_what_everybody_brought_in_rank_order_and_keys_are_apart(hosted: HostedStore) -> None:
    clients = [client_of(hosted) for _ in range(5)]
    large = bytes(200_000)
    first = [Gathering(c, "a", rank, 3, b"%d" % rank + large) for rank, c in enumerate(clients[:3])]
    second = [Gathering(c, "b", 1 - rank, 2, b"%d" % rank) for rank, c in enumerate(clients[3:])]
    assert [g.end().result for g in first] == [[b"0" + large, b"1" + large, b"2" + large]] * 3
    assert [g.end().result for g in second] == [[b"1", b"0"]] * 2
    again = [Gathering(c, "c", rank, 3, b"") for rank, c in enumerate(clients[:3])]
    assert [g.end().result for g in again] == [[b"", b"", b""]] * 3
    for client in clients:
        client.close()


def test_a_member_that_leaves_before_all_have_come_is_named_to_the_others_early_and_late(hosted: HostedStore) -> None:
    waiting, leaving, late = (client_of(hosted) for _ in range(3))
    first = Gathering(waiting, "k", 0, 3, b"")
    second = Gathering(leaving, "k", 1, 3, b"")
    assert waiting.fileno() >= 0
    poll_missing(hosted, "k", [2])
    leaving.sever()
    for ended in (first.end(), Gathering(late, "k", 2, 3, b"").end()):
        assert isinstance(ended.error, PeerLost)
        assert ended.error.peer == 1
    second.end()
    for client in (waiting, leaving, late):
        client.close()


def poll_missing(store: HostedStore, key: str, expected: list[int]) -> None:
    """Until exactly these have not come."""
    asking = client_of(store)
    try:
        for _ in range(10_000):
            if asking._ask_missing(key) == expected:
                return
        raise AssertionError(f"never were exactly {expected} missing")
    finally:
        asking.close()


def test_a_wait_for_members_that_do_not_come_names_them(hosted: HostedStore) -> None:
    client = client_of(hosted)
    with pytest.raises(PeerLost, match=r"ranks \[0, 2\] did not come within 0.05 s") as lost:
        client.gather("k", 1, 3, b"", 0.05)
    assert lost.value.peer == 0
    client.close()


def test_a_wait_ends_at_once_when_severed_or_when_the_store_ends() -> None:
    store = host_store()
    severed, left_alone = client_of(store), client_of(store)
    first = Gathering(severed, "k", 0, 3, b"")
    second = Gathering(left_alone, "l", 0, 3, b"")
    poll_missing(store, "k", [1, 2])
    poll_missing(store, "l", [1, 2])
    severed.sever()
    assert isinstance(first.end().error, PeerLost)
    store.close()
    assert isinstance(second.end().error, PeerLost)
    for client in (severed, left_alone):
        client.close()
        client.sever()


@pytest.mark.parametrize(
    "illegal", [b"\xff\xff\xff\xff", struct.pack(">I", 3) + b"abc", struct.pack(">I", 1) + b"\xc0"], ids=repr
)
def test_who_sends_something_illegal_is_dropped_and_the_others_are_served(hosted: HostedStore, illegal: bytes) -> None:
    with socket.create_connection(host_and_port(hosted.address), timeout=DEADLINE_S) as sock:
        sock.sendall(illegal)
        assert sock.recv(1) == b""
    client = client_of(hosted)
    assert client.gather("k", 0, 1, b"x", DEADLINE_S) == [b"x"]
    client.close()


@pytest.mark.parametrize(("rank", "size"), [(0, 2), (1, 3), (3, 3), (-1, 3), (0, 5000)])
def test_a_rank_or_size_that_does_not_fit_is_dropped(hosted: HostedStore, rank: int, size: int) -> None:
    good, bad = client_of(hosted), client_of(hosted)
    waiting = Gathering(good, "k", 1, 3, b"")
    poll_missing(hosted, "k", [0, 2])
    assert isinstance(Gathering(bad, "k", rank, size, b"").end().error, PeerLost)
    others = [Gathering(client_of(hosted), "k", rank, 3, b"") for rank in (0, 2)]
    assert [g.end().result for g in (waiting, *others)] == [[b"", b"", b""]] * 3
    good.close()
    bad.close()


def test_what_is_remembered_of_broken_meetings_is_bounded(hosted: HostedStore) -> None:
    for n in range(ENDED_KEPT + 50):
        client = client_of(hosted)
        with pytest.raises(PeerLost):
            client.gather(f"k{n}", 0, 2, b"", 0.0)
        client.close()
    client = client_of(hosted)
    assert client.gather("new", 0, 1, b"", DEADLINE_S) == [b""]
    client.close()


def test_connecting_to_an_address_that_swallows_everything_ends_when_severed() -> None:
    full = socket.create_server(("127.0.0.1", 0), backlog=0)
    fillers = [socket.socket() for _ in range(3)]
    try:
        for filler in fillers:  # the backlog is full: further connections stay unanswered
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        asked: list[None] = []

        def is_severed() -> bool:
            asked.append(None)
            return len(asked) > 3

        with pytest.raises(StepInterrupted):
            connect_store(full.getsockname(), is_severed)
    finally:
        for sock in (full, *fillers):
            sock.close()


def test_an_unknown_host_is_named() -> None:
    with pytest.raises(PeerLost, match=r"no-such-host\.invalid"):
        connect_store(("no-such-host.invalid", 1), lambda: False)


def test_addresses_are_read_as_they_are_written() -> None:
    for address in (("127.0.0.1", 80), ("::1", 29520), ("node-7", 1)):
        assert host_and_port(joined(address)) == address
    for text in ("29520", ":1", "host:", "host:x"):
        with pytest.raises(ValueError):
            host_and_port(text)


def test_a_backward_callback_runs_once_after_all_gradients_and_its_error_comes_out_of_backward() -> None:
    weight = torch.ones(2, requires_grad=True)
    other = torch.ones(2, requires_grad=True)
    seen: list[bool] = []

    def queue(gradient: torch.Tensor) -> None:
        queue_backward_callback(lambda: seen.append(weight.grad is not None and other.grad is not None))

    weight.register_hook(queue)  # type: ignore[no-untyped-call]
    (weight * other).sum().backward()  # type: ignore[no-untyped-call]
    assert seen == [True]

    def fail() -> None:
        raise StepInterrupted("no")

    weight.register_hook(lambda gradient: queue_backward_callback(fail))  # type: ignore[no-untyped-call]
    with pytest.raises(StepInterrupted):
        (weight * other).sum().backward()  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError):
        queue_backward_callback(fail)
