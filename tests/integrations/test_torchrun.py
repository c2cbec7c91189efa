"""The handler that torch's agent is given: torch's own exceptions and values, on a real lighthouse."""

import datetime
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from torch.distributed import DistStoreError, PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousGracefulExitError,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler
from torch.distributed.elastic.utils.store import barrier

from everstep.config import LighthouseSettings
from everstep.core.ranks import NodeRole, worker_ranks
from everstep.errors import ConfigError
from everstep.integrations.round_store import LinkStore
from everstep.integrations.torchrun import EverstepRendezvousHandler, create_handler, get_handler
from everstep.lighthouse.app import Lighthouse
from tests.support.waiting import wait_until

DEADLINE_S = 20.0


class Agents:
    """Handlers of one run id, and threads for their blocking calls."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._handlers: list[EverstepRendezvousHandler] = []
        self._threads = ThreadPoolExecutor(8)

    def start(self, least: int = 1, most: int = 2, **conf: str) -> EverstepRendezvousHandler:
        handler = create_handler(parameters(self.address, least, most, {"node_id": f"n{len(self._handlers)}", **conf}))
        self._handlers.append(handler)
        return handler

    def join(self, handler: EverstepRendezvousHandler) -> "Future[RendezvousInfo]":
        return self._threads.submit(handler.next_rendezvous)

    def round(self, *handlers: EverstepRendezvousHandler) -> list[RendezvousInfo]:
        return [future.result(DEADLINE_S) for future in [self.join(handler) for handler in handlers]]

    def end(self) -> None:
        for handler in self._handlers:
            handler.shutdown()
        self._threads.shutdown()


def parameters(address: str, least: int, most: int, conf: dict[str, str]) -> RendezvousParameters:
    return RendezvousParameters("everstep", address, "job", least, most, local_addr="127.0.0.1", timeout=900, **conf)


@pytest.fixture
def agents() -> Iterator[Agents]:
    with Lighthouse.in_thread(LighthouseSettings(port=0)) as lighthouse:
        found = Agents(lighthouse.address)
        yield found
        found.end()


def test_torch_knows_the_backend_by_what_the_entry_point_gives_it(agents: Agents) -> None:
    assert get_handler() is create_handler
    handler = create_handler(parameters(agents.address, 1, 1, {}))
    assert (handler.get_backend(), handler.get_run_id(), handler.use_agent_store) == ("everstep", "job", True)
    assert (handler.num_nodes_waiting(), handler.is_closed(), handler.shutdown()) == (0, False, True)
    assert callable(get_rendezvous_handler)


def test_a_round_has_torchs_values_and_a_store_that_rank_0_hosts(agents: Agents) -> None:
    infos = agents.round(agents.start(), agents.start())
    assert sorted((info.rank, info.world_size) for info in infos) == [(0, 2), (1, 2)]
    bootstrap = infos[0].bootstrap_store_info
    assert bootstrap == infos[1].bootstrap_store_info
    assert bootstrap is not None
    assert bootstrap.master_addr == "127.0.0.1"
    worker = TCPStore(bootstrap.master_addr, bootstrap.master_port, is_master=False)
    worker.set("k", "v")
    assert worker.get("k") == b"v"


def test_every_round_has_a_store_of_its_own(agents: Agents) -> None:
    handlers = agents.start(), agents.start()
    first, second = agents.round(*handlers), agents.round(*handlers)
    assert first[0].bootstrap_store_info != second[0].bootstrap_store_info
    with pytest.raises(DistStoreError, match="round is over"):
        first[0].store.set("k", "v")
    assert second[0].store.num_keys() == 0


def test_the_store_is_one_of_torchs(agents: Agents) -> None:
    a, b = (info.store for info in agents.round(agents.start(), agents.start()))
    a.set("k", "v")
    assert b.get("k") == b"v"
    assert (a.add("n", 2), b.add("n", 1)) == (2, 3)
    assert a.compare_set("k", "v", "w") == b"w"
    assert b.multi_get(["k", "n"]) == [b"w", b"3"]
    assert isinstance(a, LinkStore)
    assert isinstance(b, LinkStore)
    b.multi_set(["x", "y"], ["1", "2"])
    a.append("x", "3")
    assert (b.get("x"), a.check(["x", "y"]), a.check(["z"])) == (b"13", True, False)
    assert a.delete_key("y")
    a.wait(["x"])
    a.set_timeout(datetime.timedelta(milliseconds=50))
    with pytest.raises(DistStoreError):
        a.get("never")
    with pytest.raises(DistStoreError):
        b.wait(["never"], datetime.timedelta(milliseconds=20))
    prefixed = PrefixStore("p", b)
    prefixed.set("in C++", "yes")
    assert prefixed.get("in C++") == b"yes"
    assert b.get("p/in C++") == b"yes"


def test_torchs_barrier_works_on_it(agents: Agents) -> None:
    infos = agents.round(agents.start(), agents.start())
    with ThreadPoolExecutor(2) as threads:
        ends = [threads.submit(barrier, info.store, 2, "exit", 10.0) for info in infos]
        for end in ends:
            end.result(DEADLINE_S)


def test_a_node_that_goes_makes_the_others_come_to_the_next_round(agents: Agents) -> None:
    a, b = agents.start(), agents.start()
    agents.round(a, b)
    assert a.num_nodes_waiting() == 0
    b._client.shutdown("dies")  # as its process's end would
    wait_until(lambda: a.num_nodes_waiting() > 0)
    assert agents.round(a)[0].world_size == 1
    assert a.num_nodes_waiting() == 0


def test_a_node_that_waits_is_counted(agents: Agents) -> None:
    a = agents.start(last_call_timeout="0")
    agents.round(a)
    late = agents.join(agents.start(last_call_timeout="0"))
    wait_until(lambda: a.num_nodes_waiting() == 1)
    assert agents.round(a)[0].world_size == 2
    late.result(DEADLINE_S)
    assert a.num_nodes_waiting() == 0


def test_a_spare_is_not_counted_and_ends_gracefully_when_the_job_is_over(agents: Agents) -> None:
    a = agents.start(most=1)
    agents.round(a)
    spare = agents.start(most=1)
    join = agents.join(spare)
    wait_until(lambda: spare._client.is_open)
    agents.round(a)
    assert a.num_nodes_waiting() == 0
    assert a.shutdown()
    with pytest.raises(RendezvousGracefulExitError):
        join.result(DEADLINE_S)


def test_who_joins_a_closed_rendezvous_is_told_so(agents: Agents) -> None:
    a, b = agents.start(), agents.start()
    agents.round(a, b)
    a.set_closed()
    wait_until(b.is_closed)
    assert a.is_closed()
    for handler in (a, b):
        with pytest.raises(RendezvousClosedError):
            agents.join(handler).result(DEADLINE_S)


def test_too_few_nodes_time_out(agents: Agents) -> None:
    with pytest.raises(RendezvousTimeoutError, match=r"1 of at least 2 nodes came within 0\.1 s"):
        agents.join(agents.start(least=2, join_timeout="0.1")).result(DEADLINE_S)


def test_without_the_lighthouse_nobody_waits_and_closing_fails(agents: Agents) -> None:
    with Lighthouse.in_thread(LighthouseSettings(port=0)) as lighthouse:
        alone = Agents(lighthouse.address)
        a = alone.start(most=1)
        alone.round(a)
    wait_until(lambda: not a._client.is_open)
    assert a.num_nodes_waiting() == 0
    assert not a.is_closed()
    with pytest.raises(RendezvousConnectionError):
        a.set_closed()
    assert a.shutdown() is False
    alone.end()
    nowhere = create_handler(parameters("127.0.0.1:1", 1, 1, {"connect_timeout": "0.1"}))
    with pytest.raises(RendezvousConnectionError):
        nowhere.next_rendezvous()
    nowhere.shutdown()


def test_a_round_that_ends_while_workers_are_numbered_is_answered_for(agents: Agents) -> None:
    a, b = agents.start(), agents.start()
    infos = agents.round(a, b)
    mine = next(info for info in infos if info.rank == 0)
    other = a if infos[0].rank == 1 else b
    mine.store.set("torchelastic/role_info/0", '{"role": "t", "rank": 0, "local_world_size": 4}')
    other._client.shutdown("dies")
    keys = [f"torchelastic/role_info/{rank}" for rank in range(2)]
    assert len(mine.store.multi_get(keys)) == 2
    (ranks, _) = worker_ranks([NodeRole(role="t", local_world_size=4)] * 2)
    assert mine.store.get("torchelastic/assigned_ranks/0") == (
        f"[{ranks.base_rank}, {ranks.world_size}, {ranks.base_role_rank}, {ranks.role_world_size}]".encode()
    )
    with pytest.raises(DistStoreError):
        mine.store.get("something else")


def test_a_wrong_key_is_an_error_before_anything_is_connected(agents: Agents) -> None:
    with pytest.raises(ConfigError, match="did you mean last_call_timeout"):
        create_handler(parameters(agents.address, 1, 1, {"lastcall_timeout": "3"}))
