"""Recovery transports in jobs of real processes: over a process group, over one of the script's own, never over two."""

import os
import signal
import threading
from typing import Any

import pytest
import torch

from everstep.config import ManagerSettings
from everstep.core.messages import Sever
from everstep.core.moves import ReplicaConfig
from everstep.core.types import QuorumId
from everstep.errors import RecoveryFailed, StepInterrupted
from everstep.recovery import Fetch
from everstep.recovery.peers import BULK, TALK
from everstep.train.presence import Presence
from tests.recovery.wire_faults import Strike, StruckTransport
from tests.recovery.wires import request_to
from tests.train.job import Job, Running, assert_same_bits
from tests.train.ranks import RankedJob, assert_ranks_agree

OVER_GROUP = {"width": 1024, "options": {"recovery_transport": "process_group"}}
WIDTH_OF_CHUNKS = 200_000  # a state of several


def _until_joined(job: Job, members: list[Running], participants: int) -> None:
    job.until(
        lambda: all(m.step > 0 and m.participants == participants for m in members),
        f"all {participants} train together",
    )


def _recoveries(member: Running) -> list[str]:
    return [line for line in member.logs if line.startswith("recovered step=")]


def _no_step_was_lost(survivors: list[Running]) -> bool:
    return all(report["committed"] for member in survivors for report in member.steps)


@pytest.mark.soak
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


def _end_at_the_second_bulk_message(number: int, lane: int, tensor: torch.Tensor) -> torch.Tensor:
    """The first is the manifest."""
    if (number, lane) == (2, BULK):
        os.kill(os.getpid(), signal.SIGKILL)
    return tensor


def _hold_the_second_bulk_message(number: int, lane: int, tensor: torch.Tensor) -> torch.Tensor:
    """So that every other donor has something to send."""
    if (number, lane) == (2, BULK):
        threading.Event().wait(0.5)
    return tensor


def _over(strike: Strike) -> dict[str, Any]:
    return {"width": WIDTH_OF_CHUNKS, "options": {"recovery_transport": StruckTransport(strike)}}


@pytest.mark.soak
@pytest.mark.parametrize("victims", [1, 2])
def test_donors_that_die_in_the_middle_of_the_state_cost_the_joiner_a_new_try_and_nobody_else_anything(
    victims: int,
) -> None:
    with Job(3) as job:
        # Group 0 is the founder: nobody else sends anything before there is a joiner.
        dying = {group: _over(_end_at_the_second_bulk_message) for group in range(3 - victims, 3)}
        job.start_all({group: _over(_hold_the_second_bulk_message) for group in range(3 - victims)} | dying)
        founders = list(job.running.values())
        job.until_steps(founders, 3)
        joiner = job.start(3, seed=3, **OVER_GROUP | {"width": WIDTH_OF_CHUNKS})
        for group in dying:
            job.until_gone(job.running[group])
        survivors = [member for member in job.running.values() if member.plan.group not in dying]
        _until_joined(job, survivors, 4 - victims)
        job.stop(survivors)
        assert_same_bits(survivors)
        assert _no_step_was_lost([member for member in survivors if member is not joiner])
        begun = [line for line in joiner.logs if line.startswith("recovering step=")]
        assert len(begun) >= 2
        assert len(_recoveries(joiner)) == 1


@pytest.mark.soak
def test_each_rank_of_a_group_takes_its_part_over_a_group_of_its_own() -> None:
    options = {"recovery_transport": "process_group"}
    with RankedJob(2) as job:
        job.start_teams(options=options)
        job.until_steps(job.everyone(), 3)
        job.kill(job.team[1][1])
        job.until_team_fails(1)
        job.until_all_recover(job.start_team(1, options=options))
        job.stop(job.everyone())
        assert_ranks_agree(job)


def _end_at_the_third_request(number: int, lane: int, tensor: torch.Tensor) -> torch.Tensor:
    """The joiner's first frame to each donor is its proof."""
    if (number, lane) == (4, TALK):
        os.kill(os.getpid(), signal.SIGKILL)
    return tensor


@pytest.mark.soak
def test_a_joiner_that_dies_in_the_middle_of_the_state_costs_nobody_a_step_and_comes_back() -> None:
    wide = OVER_GROUP | {"width": WIDTH_OF_CHUNKS}
    with Job(1) as job:
        job.start_all({0: wide})
        (donor,) = job.running.values()
        job.until_steps([donor], 3)
        job.until_gone(job.start(1, seed=1, **_over(_end_at_the_third_request)))
        returned = job.start(1, seed=2, **wide)
        _until_joined(job, [donor, returned], 2)
        job.stop([donor, returned])
        assert_same_bits([donor, returned])
        assert _no_step_was_lost([donor])


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
