"""Deaths while live state moves: whoever dies, the others go on, and who joins has all of the state or none."""

import pytest

from everstep.core.events import EventKind, JobEvent
from tests.train.job import Job, Running, assert_same_bits

WIDTH = 1024
GIB = 1 << 30


def _until_joined(job: Job, members: list[Running], participants: int) -> None:
    job.until(
        lambda: all(m.step > 0 and m.participants == participants for m in members),
        f"all {participants} train together",
    )


def _recoveries(member: Running) -> list[str]:
    return [line for line in member.logs if line.startswith("recovered step=")]


def test_two_joiners_take_the_state_from_all_donors_at_once() -> None:
    with Job(2) as job:
        job.start_all({group: {"width": WIDTH} for group in range(2)})
        job.until_steps(list(job.running.values()), 3)
        joiners = [job.start(group, seed=group, width=WIDTH) for group in (2, 3)]
        members = list(job.running.values())
        _until_joined(job, members, 4)
        job.stop()
        assert_same_bits(members)
        for joiner in joiners:
            (line,) = _recoveries(joiner)
            assert "digest_errors=0" in line
            (asked,) = [line for line in joiner.logs if line.startswith("recovering step=")]
            assert asked.count("#") >= 2
        _assert_seen(job.events(), joiners)


def _assert_seen(events: list[JobEvent], joiners: list[Running]) -> None:
    """One event at the start of each recovery, and one at its end that says what it took."""
    for joiner in joiners:
        group = str(joiner.plan.group)
        told = [event for event in events if event.replica_id == group and event.kind.value.startswith("recovery")]
        assert [event.kind for event in told] == [EventKind.RECOVERY_STARTED, EventKind.RECOVERY_ENDED]
        start, end = told
        assert len(start.donors) >= 2
        assert (end.outcome, end.done_bytes) == ("done", end.total_bytes)
        assert set(end.transport.split("+")) <= {"http", "memory"}
        assert f"bytes={end.done_bytes} " in _recoveries(joiner)[0]


def test_a_donor_that_is_killed_while_its_state_is_read_costs_the_joiner_a_new_try_and_nobody_else_anything() -> None:
    with Job(3) as job:
        # The founding quorum is the first group of each; the one with the joiner is the second.
        job.start_all(
            {0: {"width": WIDTH, "die_in": "meet", "at_configure": 2}, 1: {"width": WIDTH}, 2: {"width": WIDTH}}
        )
        victim, *survivors = job.running.values()
        job.until_steps(survivors, 3)
        joiner = job.start(3, seed=3, width=WIDTH)
        job.until_gone(victim)
        _until_joined(job, [*survivors, joiner], 3)
        job.stop([*survivors, joiner])
        assert_same_bits([*survivors, joiner])
        assert not [report for member in survivors for report in member.steps if not report["committed"]]


def test_with_all_donors_but_one_killed_the_joiner_gets_the_state_from_that_one() -> None:
    with Job(3) as job:
        dying = {"width": WIDTH, "die_in": "meet", "at_configure": 2}
        job.start_all({0: dying, 1: dying, 2: {"width": WIDTH}})
        *victims, survivor = job.running.values()
        job.until_steps([survivor], 3)
        joiner = job.start(3, seed=3, width=WIDTH)
        for victim in victims:
            job.until_gone(victim)
        _until_joined(job, [survivor, joiner], 2)
        job.stop([survivor, joiner])
        assert_same_bits([survivor, joiner])


def test_a_joiner_that_is_killed_when_it_has_just_read_the_state_comes_back() -> None:
    with Job(2) as job:
        job.start_all({group: {"width": WIDTH} for group in range(2)})
        survivors = list(job.running.values())
        job.until_steps(survivors, 3)
        job.until_gone(job.start(2, seed=2, width=WIDTH, die_in="meet", at_configure=1))
        returned = job.start(2, seed=4, width=WIDTH)
        _until_joined(job, [*survivors, returned], 3)
        job.stop()
        assert_same_bits([*survivors, returned])
        assert not [report for member in survivors for report in member.steps if not report["committed"]]


@pytest.mark.soak
def test_a_group_with_4_gib_of_state_comes_back_without_a_second_copy_of_it() -> None:
    plan = {"state_bytes": 4 * GIB}
    with Job(2) as job:
        job.start_all(dict.fromkeys(range(2), plan))
        survivor, victim = job.running.values()
        job.until(lambda: min(survivor.step, victim.step) >= 3, "both train", 180.0)
        victim.process.kill()
        job.until_gone(victim)
        returned = job.start(1, seed=7, **plan)
        job.until(lambda: returned.step > 0 and survivor.participants == 2, "it is back", 180.0)
        job.stop()
        assert_same_bits([survivor, returned])
        (loaded,) = [record for record in returned.records if record["event"] == "bulk"]
        assert loaded["is_from"] == 0
        assert loaded["peak_bytes"] < 4 * GIB + GIB // 2
