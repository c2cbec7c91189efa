"""From a donor to joiners over real sockets: whole and verified, or not at all, and nobody waits for anybody else."""

import math
import os
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch

from everstep.errors import ConfigError, LocalProtocolError, RecoveryFailed, StateMismatch, StepInterrupted
from everstep.recovery import Fetch, FetchRequest, Landing, RecoveryServer, ServerOptions, Snapshot
from everstep.recovery.http import ChunksRequest
from tests.recovery.trees import assert_same
from tests.recovery.wires import AUTH, DEADLINE_S, KEY, Proxy, Running, fetched, request_to, serving, state_of
from tests.support.waiting import wait_until

SMALL_CHUNKS = 1 << 14
AT_ONCE_S = 0.25  # milliseconds on an idle machine; far below every timeout


@pytest.mark.parametrize("auth", [None, AUTH], ids=["open", "token"])
def test_a_state_arrives_whole(auth: Any) -> None:
    state, progress = state_of(1), []
    with serving(Snapshot.take(state, SMALL_CHUNKS), auth) as (_, url):
        request = request_to(url, auth=auth, expected=state)
        there = Fetch(request, lambda done, total: progress.append((done, total))).run()
    assert_same(there, state)
    assert progress[-1] == (1 << 20, 1 << 20)
    assert len(progress) == (1 << 20) / SMALL_CHUNKS


def test_a_state_without_payload_and_one_of_many_tiny_tensors_arrive() -> None:
    for state in ({"step": 3}, {"model": {str(i): torch.full((), i) for i in range(3000)}}):
        with serving(Snapshot.take(state)) as (_, url):
            assert_same(fetched(url), state)


def test_it_lands_in_prepared_memory() -> None:
    state, landing = state_of(), Landing()
    landing.prepare(state)
    size = state["model"]["w"].nbytes
    prepared = landing.take(size)
    landing.give_back(prepared)
    with serving(Snapshot.take(state)) as (_, url):
        there: Any = Fetch(request_to(url), landing=landing).run()
    assert there["model"]["w"].data_ptr() == prepared.data_ptr()


def test_it_arrives_over_ipv6_and_by_name() -> None:
    with RecoveryServer() as server:
        url = server.start("localhost", "localhost")
        server.offer(KEY, Snapshot.take(state_of()))
        assert_same(fetched(url), state_of())
    try:
        with RecoveryServer() as server:
            url = server.start("::1", "::1")
            server.offer(KEY, Snapshot.take(state_of()))
            assert_same(fetched(url), state_of())
    except ConfigError:
        pytest.skip("no IPv6 here")


def test_who_asks_before_the_offer_gets_it_as_soon_as_it_is_made() -> None:
    with serving() as (server, url), Running(Fetch(request_to(url))) as running:
        wait_until(partial(_connections, server), DEADLINE_S)
        offered_at = time.monotonic()
        server.offer(KEY, Snapshot.take(state_of()))
        running.wait()
    assert running.state is not None
    assert running.ended_at - offered_at < AT_ONCE_S


def test_a_key_that_is_never_offered_fails_at_the_deadline() -> None:
    with serving() as (server, url):
        server.offer("another", Snapshot.take(state_of()))
        began_at = time.monotonic()
        with pytest.raises(RecoveryFailed):
            fetched(url, 0.2)
        assert 0.2 <= time.monotonic() - began_at < 0.2 + AT_ONCE_S


def test_a_silent_source_fails_after_the_stall_timeout_and_a_deadline_that_has_passed_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(RecoveryFailed, match="nothing arrived in time"):
            Fetch(FetchRequest(source_url=url, key=KEY, deadline=math.inf, stall_timeout_s=0.1)).run()
        with pytest.raises(RecoveryFailed):
            fetched(url, -1.0)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1", "", "ftp://a:1", "http://127.0.0.1", "http://[::1", "http://a..b:80", "http://:80"]
)
def test_an_address_that_leads_nowhere_fails_for_now(url: str) -> None:
    with pytest.raises(RecoveryFailed):
        fetched(url)


def test_a_key_and_a_duration_must_make_sense() -> None:
    for key in ("", "k" * 513):
        with pytest.raises(LocalProtocolError):
            request_to("http://127.0.0.1:1", key=key)
    for timeout_s in (0.0, math.inf, math.nan):
        with pytest.raises(ConfigError):
            request_to("http://127.0.0.1:1", stall_timeout_s=timeout_s)
    with pytest.raises(ConfigError):
        FetchRequest(source_url="", key=KEY, deadline=math.nan)


def test_a_state_that_does_not_fit_is_refused_before_its_payload_moves() -> None:
    own = {"model": {"w": torch.ones(5)}, "step": 1, "lr": 1.0}
    size = state_of()["model"]["w"].nbytes
    with serving(Snapshot.take(state_of())) as (_, url), Proxy(url, lambda _, data: data) as proxy:
        with pytest.raises(StateMismatch, match=r"model\.w is .*\(5,\) here and .*\(1024, 64\) there"):
            fetched(proxy.url, expected=own)
    assert proxy.passed < size / 10


# ---- aborted, closed, withdrawn


@pytest.mark.parametrize("when", ["connecting", "waiting", "receiving"])
def test_an_aborted_fetch_ends_within_milliseconds(when: str) -> None:
    took: list[float] = []
    for _ in range(3):
        with _stuck(when) as (running, is_there):
            wait_until(is_there, DEADLINE_S, what=when)
            aborted_at = time.monotonic()
            running.fetch.abort()
            running.wait()
            assert isinstance(running.error, StepInterrupted)
            took.append(running.ended_at - aborted_at)
    assert min(took) < 0.02
    assert max(took) < AT_ONCE_S


class _stuck:  # noqa: N801 - used as a context manager, like a function
    """A fetch that hangs at the named point, and what is true once it does."""

    def __init__(self, when: str) -> None:
        self._when = when
        self._ends: list[Any] = []

    def __enter__(self) -> tuple[Running, Any]:
        if self._when == "connecting":
            listener = self._keep(socket.create_server(("127.0.0.1", 0), backlog=0))
            address = listener.getsockname()
            for _ in range(3):  # the queue of the listener is full: no answer to a SYN
                filler = self._keep(socket.socket())
                filler.setblocking(False)
                filler.connect_ex(address)
            running = Running(Fetch(request_to(f"http://127.0.0.1:{address[1]}")))
            is_there: Any = running.fetch.list_fds
        elif self._when == "waiting":
            server, url = self._keep(serving())
            running = Running(Fetch(request_to(url)))
            is_there = partial(_connections, server)
        else:
            _, url = self._keep(serving(Snapshot.take(state_of(32))))
            passed = threading.Event()
            proxy = self._keep(Proxy(url, partial(self._hold, passed)))
            running = Running(Fetch(request_to(proxy.url)))
            is_there = passed.is_set
        return self._keep(running), is_there

    def __exit__(self, *_: object) -> None:
        for end in reversed(self._ends):
            end.__exit__(None, None, None)

    def _keep(self, end: Any) -> Any:
        self._ends.append(end)
        return end.__enter__()

    @staticmethod
    def _hold(passed: threading.Event, offset: int, data: bytes) -> bytes:
        if offset > 1 << 20:
            passed.set()
            return b""
        return data


def test_a_fetch_that_was_aborted_before_it_ran_raises_at_once() -> None:
    with serving(Snapshot.take(state_of())) as (_, url):
        fetch = Fetch(request_to(url))
        fetch.abort()
        with pytest.raises(StepInterrupted):
            fetch.run()
        fetch.abort()


@pytest.mark.parametrize("how", ["close", "withdraw", "replace"])
def test_the_source_ends_it_in_the_middle(how: str) -> None:
    snapshot = Snapshot.take(state_of(32), SMALL_CHUNKS)
    with serving(snapshot, offers_max=1) as (server, url):
        acts: dict[str, Callable[[], None]] = {
            "close": server.close,
            "withdraw": partial(server.withdraw, KEY),
            "replace": partial(server.offer, "newer", Snapshot.take({})),
        }

        def act(done: int, total: int) -> None:
            if done == 2 * SMALL_CHUNKS:
                acts[how]()

        with pytest.raises(RecoveryFailed):
            Fetch(request_to(url), act).run()
        with pytest.raises(RecoveryFailed):
            fetched(url, 0.1)


def test_a_snapshot_that_is_offered_under_a_second_name_goes_on_when_the_first_is_withdrawn() -> None:
    snapshot = Snapshot.take(state_of(32))
    with serving(snapshot) as (server, url):
        server.offer("second", snapshot)
        with_progress = Fetch(request_to(url), lambda done, total: server.withdraw(KEY))
        assert_same(with_progress.run(), state_of(32))


def test_a_connection_that_is_cut_in_the_middle_fails() -> None:
    with serving(Snapshot.take(state_of(4))) as (_, url):
        with Proxy(url, lambda offset, data: data if offset < 1 << 20 else None) as proxy:
            with pytest.raises(RecoveryFailed):
                fetched(proxy.url)


# ---- several joiners


def test_two_joiners_at_once_get_the_same_state() -> None:
    with serving(Snapshot.take(state_of(16))) as (_, url):
        with Running(Fetch(request_to(url))) as first, Running(Fetch(request_to(url))) as second:
            first.wait()
            second.wait()
    assert_same(first.state, state_of(16))
    assert_same(second.state, state_of(16))


def test_a_slow_reader_delays_neither_another_joiner_nor_the_donor() -> None:
    snapshot = Snapshot.take(state_of(32))
    with serving(snapshot) as (server, url), _slow_reader(url, snapshot) as slow:
        wait_until(lambda: _serving(server), DEADLINE_S)
        began_at = time.monotonic()
        assert_same(fetched(url), state_of(32))
        assert time.monotonic() - began_at < 5.0
        withdrawn_at = time.monotonic()
        server.withdraw(KEY)
        assert time.monotonic() - withdrawn_at < AT_ONCE_S
        wait_until(lambda: not _connections(server), DEADLINE_S)
        assert slow.fileno() >= 0


def test_a_reader_that_takes_nothing_is_cut_off_after_the_stall_timeout() -> None:
    snapshot = Snapshot.take(state_of(32))
    with serving(snapshot, stall_timeout_s=0.1) as (server, url), _slow_reader(url, snapshot):
        wait_until(lambda: _serving(server), DEADLINE_S)
        wait_until(lambda: not _connections(server), DEADLINE_S)


def test_connections_beyond_the_limit_are_turned_away() -> None:
    with serving(Snapshot.take(state_of()), connections_max=1) as (server, url):
        with socket.create_connection(("127.0.0.1", urlsplit(url).port or 0)):
            wait_until(partial(_connections, server), DEADLINE_S)
            with pytest.raises(RecoveryFailed):
                fetched(url)
        wait_until(lambda: not _connections(server), DEADLINE_S)
        assert_same(fetched(url), state_of())


def _slow_reader(url: str, snapshot: Snapshot) -> socket.socket:
    """Asks for everything through a tiny window and reads none of it."""
    reader = socket.socket()
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    reader.connect(("127.0.0.1", urlsplit(url).port or 0))
    reader.sendall(f"GET {ChunksRequest(snapshot.id, 0, snapshot.chunk_count).target} HTTP/1.1\r\n\r\n".encode())
    return reader


# ---- nothing is left


def test_neither_threads_nor_descriptors_are_left_after_success_failure_and_abort() -> None:
    snapshot = Snapshot.take(state_of())
    fetched_from = serving(snapshot, AUTH)
    with fetched_from as (_, url):
        fetched(url, auth=AUTH)  # what is opened once and for all is open now
    before = _held()
    for _ in range(3):
        with serving(snapshot, AUTH) as (server, url):
            fetched(url, auth=AUTH)
            with pytest.raises(RecoveryFailed):
                fetched(url, 0.01, key="never", auth=AUTH)
            with Running(Fetch(request_to(url, key="never", auth=AUTH))) as running:
                wait_until(partial(_connections, server), DEADLINE_S)
            assert isinstance(running.error, StepInterrupted)
        server.close()
    assert _held() == before


def test_a_forked_child_lets_go_of_the_sockets_of_both_ends() -> None:
    with serving() as (server, url), Running(Fetch(request_to(url))) as running:
        wait_until(lambda: _connections(server) and running.fetch.list_fds(), DEADLINE_S)
        fds = [*server.list_fds(), *running.fetch.list_fds()]
        assert len(fds) == 3  # the listener and both ends of the connection
        pid = os.fork()
        if pid == 0:
            os._exit(sum(os.readlink(f"/proc/self/fd/{fd}") != "/dev/null" for fd in fds))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert all(os.readlink(f"/proc/self/fd/{fd}").startswith("socket:") for fd in fds)
    assert server.list_fds() == []
    assert running.fetch.list_fds() == []


def _held() -> tuple[int, set[str]]:
    return len(os.listdir("/proc/self/fd")), {thread.name for thread in threading.enumerate()}


def _connections(server: RecoveryServer) -> bool:
    return len(server.list_fds()) > 1


def _serving(server: RecoveryServer) -> bool:
    return any(connection.serving for connection in server._connections)


# ---- the server's own arguments


def test_a_server_without_a_token_listens_on_loopback_only() -> None:
    for host in ("0.0.0.0", "::", "", "10.1.2.3"):
        with RecoveryServer() as server, pytest.raises(ConfigError, match="EVERSTEP_TOKEN_FILE"):
            server.start(host, "127.0.0.1")
    with RecoveryServer(ServerOptions(auth=AUTH)) as server:
        assert server.start("0.0.0.0", "127.0.0.1").startswith("http://127.0.0.1:")


def test_an_address_that_cannot_be_used_is_named() -> None:
    with RecoveryServer() as server, pytest.raises(ConfigError, match="70000"):
        server.start("127.0.0.1", "127.0.0.1", 70000)
    with serving() as (_, url), RecoveryServer() as server:
        with pytest.raises(ConfigError, match="in use"):
            server.start("127.0.0.1", "127.0.0.1", urlsplit(url).port or 0)
    with RecoveryServer(ServerOptions(auth=AUTH)) as server, pytest.raises(ConfigError, match=r"a\.\.b"):
        server.start("a..b", "a..b")


def test_a_server_starts_once_and_its_keys_are_neither_empty_nor_endless() -> None:
    with serving() as (server, _):
        with pytest.raises(LocalProtocolError):
            server.start("127.0.0.1", "127.0.0.1")
        for key in ("", "k" * 513):
            with pytest.raises(LocalProtocolError):
                server.offer(key, Snapshot.take({}))
