"""NodeClient against a real lighthouse: rounds, what nodes are told, the store of a round, closing, restarts."""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import pytest

from everstep.config import LighthouseSettings
from everstep.core.node_messages import CloseScope, IntervalsLargest, NodeSpec, RoundInfo, SeenInterval
from everstep.errors import (
    ConfigError,
    LighthouseUnreachable,
    RendezvousEnded,
    RendezvousTimedOut,
    RoundStoreError,
    RoundStoreTimeout,
)
from everstep.lighthouse.app import Lighthouse
from everstep.link.auth import Credentials
from everstep.link.dial import LinkTarget
from everstep.link.node import NodeClient
from everstep.link.operate import job_status
from tests.support.waiting import wait_until

DEADLINE_S = 20.0
T = TypeVar("T")


class Nodes:
    """Nodes of one job, and threads for their blocking calls."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._clients: list[NodeClient] = []
        self._threads = ThreadPoolExecutor(16)
        self._stores = 0

    def start(
        self,
        node_id: str,
        least: int = 1,
        most: int = 3,
        *,
        join_timeout_s: float = DEADLINE_S,
        last_call_s: float = DEADLINE_S,
        on_largest: Callable[[IntervalsLargest], None] | None = None,
    ) -> NodeClient:
        spec = NodeSpec(
            node_id=node_id,
            nonce=f"{node_id} {len(self._clients)}",
            min_nodes=least,
            max_nodes=most,
            join_timeout_s=join_timeout_s,
            last_call_s=last_call_s,
        )
        target = LinkTarget(url=self.url, credentials=Credentials(job_id="job", role="node"))
        client = NodeClient(target, "", spec)
        self._clients.append(client)
        client.on_largest = on_largest
        client.start()
        return client

    def join(self, client: NodeClient) -> "Future[RoundInfo]":
        return self.call(lambda: client.next_round(self.open_store))

    def round(self, *clients: NodeClient) -> list[RoundInfo]:
        return [future.result(DEADLINE_S) for future in [self.join(client) for client in clients]]

    def call(self, call: Callable[[], T]) -> "Future[T]":
        return self._threads.submit(call)

    def here(self) -> int:
        """How many have joined the round after this one, as the lighthouse knows."""
        (group,) = job_status(LinkTarget(url=self.url, credentials=Credentials(job_id="job")))["rendezvous"].values()
        return int(group["here"])

    def open_store(self) -> str:
        self._stores += 1
        return f"127.0.0.1:{40000 + self._stores}"

    def end(self) -> None:
        for client in self._clients:
            client.shutdown()
        self._threads.shutdown()


@pytest.fixture
def lighthouse() -> Iterator[Lighthouse]:
    with Lighthouse.in_thread(LighthouseSettings(port=0)) as served:
        yield served


@pytest.fixture
def nodes(lighthouse: Lighthouse) -> Iterator[Nodes]:
    with contextlib.closing(_Ending(Nodes(lighthouse.url))) as ending:
        yield ending.nodes


class _Ending:
    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes

    def close(self) -> None:
        self.nodes.end()


def told(client: NodeClient) -> bool:
    return client.wait_changed(lambda c: c.needs_new_round, DEADLINE_S)


def test_a_round_is_the_same_for_all_and_ranks_are_unique(nodes: Nodes) -> None:
    found = nodes.round(*(nodes.start(name) for name in ("n10", "n2", "n1")))
    assert [info.rank for info in found] == [2, 1, 0]
    assert len({(info.round, info.size, info.store) for info in found}) == 1


def test_who_leaves_dissolves_the_round_and_survivors_keep_their_ranks(nodes: Nodes) -> None:
    a, b, c = (nodes.start(name) for name in "abc")
    (before, _, _) = nodes.round(a, b, c)
    b.shutdown()
    assert told(a)
    assert told(c)
    assert "b" in a.why_dissolved
    again = nodes.round(a, c)
    assert [(info.rank, info.size) for info in again] == [(0, 2), (1, 2)]
    assert again[0].store != before.store


def test_a_spare_disturbs_nobody_and_takes_the_place_of_one_that_goes(nodes: Nodes) -> None:
    a, b = nodes.start("a", most=2), nodes.start("b", most=2)
    nodes.round(a, b)
    spare = nodes.start("spare", most=2)
    join = nodes.join(spare)
    wait_until(lambda: nodes.here() == 1)
    a.close(CloseScope.ROUND)
    assert told(b)
    assert a.closed is not None
    assert {info.size for info in nodes.round(a, b)} == {2}  # they go before it
    assert not join.done()
    a.shutdown()
    assert told(b)
    assert nodes.round(b)[0].rank == 1
    assert join.result(DEADLINE_S).rank == 0


def test_waiting_nodes_are_counted_as_far_as_there_is_room(nodes: Nodes) -> None:
    a = nodes.start("a", most=2, last_call_s=0.0)
    nodes.round(a)
    late = [nodes.join(nodes.start(name, most=2, last_call_s=0.0)) for name in ("b", "c")]
    assert told(a)
    assert a.waiting == 1
    assert nodes.round(a)[0].size == 2
    assert sum(future.done() for future in late) <= 1
    assert not a.needs_new_round
    a.close(reason="the test ends")


def test_too_few_nodes_fail_together_and_are_told_how_many_came(nodes: Nodes) -> None:
    joins = [nodes.join(nodes.start(name, least=3, join_timeout_s=0.2)) for name in "ab"]
    for join in joins:
        with pytest.raises(RendezvousTimedOut, match=r"of at least 3 nodes"):
            join.result(DEADLINE_S)


def test_closing_ends_a_join_and_every_later_one(nodes: Nodes) -> None:
    a = nodes.start("a", least=2)
    join = nodes.join(a)
    b = nodes.start("b", least=2)
    assert b.wait_changed(lambda c: c.is_open, DEADLINE_S)
    assert b.close(reason="enough", timeout_s=DEADLINE_S)
    with pytest.raises(RendezvousEnded, match="enough") as caught:
        join.result(DEADLINE_S)
    assert not caught.value.was_spare
    with pytest.raises(RendezvousEnded):
        nodes.join(nodes.start("late", least=2)).result(DEADLINE_S)


def test_a_spare_hears_that_it_was_one(nodes: Nodes) -> None:
    a = nodes.start("a", most=1)
    nodes.round(a)
    spare = nodes.start("spare", most=1)
    join = nodes.join(spare)  # on another thread, which may be late
    wait_until(lambda: nodes.here() == 1)
    assert nodes.round(a)[0].size == 1
    a.close(reason="done")
    with pytest.raises(RendezvousEnded) as caught:
        join.result(DEADLINE_S)
    assert caught.value.was_spare


def test_two_live_processes_with_one_id(nodes: Nodes) -> None:
    a = nodes.start("a", most=1)
    nodes.round(a)
    second = nodes.join(nodes.start("a", most=1))
    with pytest.raises(ConfigError, match="node id a belongs to another live process"):
        second.result(DEADLINE_S)
    assert not a.needs_new_round


def test_nodes_that_want_different_things_are_told_what_differs(nodes: Nodes) -> None:
    nodes.join(nodes.start("a", least=2, most=2))
    first = nodes.start("b", least=2, most=2)
    nodes.join(first).result(DEADLINE_S)
    with pytest.raises(ConfigError, match="max_nodes is 3 here and 2 on the other nodes"):
        nodes.join(nodes.start("c", least=2, most=3)).result(DEADLINE_S)


def test_the_store_is_shared_waits_and_ends_with_the_round(nodes: Nodes) -> None:
    a, b = nodes.start("a", most=2), nodes.start("b", most=2)
    infos = nodes.round(a, b)
    mine, other = a.store(infos[0]), b.store(infos[1])
    later = nodes.call(lambda: other.get("later"))
    assert mine.add("n", 2) + other.add("n", 3) == 7
    mine.multi_set(["later", "x"], [b"yes", b"1"])
    assert later.result(DEADLINE_S) == b"yes"
    assert other.multi_get(["x", "n"]) == [b"1", b"5"]
    assert other.compare_set("x", b"1", b"2") == b"2"
    mine.append("x", b"3")
    assert other.get("x") == b"23"
    assert (mine.check(["x"]), mine.check(["x", "y"]), mine.num_keys()) == (True, False, 3)
    assert (other.delete_key("n"), sorted(other.list_keys())) == (True, ["later", "x"])
    mine.queue_push("q", b"e")
    assert (other.queue_len("q"), other.queue_pop("q")) == (1, b"e")
    with pytest.raises(RoundStoreTimeout, match="never"):
        other.wait(["never"], 0.05)
    waiting = nodes.call(lambda: other.get("never"))
    mine.set("sync", b"")
    again = nodes.round(a, b)
    with pytest.raises(RoundStoreError) as caught:
        waiting.result(DEADLINE_S)
    assert caught.value.is_over
    with pytest.raises(RoundStoreError):
        mine.get("x")
    assert a.store(again[0]).num_keys() == 0


def test_the_host_of_the_store_may_die_before_it_has_said_where(nodes: Nodes) -> None:
    a, b = nodes.start("a", most=2), nodes.start("b", most=2)
    asked, go_on = threading.Event(), threading.Event()

    def never_opens() -> str:
        asked.set()
        assert go_on.wait(DEADLINE_S)
        return "too:1"

    dying = nodes.call(lambda: a.next_round(never_opens))
    other = nodes.join(b)
    assert asked.wait(DEADLINE_S)
    a.shutdown()
    info = other.result(DEADLINE_S)
    assert (info.size, info.rank) == (1, 0)
    assert info.store != "too:1"
    go_on.set()
    with pytest.raises(RendezvousEnded):
        dying.result(DEADLINE_S)


def test_a_lighthouse_that_is_started_again_finds_the_round_as_it_was() -> None:
    with Lighthouse.in_thread(LighthouseSettings(port=0)) as first:
        port = int(first.address.rpartition(":")[2])
        nodes = Nodes(first.url)
        a, b = nodes.start("a", most=2), nodes.start("b", most=2)
        infos = nodes.round(a, b)
        a.store(infos[0]).set("mine", b"kept")
        assert b.store(infos[1]).get("mine") == b"kept"
    assert a.wait_changed(lambda c: not c.is_open, DEADLINE_S)
    assert a.waiting == 0
    assert not a.needs_new_round
    with Lighthouse.in_thread(LighthouseSettings(port=port)):
        assert a.wait_changed(lambda c: c.is_open, DEADLINE_S)
        assert b.wait_changed(lambda c: c.is_open, DEADLINE_S)
        assert b.store(infos[1]).get("mine") == b"kept"  # its writer has put it back
        assert not a.needs_new_round
        again = nodes.round(a, b)
        assert [info.rank for info in again] == [0, 1]
        assert again[0].round.n > infos[0].round.n
        nodes.end()


def test_without_a_lighthouse_a_join_says_so() -> None:
    target = LinkTarget(
        url="http://127.0.0.1:1", credentials=Credentials(job_id="job", role="node"), connect_timeout_s=0.2
    )
    with NodeClient(target, "", NodeSpec(node_id="a", nonce="a")) as client:
        with pytest.raises(LighthouseUnreachable, match=r"no lighthouse at http://127\.0\.0\.1:1"):
            client.next_round(lambda: "x:1")


def test_what_ranks_of_one_node_saw_is_told_to_all_and_at_once_to_one_that_comes_later(nodes: Nodes) -> None:
    told: queue.SimpleQueue[IntervalsLargest] = queue.SimpleQueue()
    first = nodes.start("a", on_largest=told.put)
    first.saw((SeenInterval("step", 2.5),))
    wanted = IntervalsLargest((SeenInterval("step", 2.5),))
    assert told.get(timeout=DEADLINE_S) == wanted
    nodes.start("b", on_largest=told.put)
    assert told.get(timeout=DEADLINE_S) == wanted
