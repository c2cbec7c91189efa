"""Partitions of real jobs: the lighthouse and each group on a host of its own, in network namespaces (root)."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from everstep.core.events import EventKind, JobEvent
from everstep.core.messages import Cause
from tests.train.job import Job, Network, Running, assert_nothing_lost
from tests.train.namespaces import Hosts, why_not

_WHY_NOT = why_not()
pytestmark = [pytest.mark.soak, pytest.mark.skipif(bool(_WHY_NOT), reason=_WHY_NOT or "can run")]

HEARTBEAT_TIMEOUT_S = 1.0
DETECTION_S = 3.0  # silence, and the round after it
HEALING_S = 30.0  # I7: within it all groups train together again
BROKEN_PATH_S = 20.0  # two rounds, each after a while of waiting and one of asking
PAUSE_S = 20.0  # the second one that a group makes, for which there is no path


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with Hosts(["lighthouse", "0", "1", "2", "3"]) as made:
        yield made


@pytest.fixture
def network(hosts: Hosts, tmp_path: Path) -> Network:
    token_file = tmp_path / "token"
    token_file.write_text("a token of this test's own")
    token_file.chmod(0o600)
    return Network(hosts, token_file)


def started(job: Job) -> list[Running]:
    job.start_all()
    everyone = list(job.running.values())
    job.until_steps(everyone, 10)
    return everyone


def until_together(job: Job, everyone: list[Running], within_s: float = HEALING_S) -> float:
    """Every group trains in one quorum of all, some steps on; returns how long that took."""
    healed_at = time.monotonic()
    goal = max(m.step for m in everyone) + 5
    job.until(
        lambda: all(m.step >= goal and m.participants == len(everyone) for m in everyone),
        "all train together again",
        within_s,
    )
    return time.monotonic() - healed_at


def assert_stands_still(job: Job, members: list[Running], seconds: float) -> None:
    """Nothing is committed by these from now on, but for what their pipes still hold."""
    before = [m.step for m in members]
    with pytest.raises(AssertionError, match="not within"):
        job.until(lambda: any(m.step > b + 1 for m, b in zip(members, before, strict=True)), "a step", seconds)


def of_kind(events: list[JobEvent], kind: EventKind) -> list[JobEvent]:
    return [event for event in events if event.kind is kind]


def assert_one_side_went_on(job: Job, left_out: list[Running], others: list[Running]) -> None:
    """The others lost nothing, whoever was left out was so once, and nothing flapped; I1 to I5, I8."""
    events = job.events()
    assert job.violations() == []
    assert_nothing_lost(others)
    names = sorted(m.plan.group for m in left_out)
    failed = of_kind(events, EventKind.MEMBER_FAILED)
    assert sorted(int(e.replica_id) for e in failed) == names
    assert {e.cause for e in failed} <= {Cause.SILENT, Cause.NO_READY}
    evicted = [int(e.replica_id) for e in of_kind(events, EventKind.MEMBER_EVICTED)]
    assert sorted(set(evicted)) == names
    assert all(sum(line.startswith("evicted") for line in m.logs) == 1 for m in left_out)
    assert len(of_kind(events, EventKind.ROUND_OPENED)) == 1
    # The Grant without them, and one proposal for each that comes back at most.
    assert len(of_kind(events, EventKind.QUORUM_CHANGED)) <= 1 + len(left_out)


def run_partition(
    network: Network, groups: int, left_out: list[int], partition: Callable[[], None], lasts_s: float = 4.0
) -> None:
    """Let these groups be left out by `partition`, which then lasts; the others go on; then heal it."""
    with Job(groups, network=network, heartbeat_timeout_s=HEARTBEAT_TIMEOUT_S) as job:
        everyone = started(job)
        out = [everyone[group] for group in left_out]
        others = [m for m in everyone if m not in out]
        partition()
        cut_at = time.monotonic()
        job.until(lambda: all(m.participants == len(others) for m in others), "the others go on", DETECTION_S)
        noticed_s = time.monotonic() - cut_at
        at = max(m.step for m in others)
        assert_stands_still(job, out, lasts_s)
        job.until_steps(others, at + 5)
        network.hosts.heal()
        healed_s = until_together(job, everyone)
        print(f"others went on after {noticed_s:.2f} s; together {healed_s:.2f} s after healing")
        job.stop()
        assert_one_side_went_on(job, out, others)


def test_a_group_that_is_cut_off_from_everything_commits_nothing_and_comes_back(network: Network) -> None:
    run_partition(network, 3, [1], lambda: network.hosts.cut_off("1"))


def test_of_two_halves_the_one_with_the_lighthouse_goes_on(network: Network) -> None:
    run_partition(network, 4, [2, 3], lambda: network.hosts.cut_off("2", "3"))


def test_a_majority_without_the_lighthouse_commits_nothing(network: Network) -> None:
    run_partition(network, 4, [1, 2, 3], lambda: network.hosts.cut_off("1", "2", "3"))


@pytest.mark.parametrize("to", ["lighthouse", "all"])
@pytest.mark.parametrize("way", ["out", "in"])
def test_a_group_whose_packets_are_lost_one_way_is_left_out_once(network: Network, way: str, to: str) -> None:
    hosts = network.hosts

    def partition() -> None:
        for other in ["lighthouse"] if to == "lighthouse" else ["lighthouse", "0", "2"]:
            hosts.lose(*(("1", other) if way == "out" else (other, "1")))

    run_partition(network, 3, [1], partition)


def test_a_group_that_reaches_its_peers_but_not_the_lighthouse_is_left_out_once(network: Network) -> None:
    run_partition(network, 3, [1], lambda: network.hosts.cut(["1"], ["lighthouse"]))


def test_a_partition_of_longer_than_any_connection_lives_heals_as_well(network: Network) -> None:
    run_partition(network, 3, [1], lambda: network.hosts.cut_off("1"), lasts_s=20.0)


def test_training_goes_on_while_nobody_reaches_the_lighthouse(network: Network) -> None:
    with Job(3, network=network, heartbeat_timeout_s=HEARTBEAT_TIMEOUT_S) as job:
        everyone = started(job)
        network.hosts.cut_off("lighthouse")
        cut_at = time.monotonic()
        job.until(lambda: time.monotonic() - cut_at > 4 * HEARTBEAT_TIMEOUT_S, "the lighthouse suspects all of them")
        at = max(m.step for m in everyone)
        job.until_steps(everyone, at + 20)
        network.hosts.heal()
        healed_at = time.monotonic()
        job.until(lambda: any(m.granted() for m in everyone), "the lighthouse decides the round", HEALING_S)
        until_together(job, everyone)
        print(f"together {time.monotonic() - healed_at:.2f} s after healing")
        job.stop()
        assert job.violations() == []


@pytest.mark.parametrize("way", ["both", "one"])
def test_of_two_groups_that_reach_the_lighthouse_but_not_each_other_one_makes_way(network: Network, way: str) -> None:
    with Job(3, network=network) as job:
        everyone = started(job)
        if way == "both":
            network.hosts.cut(["0"], ["2"])
        else:
            network.hosts.lose("2", "0")
        cut_at = time.monotonic()
        job.until(lambda: sum(m.participants == 2 for m in everyone) == 2, "two of them go on", BROKEN_PATH_S)
        noticed_s = time.monotonic() - cut_at
        (out,) = (m for m in everyone if any(line.startswith("evicted") for line in m.logs))
        others = [m for m in everyone if m is not out]
        assert everyone[1] in others
        at = max(m.step for m in others)
        # It is tried again, once, and left out again, for longer.
        job.until(lambda: sum(line.startswith("evicted") for line in out.logs) == 2, "it is tried again", 40.0)
        job.until_steps(others, at + 20)
        network.hosts.heal()
        healed_s = until_together(job, everyone, PAUSE_S + HEALING_S)
        print(f"others went on after {noticed_s:.2f} s; together {healed_s:.2f} s after healing")
        job.stop()
        assert_nothing_lost(others)
        events = job.events()
        assert job.violations() == []
        failed = of_kind(events, EventKind.MEMBER_FAILED)
        assert [(int(e.replica_id), e.cause) for e in failed] == [(out.plan.group, Cause.BROKEN_PATH)] * 2
        assert len(of_kind(events, EventKind.ROUND_OPENED)) == 3
        assert any("could not reach each other" in line for line in out.logs if line.startswith("waiting"))


def test_a_group_that_reaches_the_lighthouse_but_none_of_its_peers_makes_way_for_all_of_them(network: Network) -> None:
    with Job(4, network=network) as job:
        everyone = started(job)
        network.hosts.cut(["0"], ["1", "2", "3"])
        others = everyone[1:]
        job.until(lambda: all(m.participants == 3 for m in others), "the others go on", BROKEN_PATH_S)
        network.hosts.heal()
        until_together(job, everyone, PAUSE_S + HEALING_S)
        job.stop()
        assert_nothing_lost(others)
        events = job.events()
        assert job.violations() == []
        assert [e.replica_id for e in of_kind(events, EventKind.MEMBER_FAILED)] == ["0"]


def test_a_path_that_is_broken_for_a_moment_costs_nobody_its_place(network: Network) -> None:
    with Job(3, network=network) as job:
        everyone = started(job)
        network.hosts.cut(["0"], ["2"])
        job.until(lambda: any("broken-path" in line for m in everyone for line in m.logs), "a round", BROKEN_PATH_S)
        network.hosts.heal()
        healed_s = until_together(job, everyone)
        print(f"together {healed_s:.2f} s after healing")
        job.stop()
        assert_nothing_lost(everyone)
        events = job.events()
        assert job.violations() == []
        assert len(of_kind(events, EventKind.ROUND_OPENED)) == 1
        assert not of_kind(events, EventKind.MEMBER_EVICTED)
