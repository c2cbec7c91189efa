"""A rendezvous of real processes survives what may happen to them, to its lighthouse, and to their clocks."""

import contextlib
import random
import re
import signal
import time
from collections.abc import Iterator

import pytest

from everstep.config import LighthouseSettings
from everstep.lighthouse.app import Lighthouse
from tests.rendezvous.agents import DEADLINE_S, Agents, agents_on, check_all_rounds
from tests.support.processes import Spawned, Spawner

NODE_TIMEOUT_S = 1.5


@pytest.fixture
def agents(spawn: Spawner) -> Iterator[Agents]:
    with Lighthouse.in_thread(LighthouseSettings(port=0, node_timeout_s=NODE_TIMEOUT_S)) as lighthouse:
        with agents_on(spawn, lighthouse.address) as found:
            yield found
            check_all_rounds(found.said)


def lighthouse_process(spawn: Spawner, port: int = 0) -> Spawned:
    return spawn(["-m", "everstep.cli", "lighthouse", "--port", str(port)], until_teardown=True)


def address_of(lighthouse: Spawned) -> str:
    return lighthouse.expect_line("listening on").rpartition(" ")[2]


def test_a_node_killed_while_it_joins_leaves_the_others_to_go_on(agents: Agents) -> None:
    agents.start("a", "b", min_nodes=3, max_nodes=3)
    agents.kill("a")
    agents.start("c", "d", min_nodes=3, max_nodes=3)
    agents.round_of("b", "c", "d")


def test_the_host_killed_before_it_has_said_where_the_store_is_is_replaced(agents: Agents) -> None:
    agents.start("a", min_nodes=2, max_nodes=3, waits_to_host=True)
    agents.start("b", "c", min_nodes=2, max_nodes=3)
    agents.expect("a", "hosting")
    agents.kill("a")
    found = agents.round_of("b", "c")
    assert found["b"]["store"].startswith("b-")


@pytest.mark.parametrize("victim", ["a", "c"])
def test_a_node_killed_in_a_complete_round_is_missing_in_the_next(agents: Agents, victim: str) -> None:
    agents.start("a", "b", "c")
    before = {name: row for name, row in agents.round_of("a", "b", "c").items() if name != victim}
    agents.kill(victim)
    after = agents.round_of(*before)
    stores = {row["store"] for row in (*before.values(), *after.values())}
    assert len(stores) == 2  # nobody keeps the address of before
    assert after["b"]["rank"] == 1  # survivors keep their ranks, as far as there are so many
    agents.start(f"{victim}2")
    agents.round_of(*before, f"{victim}2")


@pytest.mark.parametrize("stopped_s", [3.0, pytest.param(22.0, marks=pytest.mark.soak)])
def test_a_stopped_node_is_told_that_it_was_evicted(agents: Agents, stopped_s: float) -> None:
    agents.start("a", "b", "c")
    agents.round_of("a", "b", "c")
    began_at = time.monotonic()
    agents.kill("c", signal.SIGSTOP)
    agents.round_of("a", "b")
    with pytest.raises(AssertionError, match="no "):
        agents.expect("c", "round", deadline_s=stopped_s - (time.monotonic() - began_at))
    agents.kill("c", signal.SIGCONT)
    assert "nothing heard" in agents.expect("c", "error", kind="NodeEvicted")["why"]
    agents.round_of("a", "b", "c")  # it came back as a newcomer


def test_wall_clocks_20_seconds_apart_make_no_difference(agents: Agents) -> None:
    for name, offset_s in (("a", 0.0), ("b", 20.0), ("c", -20.0)):
        agents.start(name, clock_offset_s=offset_s)
    found = agents.round_of("a", "b", "c")
    agents.tell("b", "again")
    assert {row["n"] for row in agents.round_of("a", "b", "c").values()} == {found["a"]["n"] + 1}


@pytest.mark.parametrize("is_complete", [False, True])
def test_the_lighthouse_killed_in_the_middle_loses_nobody(spawn: Spawner, is_complete: bool) -> None:
    lighthouse = lighthouse_process(spawn)
    address = address_of(lighthouse)
    with agents_on(spawn, address) as agents:
        agents.start("a", "b", min_nodes=3)
        before: dict[str, dict[str, object]] = {}
        if is_complete:
            agents.start("c", min_nodes=3)
            before = agents.round_of("a", "b", "c")
        lighthouse.kill()
        lighthouse.wait()
        lighthouse = lighthouse_process(spawn, int(address.rpartition(":")[2]))
        address_of(lighthouse)
        if is_complete:
            agents.start("d", min_nodes=3)
            agents.tell("a", "again")
            found = agents.round_of("a", "b", "c")
            assert {name: row["rank"] for name, row in found.items()} == {
                name: row["rank"] for name, row in before.items()
            }
        else:
            agents.start("c", min_nodes=3)
            agents.round_of("a", "b", "c")
        check_all_rounds(agents.said)


def test_the_second_of_two_nodes_with_one_id_is_refused(agents: Agents) -> None:
    agents.start("a", "b", max_nodes=2)
    agents.round_of("a", "b")
    agents.start("twin", node_id="a", max_nodes=2)
    assert "another live process" in agents.expect("twin", "error", kind="ConfigError")["why"]
    agents.kill("a")
    agents.start("heir", node_id="a", max_nodes=2)
    agents.round_of("b", "heir")


def test_closing_ends_a_join_and_a_spares_wait(agents: Agents) -> None:
    agents.start("a", "b", max_nodes=2)
    agents.round_of("a", "b")
    agents.start("spare", max_nodes=2)
    agents.tell("a", "close")
    assert agents.expect("a", "closing")["confirmed"]
    assert "asked to" in agents.expect("spare", "error", kind="RendezvousEnded")["why"]
    agents.start("late", max_nodes=2)
    agents.expect("late", "error", kind="RendezvousEnded")


@pytest.mark.parametrize("seconds", [5, pytest.param(600, marks=pytest.mark.soak)])
def test_fifty_nodes_that_come_and_go_at_random_have_one_round_at_a_time(spawn: Spawner, seconds: int) -> None:
    rng = random.Random(seconds)
    lighthouse = lighthouse_process(spawn)
    with agents_on(spawn, address_of(lighthouse)) as agents:
        wants = {"min_nodes": 1, "max_nodes": 40, "last_call_s": 0.3}
        alive = [f"n{i}" for i in range(50)]
        agents.start(*alive, **wants)
        ends_at, started = time.monotonic() + seconds, len(alive)
        while time.monotonic() < ends_at:
            victim = alive.pop(rng.randrange(len(alive)))
            if rng.random() < 0.5:
                agents.kill(victim)
            else:
                agents.tell(victim, "leave")
            newcomer = f"n{started}"
            started += 1
            agents.start(newcomer, **wants)
            alive.append(newcomer)
            if rng.random() < 0.3:
                agents.tell(rng.choice(alive), "again")
        newest = max(row["n"] for row in agents.said if row["event"] == "round")
        last: dict[str, int] = {}
        deadline = time.monotonic() + DEADLINE_S
        while sum(n == max(last.values(), default=0) for n in last.values()) < 40 and time.monotonic() < deadline:
            with contextlib.suppress(AssertionError):
                agents.expect(alive[0], "round", deadline_s=1.0)
            last = {row["node"]: row["n"] for row in agents.said if row["event"] == "round" and row["node"] in alive}
        assert sum(n == max(last.values()) for n in last.values()) == 40, "no last round of all"
        assert check_all_rounds(agents.said) >= min(newest, 5)
        errors = [row for row in agents.said if row["event"] == "error" and not re.search("left", row["why"])]
        assert errors == []
