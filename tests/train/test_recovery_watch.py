"""What is told of a recovery while it runs: enough to see it, and never much."""

import itertools
import threading
from collections.abc import Callable

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from everstep.core.recovery_report import RecoveryOutcome, RecoveryReport, merged
from everstep.core.types import QuorumId
from everstep.recovery import Fetch, Snapshot
from everstep.recovery.manifest import CHUNK_BYTES_MIN
from everstep.train.recovery_watch import LINE_AFTER_S, LINE_S, LINE_SHARE, PACE_S, Lines, Pace, RecoveryWatch
from tests.recovery.wires import DEADLINE_S, Proxy, Running, request_to, serving, state_of

FIRST = RecoveryReport(quorum_id=QuorumId(1, 2), step=3)


def watched(fetch: Fetch, url: str, show: Callable[[RecoveryReport], object]) -> Callable[[], dict[str, object]]:
    """`fetch.run`, with a watch on it."""
    watch = RecoveryWatch(
        first=FIRST, names={url: "0#1"}, transport="http", fetch=fetch.report, show=lambda report, _: show(report)
    )

    def run() -> dict[str, object]:
        with watch:
            return fetch.run()

    return run


def test_a_fetch_is_told_at_its_start_while_it_lasts_and_at_its_end() -> None:
    told: list[RecoveryReport] = []
    is_seen = threading.Event()

    def show(report: RecoveryReport) -> None:
        told.append(report)
        if 0 < report.done_bytes < report.total_bytes and report.digest_errors:
            is_seen.set()

    def tamper(offset: int, data: bytes) -> bytes:
        if offset < 100_000 <= offset + len(data):
            return data[:-1] + bytes([data[-1] ^ 1])
        if offset > 600_000:  # beyond that nothing moves before what came so far was told
            assert is_seen.wait(DEADLINE_S)
        return data

    snapshot = Snapshot.take(state_of(1.0), CHUNK_BYTES_MIN)
    with serving(snapshot) as (_, url), Proxy(url, tamper) as proxy:
        watched(Fetch(request_to(proxy.url)), proxy.url, show)()
    assert told[0] == RecoveryReport(quorum_id=FIRST.quorum_id, step=3, donors=("0#1",))
    assert {report.outcome for report in told[:-1]} == {RecoveryOutcome.FETCHING}
    end = told[-1]
    assert (end.outcome, end.done_bytes, end.total_bytes) == (RecoveryOutcome.DONE, 1 << 20, 1 << 20)
    assert (end.digest_errors, end.transport, end.donors) == (1, "http", ("0#1",))
    assert end.bytes_per_s == round(end.done_bytes / end.seconds)


def test_a_fetch_that_fails_says_why_and_one_that_is_aborted_that_it_was_cut_short() -> None:
    told: list[RecoveryReport] = []
    aborted: list[RecoveryReport] = []
    refused = "http://127.0.0.1:1"
    with Running(_Watched(Fetch(request_to(refused, retry_after_s=())), refused, told)) as running:  # type: ignore[arg-type]
        running.wait()
    assert told[-1].outcome is RecoveryOutcome.FAILED
    assert "Connection refused" in told[-1].detail
    assert told[-1].donors == ()
    with serving() as (_, url), Running(_Watched(Fetch(request_to(url)), url, aborted)) as running:  # type: ignore[arg-type]
        running.fetch.abort()
        running.wait()
    assert aborted[-1].outcome is RecoveryOutcome.CUT_SHORT


class _Watched:
    """A fetch, for `Running`."""

    def __init__(self, fetch: Fetch, url: str, told: list[RecoveryReport]) -> None:
        self.run = watched(fetch, url, told.append)
        self.abort = fetch.abort


@given(st.lists(st.tuples(st.floats(0.05, 30.0), st.floats(0.0, 0.3)), max_size=200))
def test_a_long_transfer_writes_few_lines_and_never_stays_silent(looks: list[tuple[float, float]]) -> None:
    lines, now, share = Lines(0.0), 0.0, 0.0
    said = [(0.0, 0.0)]
    for after_s, more in looks:
        now, share = now + after_s, min(1.0, share + more)
        if lines.is_due(share, now):
            said.append((now, share))
        assert now - said[-1][0] < LINE_AFTER_S
    for (at, had), (next_at, has) in itertools.pairwise(said):
        assert next_at >= at + LINE_S
        assert has >= had + LINE_SHARE or next_at >= at + LINE_AFTER_S


def test_the_rate_is_that_of_the_last_seconds() -> None:
    pace = Pace(10.0)
    assert pace.look(0, 10.0) == 0
    assert pace.look(1000, 11.0) == 1000
    assert pace.look(1500, 12.0) == 750
    assert pace.look(1500, 12.0 + PACE_S) == 0


def test_the_ranks_of_a_group_are_told_as_one_that_ends_with_the_last() -> None:
    done = RecoveryReport(
        quorum_id=QuorumId(1, 2), step=3, outcome=RecoveryOutcome.DONE, done_bytes=8, total_bytes=8, transport="memory"
    )
    half = RecoveryReport(quorum_id=QuorumId(1, 2), step=3, done_bytes=4, total_bytes=8, transport="http", retries=1)
    stale = RecoveryReport(quorum_id=QuorumId(1, 1), step=1, outcome=RecoveryOutcome.FAILED)
    assert merged([None], 2) is None
    early = merged([None, done, stale], 2)
    assert early is not None
    assert (early.outcome, early.done_bytes) == (RecoveryOutcome.FETCHING, 8), "the other rank is only late"
    assert merged([done, done], 2) == msgspec.structs.replace(done, done_bytes=16, total_bytes=16)
    both = merged([done, half], 2)
    assert both is not None
    assert (both.outcome, both.done_bytes, both.total_bytes) == (RecoveryOutcome.FETCHING, 12, 16)
    assert (both.transport, both.retries) == ("http+memory", 1)
