"""Several donors at once: all serve, and the state is one donor's, whole, whatever becomes of the others."""

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import msgspec
import pytest
import torch

from everstep.errors import RecoveryFailed, RemoteProtocolError, StateMismatch, StepInterrupted
from everstep.recovery import Fetch, InPlace, Limits, RecoveryServer, Snapshot
from everstep.recovery.dtypes import DTYPES
from everstep.recovery.manifest import decode
from everstep.recovery.readers import Readers
from everstep.recovery.same_host import PeerMemory, Readable
from tests.recovery.trees import assert_same, raw_tensor
from tests.recovery.wires import AUTH, DEADLINE_S, KEY, Proxy, Running, flipping, request_to, serving, state_of
from tests.support.waiting import wait_until

CHUNK_BYTES = 1 << 16
MIB = 8.0


@contextlib.contextmanager
def donors(*states: dict[str, Any], auth: Any = None) -> Iterator[list[tuple[RecoveryServer, str]]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(serving(Snapshot.lend(state, CHUNK_BYTES), auth)) for state in states]


def fetch_from(urls: list[str], **fields: Any) -> Fetch:
    return Fetch(request_to(urls[0], other_urls=tuple(urls[1:]), **fields))


@contextlib.contextmanager
def together(urls: list[str], **fields: Any) -> Iterator[list[str]]:
    """Sources of the same, of which none gets far with its chunks before all send some."""
    sends: set[str] = set()

    def hold(url: str, offset: int, data: bytes) -> bytes:
        if offset + len(data) > CHUNK_BYTES // 2:
            sends.add(url)
            wait_until(lambda: len(sends) == len(urls), DEADLINE_S)
        return data

    with contextlib.ExitStack() as stack:
        proxies = [Proxy(url, partial(hold, url), **fields) for url in urls]
        yield [stack.enter_context(proxy).url for proxy in proxies]


@pytest.mark.parametrize("auth", [None, AUTH], ids=["open", "token"])
def test_all_donors_serve_stripes_of_one_state(auth: Any) -> None:
    state = state_of(MIB)
    with donors(state, state, state, auth=auth) as offered, together([url for _, url in offered]) as urls:
        fetch = fetch_from(urls, auth=auth)
        assert_same(fetch.run(), state)
    assert len(fetch.report.bytes_from) == 3
    assert sum(fetch.report.bytes_from.values()) == MIB * (1 << 20)
    assert not fetch.report.differing


def test_a_connection_for_digests_that_breaks_is_made_again(caplog: pytest.LogCaptureFixture) -> None:
    state = state_of(MIB)
    with donors(state, state) as offered, contextlib.ExitStack() as stack:
        proxies = [
            stack.enter_context(Proxy(url, lambda _offset, data: data, cut_at=b"/digests/")) for _, url in offered
        ]
        fetch = fetch_from([proxy.url for proxy in proxies])
        assert_same(fetch.run(), state)
        assert [proxy.has_cut for proxy in proxies].count(True) == 1  # of the one that became the primary
    assert "it has to send all itself" not in caplog.text
    assert not fetch.report.lost


def test_where_donors_differ_the_state_is_wholly_that_of_one() -> None:
    states = []
    for number in range(3):
        own = {"rng": torch.full((5000,), number), "name": number, "model": state_of(MIB)["model"]}
        states.append(own)
    with donors(*states) as offered:
        fetch = fetch_from([url for _, url in offered])
        there: Any = fetch.run()
    assert_same(there, states[there["name"]])


def test_a_donor_of_another_layout_is_not_used() -> None:
    state, other = state_of(MIB), {"model": {"w": torch.ones(3)}, "step": 7, "lr": 0.125}
    with donors(state) as ((_, first),), donors(other) as ((late, second),):
        late.withdraw(KEY)

        def offer_late(done: int, _total: int) -> None:
            if done == CHUNK_BYTES:
                late.offer(KEY, Snapshot.take(other))

        fetch = Fetch(request_to(first, other_urls=(second,), expected=state), offer_late)
        assert_same(fetch.run(), state)
    assert list(fetch.report.bytes_from) == [first]


def test_a_donor_that_is_lost_in_the_middle_is_replaced_by_the_others() -> None:
    state = state_of(MIB)
    with donors(state, state, state) as offered:
        urls, dead = [url for _, url in offered], threading.Event()

        def kill(done: int, total: int) -> None:
            if done >= total / 2 and not dead.is_set():
                dead.set()
                offered[0][0].withdraw(KEY)

        request = request_to(urls[0], other_urls=tuple(urls[1:]))
        fetch = Fetch(request, kill)
        assert_same(fetch.run(), state)
    assert dead.is_set()


def test_the_last_donor_that_is_left_sends_the_rest() -> None:
    state = state_of(MIB)
    with donors(state, state, state) as offered:
        gone: list[int] = []

        def kill(done: int, total: int) -> None:
            for number, share in enumerate((0.2, 0.5)):
                if done >= total * share and number not in gone:
                    gone.append(number)
                    offered[number][0].withdraw(KEY)

        fetch = Fetch(request_to(offered[0][1], other_urls=(offered[1][1], offered[2][1])), kill)
        assert_same(fetch.run(), state)
    assert gone == [0, 1]


def test_when_all_donors_are_lost_it_fails() -> None:
    state = state_of(MIB)
    with donors(state, state) as offered:

        def kill(done: int, total: int) -> None:
            if done >= total / 2:
                for server, _ in offered:
                    server.withdraw(KEY)

        with pytest.raises(RecoveryFailed):
            Fetch(request_to(offered[0][1], other_urls=(offered[1][1],)), kill).run()


def test_a_donor_that_stands_still_is_robbed_of_its_work() -> None:
    state = state_of(MIB)
    with donors(state, state) as offered:
        slow_url, quick_url = offered[0][1], offered[1][1]
        held = threading.Event()

        def hold(offset: int, data: bytes) -> bytes:
            if offset > 3 * CHUNK_BYTES:
                held.set()
                return b""
            return data

        with Proxy(slow_url, hold) as proxy:
            began_at = time.monotonic()
            fetch = fetch_from([quick_url, proxy.url], stall_timeout_s=9.0)
            assert_same(fetch.run(), state)
            assert time.monotonic() - began_at < 5.0


def test_a_connection_that_breaks_again_and_again_is_resumed() -> None:
    state = state_of(4)
    with donors(state) as ((_, url),):
        with Proxy(url, lambda offset, data: data if offset < 1 << 20 else None) as proxy:
            fetch = fetch_from([proxy.url])
            assert_same(fetch.run(), state)
    assert fetch.report.retries >= 3


def test_a_flipped_bit_is_fetched_again_and_never_loaded() -> None:
    state = state_of(MIB)
    with donors(state, state) as offered, Proxy(offered[0][1], flipping(1 << 17)) as proxy:
        fetch = fetch_from([proxy.url, offered[1][1]])
        assert_same(fetch.run(), state)


def test_a_bit_flipped_on_the_way_from_a_donor_that_sends_no_digests_is_counted_all_the_same() -> None:
    state, sends = state_of(MIB), threading.Event()
    with donors(state) as ((_, url),), RecoveryServer() as other:
        other_url = other.start("127.0.0.1", "127.0.0.1")

        def hold(offset: int, data: bytes) -> bytes:
            """The primary waits until the other one sends, too."""
            if offset > 2 * CHUNK_BYTES and not sends.is_set():
                other.offer(KEY, Snapshot.lend(state, CHUNK_BYTES))
                assert sends.wait(DEADLINE_S)
            return data

        def flip(offset: int, data: bytes) -> bytes | None:
            is_bare = any(b"Everstep-Digests: no" in asked for asked in damaging.asked)
            if not is_bare or sends.is_set() or len(data) < 1024:
                return data
            sends.set()
            return flipping(offset + len(data) - 1)(offset, data)

        with Proxy(url, hold) as holding, Proxy(other_url, flip) as damaging:
            fetch = fetch_from([holding.url, damaging.url])
            assert_same(fetch.run(), state)
    assert sends.is_set()
    assert (fetch.report.digest_errors, fetch.report.differing) == (1, 0)


def test_a_donor_of_a_version_that_always_sends_digests_serves_beside_others() -> None:
    state = state_of(MIB)
    with donors(state, state) as offered:
        with together([url for _, url in offered], without=b"Everstep-Digests: no\r\n") as urls:
            fetch = fetch_from(urls)
            assert_same(fetch.run(), state)
    assert len(fetch.report.bytes_from) == 2
    assert not fetch.report.lost


def test_a_state_that_does_not_fit_is_refused_whoever_offers_it() -> None:
    with donors(state_of(1), state_of(1)) as offered, pytest.raises(StateMismatch):
        fetch_from([url for _, url in offered], expected={"model": {"w": torch.ones(5)}, "step": 1, "lr": 1.0}).run()


def test_what_nobody_expects_on_a_thread_of_the_fetch_is_raised_where_it_is_waited_for() -> None:
    def stumble(*_: int) -> None:
        raise ZeroDivisionError

    with donors(state_of()) as [(_, url)], pytest.raises(ZeroDivisionError):
        Fetch(request_to(url), stumble).run()


def test_an_abort_ends_all_of_it() -> None:
    before = {thread.name for thread in threading.enumerate()}
    with donors({}, {}) as offered:
        for server, _ in offered:
            server.withdraw(KEY)
        with Running(fetch_from([url for _, url in offered])) as running:
            wait_until(lambda: len(running.fetch.list_fds()) == 2, 10.0)
            running.fetch.abort()
            running.wait()
            assert isinstance(running.error, StepInterrupted)
    assert {thread.name for thread in threading.enumerate()} == before


# ---- on one host


def test_on_one_host_the_donors_memory_is_read_and_http_is_there_for_who_may_not() -> None:
    state = state_of(MIB) | {"many": {str(i): torch.full((3,), i) for i in range(3000)}}
    transports = []
    with serving(Snapshot.lend(state, CHUNK_BYTES), AUTH) as (_, url), Proxy(url, lambda _, data: data) as proxy:
        for may_read_memory in (True, False):
            fetch = Fetch(request_to(proxy.url, auth=AUTH, may_read_memory=may_read_memory))
            assert_same(fetch.run(), state)
            transports.append((fetch.report.transport, proxy.passed > MIB * (1 << 20)))
    if not transports[0][0]:
        pytest.skip("this system does not let a process read another one's memory")
    assert transports == [({proxy.url: "memory"}, False), ({}, True)]


def test_a_process_of_the_same_number_elsewhere_is_not_read() -> None:
    state = state_of(1)
    snapshot = Snapshot.lend(state, CHUNK_BYTES)
    manifest = decode(snapshot.manifest_bytes, Limits())
    shown = msgspec.msgpack.decode(Readable().show(snapshot.addresses, os.getpid()))
    for damaged in ([*shown[:2], b"another process.", shown[3]], [1 << 22, *shown[1:]]):
        with pytest.raises(PermissionError):
            PeerMemory(msgspec.msgpack.encode(damaged), manifest).probe()
    for lie in (b"", b"\xc1", msgspec.msgpack.encode([*shown[:3], []]), msgspec.msgpack.encode([-1, *shown[1:]])):
        with pytest.raises(RemoteProtocolError):
            PeerMemory(lie, manifest)


def test_memory_that_cannot_be_read_is_an_error_where_its_chunk_is_waited_for() -> None:
    state = state_of(1)
    snapshot = Snapshot.lend(state, CHUNK_BYTES)
    manifest = decode(snapshot.manifest_bytes, Limits())
    (address, size), half = snapshot.addresses[0], 1 << 19
    shown = Readable().show([(address, half), (1 << 12, size - half)], os.getpid())
    places = [[memoryview(bytearray(CHUNK_BYTES))] for _ in range(manifest.chunk_count)]
    with Readers(PeerMemory(shown, manifest), manifest, places.__getitem__) as readers:
        readers.start(range(manifest.chunk_count), count=3)
        for chunk in range(half // CHUNK_BYTES):
            assert readers.digest_of(chunk) == snapshot.digest(chunk)
        with pytest.raises(PermissionError):
            readers.digest_of(half // CHUNK_BYTES)
    assert not [thread for thread in threading.enumerate() if thread.name == "everstep-fetch-memory"]


# ---- lent, and in place


def test_what_is_lent_is_not_copied() -> None:
    state = state_of(1)
    snapshot = Snapshot.lend(state)
    assert snapshot.addresses == [(state["model"]["w"].data_ptr(), 1 << 20)]


def test_no_chunk_that_was_read_after_the_loan_ended_is_ever_believed() -> None:
    """The owner goes on at any moment; who was reading has all of the old state, or an error."""
    for changed_at in range(0, 64, 7):
        state = state_of(4)
        with serving(Snapshot.lend(state, CHUNK_BYTES)) as (server, url):

            def go_on(done: int, _total: int) -> None:
                if done >= changed_at * CHUNK_BYTES:  # noqa: B023
                    server.withdraw(KEY)
                    state["model"]["w"].fill_(-1)  # noqa: B023

            fetch = Fetch(request_to(url, retry_after_s=()), go_on)
            try:
                there: Any = fetch.run()
            except RecoveryFailed:
                continue
            assert_same(there["model"]["w"], state_of(4)["model"]["w"])


def test_it_lands_in_the_members_own_tensors_and_loading_copies_nothing() -> None:
    theirs, mine = torch.nn.Linear(300, 200), torch.nn.Linear(300, 200)
    tied = {"a": mine.weight, "b": mine.weight}
    own: dict[str, Any] = {"model": mine.state_dict(), "tied": tied, "extra": torch.zeros(10, 10)[:, 1]}
    state = {
        "model": theirs.state_dict(),
        "tied": {"a": theirs.weight, "b": theirs.weight},
        "extra": torch.ones(10, 10)[:, 1],
        "optimizer": torch.arange(1000),
    }
    with serving(Snapshot.lend(state, CHUNK_BYTES)) as (_, url):
        there: Any = Fetch(request_to(url), landing=InPlace(own)).run()
    assert_same(there["extra"], torch.ones(10))
    assert torch.equal(mine.weight, theirs.weight)
    assert torch.equal(mine.bias, theirs.bias)
    assert there["model"]["weight"].data_ptr() == mine.weight.data_ptr()
    mine.load_state_dict(there["model"])
    assert torch.equal(mine.weight, theirs.weight)
    assert not own["extra"].any(), "a tensor with gaps is copied by who loads it"


def test_a_view_into_a_larger_storage_is_landed_in_at_its_place() -> None:
    flat = torch.zeros(100, dtype=torch.float64)
    own = {"a": flat[7:20], "b": flat[30:60].view(5, 6)}
    state = {"a": torch.rand(13, dtype=torch.float64), "b": torch.rand(5, 6, dtype=torch.float64)}
    with serving(Snapshot.lend(state, CHUNK_BYTES)) as (_, url):
        assert_same(Fetch(request_to(url), landing=InPlace(own)).run(), state)
    assert torch.equal(flat[7:20], state["a"])
    assert torch.equal(flat[30:60].view(5, 6), state["b"])
    assert not flat[:7].any()
    assert not flat[20:30].any()


def test_every_dtype_lands_in_the_members_own_tensors() -> None:
    own: dict[str, Any] = {name: raw_tensor(dtype, (5, 7), 1) for name, dtype in sorted(DTYPES.items())}
    own |= {"empty": torch.ones(0, 3), "column": torch.zeros(4, 4)[:, 1], "transposed": torch.zeros(3, 5).T}
    state = {name: raw_tensor(tensor.dtype, tuple(tensor.shape), 2) for name, tensor in own.items()}
    state["transposed"] = raw_tensor(torch.float32, (3, 5), 2).T
    with serving(Snapshot.lend(state, CHUNK_BYTES)) as (_, url):
        there: Any = Fetch(request_to(url, expected=own), landing=InPlace(own)).run()
    assert_same(there, state)
    for name in DTYPES:
        assert_same(own[name], state[name])
