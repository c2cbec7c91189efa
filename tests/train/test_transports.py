"""Recovery transports in jobs of real processes: over a process group, over one of the script's own, never over two."""

from typing import Any

import pytest

from everstep.config import ManagerSettings
from everstep.core.messages import Sever
from everstep.core.moves import ReplicaConfig
from everstep.core.types import QuorumId
from everstep.errors import RecoveryFailed, StepInterrupted
from everstep.recovery import Fetch
from everstep.train.presence import Presence
from tests.recovery.wires import request_to
from tests.train.job import Job, Running, assert_same_bits

WIDTH = 1024
OVER_GROUP = {"width": WIDTH, "options": {"recovery_transport": "process_group"}}


def _until_joined(job: Job, members: list[Running], participants: int) -> None:
    job.until(
        lambda: all(m.step > 0 and m.participants == participants for m in members),
        f"all {participants} train together",
    )


def _recoveries(member: Running) -> list[str]:
    return [line for line in member.logs if line.startswith("recovered step=")]


def _no_step_was_lost(survivors: list[Running]) -> bool:
    return all(report["committed"] for member in survivors for report in member.steps)


def test_two_joiners_take_the_state_over_process_groups_from_all_donors_at_once() -> None:
    with Job(2) as job:
        job.start_all(dict.fromkeys(range(2), OVER_GROUP))
        founders = list(job.running.values())
        job.until_steps(founders, 3)
        joiners = [job.start(group, seed=group, **OVER_GROUP) for group in (2, 3)]
        members = [*founders, *joiners]
        _until_joined(job, members, 4)
        job.stop()
        assert_same_bits(members)
        assert _no_step_was_lost(founders)
        for joiner in joiners:
            (line,) = _recoveries(joiner)
            assert "digest_errors=0" in line
            assert "donors=2" in line or "donors=1" in line


@pytest.mark.soak
def test_a_donor_that_is_killed_while_it_sends_costs_the_joiner_a_new_try_and_nobody_else_anything() -> None:
    with Job(3) as job:
        dying: dict[str, Any] = {**OVER_GROUP, "die_in": "meet", "at_configure": 2}
        job.start_all({0: dying, 1: OVER_GROUP, 2: OVER_GROUP})
        victim, *survivors = job.running.values()
        job.until_steps(survivors, 3)
        joiner = job.start(3, seed=3, **OVER_GROUP)
        job.until_gone(victim)
        _until_joined(job, [*survivors, joiner], 3)
        job.stop([*survivors, joiner])
        assert_same_bits([*survivors, joiner])
        assert _no_step_was_lost(survivors)


@pytest.mark.soak
def test_a_member_with_another_transport_is_told_so_and_the_others_go_on() -> None:
    with Job(2) as job:
        job.start_all()
        founders = list(job.running.values())
        job.until_steps(founders, 3)
        stranger = job.start(2, seed=2, options={"recovery_transport": "process_group"})
        job.until_gone(stranger)
        assert "ConfigError" in stranger.error
        assert "'process_group', the others by 'http'" in stranger.error
        job.stop(founders)
        assert_same_bits(founders)
        assert _no_step_was_lost(founders)


def test_a_fetch_that_begins_when_its_quorum_is_severed_already_ends_at_once() -> None:
    """Nobody would sever it again, and nobody has what it waits for."""
    with Presence(ManagerSettings(), ReplicaConfig(replica_id="0", nonce="n"), None) as presence:
        with presence.changed:
            presence._perform([Sever(QuorumId(1, 5))])
        for number, error in ((5, StepInterrupted), (6, RecoveryFailed)):
            fetch = Fetch(request_to("http://127.0.0.1:1"))  # where nobody listens
            with presence.fetching(fetch, QuorumId(1, number)), pytest.raises(error):
                fetch.run()
