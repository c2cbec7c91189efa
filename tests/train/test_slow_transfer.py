"""Live state that takes seconds to arrive, and what happens meanwhile: groups on hosts of their own (root)."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from everstep.core.events import EventKind
from tests.train.job import Job, Network, Running, assert_nothing_lost, assert_same_bits
from tests.train.namespaces import Hosts, why_not
from tests.train.ranks import RankedJob, assert_ranks_agree

_WHY_NOT = why_not()
pytestmark = [pytest.mark.soak, pytest.mark.skipif(bool(_WHY_NOT), reason=_WHY_NOT or "can run")]

MIB = 1 << 20
STATE = {"state_bytes": 24 * MIB}
RANKS_STATE: dict[str, Any] = {"state_bytes": 12 * MIB}  # of each of two
BYTES_PER_S = 5 * MIB


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    token_file = tmp_path / "token"
    token_file.write_text("a token of this test's own")
    token_file.chmod(0o600)
    with Hosts(["lighthouse", "0", "1", "2", "3", "4"]) as hosts:
        yield Network(hosts, token_file)


def donors(job: Job, **plan: Any) -> list[Running]:
    """All that the job is founded by, in the middle of training."""
    job.start_all(dict.fromkeys(range(job.groups), STATE | plan))
    members = list(job.running.values())
    job.until_steps(members, 5)
    return members


def start_slow(job: Job, network: Network, group: int, bytes_per_s: int = BYTES_PER_S, **plan: Any) -> Running:
    """A joiner whose host can receive so much, with a part of the state there, and not all."""
    network.hosts.slow(str(group), bytes_per_s)
    joiner = job.start(group, **(STATE | plan))
    until_in_the_middle(job, joiner)
    return joiner


def until_in_the_middle(job: Job, joiner: Running) -> None:
    def is_reading() -> bool:
        rows = [row for row in job.status()["members"] if row["replica_id"] == str(joiner.plan.group)]
        found = [row["recovery"] for row in rows if row["recovery"] is not None]
        return any(recovery["outcome"] == "fetching" and recovery["done_bytes"] > 0 for recovery in found)

    job.until(lambda: is_reading() and not has_recovered(joiner), "the joiner has a part of the state")


def has_recovered(joiner: Running) -> bool:
    return any(line.startswith("recovered step=") for line in joiner.logs)


def until_joined(job: Job, members: list[Running]) -> None:
    job.until(lambda: all(m.step > 0 and m.participants == len(members) for m in members), "all train together")


def end_well(job: Job, members: list[Running], left_out: int = 0, *, histories: int = 1) -> None:
    """The same bits everywhere, of one group's making, and no invariant broken."""
    job.stop(members)
    assert_same_bits(members)
    assert histories > 1 or job.violations() == []  # of one history, each step of which there is once
    loaded = [record["is_from"] for member in members for record in member.records if record["event"] == "bulk"]
    assert len(set(loaded)) == 1
    assert loaded[0] is not None
    evicted = [event for event in job.events() if event.kind is EventKind.MEMBER_EVICTED]
    assert len(evicted) >= left_out


def test_a_transfer_longer_than_every_timeout_costs_nobody_his_place(network: Network) -> None:
    options = {"collective_timeout_s": 4.0, "connect_timeout_s": 4.0}
    lighthouse = {"heartbeat_timeout_s": 1.0, "join_timeout_s": 2.0, "stuck_timeout_s": 4.0}
    with Job(2, network=network, **lighthouse) as job:
        members = donors(job, options=options)
        joiner = start_slow(job, network, 2, 5 * MIB // 4, options=options)
        until_joined(job, [*members, joiner])
        (recovered,) = [line for line in joiner.logs if line.startswith("recovered step=")]
        assert float(recovered.partition("fetch_ms=")[2].split()[0]) > 15_000
        assert job.failures() == []
        events = {event.kind for event in job.events()}
        assert not events & {EventKind.ROUND_OPENED, EventKind.MEMBER_EVICTED, EventKind.MEMBER_FAILED}
        assert_nothing_lost(members)
        end_well(job, [*members, joiner])


def test_a_donor_killed_in_the_middle_costs_the_joiner_a_new_try_and_the_others_nothing(network: Network) -> None:
    with Job(3, network=network) as job:
        victim, *survivors = donors(job)
        joiner = start_slow(job, network, 3)
        victim.process.kill()
        until_joined(job, [*survivors, joiner])
        assert_nothing_lost(survivors)
        end_well(job, [*survivors, joiner])


def test_with_all_donors_but_one_killed_in_the_middle_the_last_one_gives_the_state(network: Network) -> None:
    with Job(3, network=network) as job:
        *victims, survivor = donors(job)
        joiner = start_slow(job, network, 3)
        for victim in victims:
            victim.process.kill()
        until_joined(job, [survivor, joiner])
        end_well(job, [survivor, joiner])


def test_a_donor_stopped_in_the_middle_is_left_out_and_comes_back(network: Network) -> None:
    with Job(3, network=network, heartbeat_timeout_s=1.0) as job:
        stopped, *others = donors(job)
        joiner = start_slow(job, network, 3)
        assert stopped.process.pid is not None
        os.kill(stopped.process.pid, signal.SIGSTOP)
        until_joined(job, [*others, joiner])
        os.kill(stopped.process.pid, signal.SIGCONT)
        until_joined(job, [stopped, *others, joiner])
        assert_nothing_lost(others)
        end_well(job, [stopped, *others, joiner], left_out=1)


def test_a_joiner_killed_in_the_middle_costs_nobody_a_step_and_comes_back(network: Network) -> None:
    with Job(2, network=network) as job:
        members = donors(job)
        joiner = start_slow(job, network, 2)
        at = max(member.step for member in members)
        joiner.process.kill()
        job.until_steps(members, at + 5)
        returned = job.start(2, **STATE)
        until_joined(job, [*members, returned])
        assert_nothing_lost(members)
        end_well(job, [*members, returned])


def test_of_two_joiners_one_killed_in_the_middle_leaves_the_other_its_state(network: Network) -> None:
    with Job(2, network=network) as job:
        members = donors(job)
        network.hosts.slow("3", BYTES_PER_S)
        lasting = job.start(3, **STATE)
        killed = start_slow(job, network, 2)
        killed.process.kill()
        until_joined(job, [*members, lasting])
        assert_nothing_lost(members)
        end_well(job, [*members, lasting])


def test_a_group_that_comes_during_a_failure_gets_in_after_it(network: Network) -> None:
    """A member is silent, the round about it is open, and two more come; one of them while the other's state moves."""
    with Job(3, network=network, heartbeat_timeout_s=1.0) as job:
        silent, *others = donors(job)
        assert silent.process.pid is not None
        os.kill(silent.process.pid, signal.SIGSTOP)
        early = job.start(3, **STATE)
        late = start_slow(job, network, 4)
        os.kill(silent.process.pid, signal.SIGCONT)
        until_joined(job, [silent, *others, early, late])
        assert_nothing_lost(others)
        end_well(job, [silent, *others, early, late], left_out=1)


def until_ranks_are_in_the_middle(job: RankedJob, network: Network, group: int) -> list[Running]:
    """A joiner of several ranks, all on its one slow host."""
    network.hosts.slow(str(group), BYTES_PER_S)
    team = job.start_team(group, **RANKS_STATE)
    until_in_the_middle(job, team[0])
    return team


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_of_a_joiner_killed_in_the_middle_costs_no_rank_a_step(network: Network, rank: int) -> None:
    with RankedJob(3, network=network) as job:
        job.start_teams(**RANKS_STATE)
        survivors = job.everyone(2)
        job.until_steps(job.everyone(), 5)
        job.kill(job.team[2][0])
        job.until_team_fails(2)
        team = until_ranks_are_in_the_middle(job, network, 2)
        at = max(member.step for member in survivors)
        job.kill(team[rank])
        job.until_team_fails(2)
        job.until_steps(survivors, at + 5)
        job.until_all_recover(job.start_team(2, **RANKS_STATE))
        job.stop(job.everyone())
        assert_nothing_lost(survivors)
        assert_ranks_agree(job)
        assert_lent(survivors)


def test_a_donors_rank_killed_in_the_middle_costs_the_other_ranks_no_step(network: Network) -> None:
    """All of its group ends with it; the joiner's ranks begin anew with the donor that is left."""
    with RankedJob(3, network=network) as job:
        job.start_teams(**RANKS_STATE)
        job.until_steps(job.everyone(), 5)
        job.kill(job.team[2][1])
        job.until_team_fails(2)
        team = until_ranks_are_in_the_middle(job, network, 2)
        job.kill(job.team[1][1])
        job.until_team_fails(1)
        survivors = job.team[0]
        job.until(lambda: all(m.step > 0 and m.participants == 2 for m in [*survivors, *team]), "they train together")
        job.stop([*survivors, *team])
        assert_nothing_lost(survivors)
        assert_ranks_agree(job)
        assert_lent(survivors)


def assert_lent(donors: list[Running]) -> None:
    """They kept still until the joiners had the state, and no forward pass changed what these read."""
    for donor in donors:
        assert any(line.startswith("sent step=") for line in donor.logs), donor.logs


def test_half_of_a_state_is_never_the_beginning_of_a_history(network: Network) -> None:
    """The only donor dies in the middle and starts again without state: the job begins anew, not with what is torn."""
    with Job(2, network=network) as job:
        first, donor = donors(job)
        first.process.kill()
        job.until_gone(first)
        job.until(lambda: donor.participants == 1, "the other goes on alone")
        torn = start_slow(job, network, 0)
        donor.process.kill()
        job.until_gone(donor)
        again = job.start(1, **STATE)
        job.until_gone(torn)  # it comes first in the quorum: its weights were to be the job's
        assert torn.error.startswith("RecoveryFailed: a new history was to begin")
        returned = job.start(0, **STATE)
        until_joined(job, [again, returned])
        end_well(job, [again, returned], histories=2)
        assert not torn.steps
