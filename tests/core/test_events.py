"""A job's event log: every event once and in order, and never a silent gap."""

from hypothesis import given
from hypothesis import strategies as st

from everstep.core.events import EventKind, EventLog, JobEvent

FAILED = JobEvent(kind=EventKind.MEMBER_FAILED, replica_id="1", incarnation=7)


def log_of(count: int, kept_max: int = 10, stream: str = "life") -> EventLog:
    log = EventLog("job", stream, kept_max)
    for i in range(count):
        log.append(JobEvent(kind=EventKind.MEMBER_FAILED, replica_id=str(i)), float(i))
    return log


def test_an_event_gets_the_job_a_number_and_a_time() -> None:
    entry = EventLog("job", "life", 10).append(FAILED, 12.5)
    assert (entry.job_id, entry.cursor, entry.at, entry.member) == ("job", "life-1", 12.5, "1#7")


@given(count=st.integers(0, 30), kept_max=st.integers(1, 20), batch=st.integers(1, 7), start=st.integers(0, 35))
def test_a_reader_gets_every_event_once_and_in_order_or_is_told_that_it_cannot(
    count: int, kept_max: int, batch: int, start: int
) -> None:
    log = log_of(count, kept_max)
    cursor, seen = f"life-{start}", []
    while (events := log.after(cursor, batch)) is not None and events:
        seen += [int(event.replica_id) for event in events]
        cursor = events[-1].cursor
    is_in_reach = max(0, count - kept_max) <= start <= count
    assert (events is not None) is is_in_reach
    assert seen == (list(range(start, count)) if is_in_reach else [])


def test_another_life_of_the_job_is_not_continued() -> None:
    assert log_of(3, stream="second").after("first-2", 10) is None


def test_what_is_no_cursor_is_not_continued() -> None:
    log = log_of(3)
    for cursor in ("", "life", "life-", "life-x", "-1", "life-" + "9" * 30, "life-1\nlife-2", "é-1"):
        assert log.after(cursor, 10) is None


def test_the_oldest_cursor_reads_all_that_is_kept() -> None:
    log = log_of(25, kept_max=10)
    assert [event.replica_id for event in log.after(log.oldest_cursor, 100) or ()] == [str(i) for i in range(15, 25)]


def test_a_resync_carries_the_state_and_the_cursor_to_go_on_from() -> None:
    log = log_of(3)
    resync = log.resync("fell behind", {"quorum": "1.1"}, 9.0)
    assert (resync.kind, resync.snapshot, resync.cursor) == (EventKind.RESYNC, {"quorum": "1.1"}, log.cursor)
    log.append(FAILED, 10.0)
    assert [event.replica_id for event in log.after(resync.cursor, 10) or ()] == ["1"]
