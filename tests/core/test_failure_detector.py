"""Who is suspected when, by what is heard."""

from hypothesis import given
from hypothesis import strategies as st

from everstep.core.failure_detector import LATENESS_MIN_S, DetectorPolicy, FailureDetector, Suspicion
from everstep.core.messages import Cause
from everstep.core.types import MemberId

A, B = MemberId("a", 1), MemberId("b", 1)


def detector() -> FailureDetector:
    return FailureDetector(DetectorPolicy(heartbeat_timeout_s=2.0, link_grace_s=0.02))


def suspected(watch: FailureDetector, now: float) -> list[tuple[MemberId, Cause]]:
    return [(found.member, found.cause) for found in watch.expire(now) if isinstance(found, Suspicion)]


def test_silence_is_suspected_once_at_its_deadline() -> None:
    watch = detector()
    watch.watch(A, 1.0)
    assert watch.next_deadline() == 3.0
    assert suspected(watch, 2.999) == []
    assert suspected(watch, 3.0) == [(A, Cause.SILENT)]
    assert suspected(watch, 9.0) == []
    assert watch.next_deadline() is None


def test_a_word_puts_the_deadline_off() -> None:
    watch = detector()
    watch.watch(A, 0.0)
    watch.heard(A, 1.5)
    watch.next_deadline()
    assert suspected(watch, 2.0) == []
    assert watch.next_deadline() == 3.5
    assert suspected(watch, 3.5) == [(A, Cause.SILENT)]


def test_who_is_heard_after_it_was_given_up_is_watched_again() -> None:
    watch = detector()
    watch.watch(A, 0.0)
    assert suspected(watch, 2.0) == [(A, Cause.SILENT)]
    watch.heard(A, 2.5)
    assert suspected(watch, 4.5) == [(A, Cause.SILENT)]


def test_a_closed_link_has_a_grace_and_coming_back_ends_it() -> None:
    watch = detector()
    watch.watch(A, 0.0)
    watch.link_closed(A, "reset", 1.0)
    assert watch.next_deadline() == 1.02
    watch.watch(A, 1.01)
    assert suspected(watch, 1.5) == []
    watch.link_closed(A, "reset", 1.5)
    assert suspected(watch, 1.52) == [(A, Cause.LINK_CLOSED)]


def test_a_word_under_way_when_the_link_closed_is_no_return() -> None:
    watch = detector()
    watch.watch(A, 0.0)
    watch.link_closed(A, "reset", 1.0)
    watch.heard(A, 1.001)
    assert suspected(watch, 1.02) == [(A, Cause.LINK_CLOSED)]


def test_a_second_witness_ends_the_grace_of_a_closed_link_only() -> None:
    watch = detector()
    watch.watch(A, 0.0)
    watch.watch(B, 0.0)
    watch.link_closed(A, "reset", 1.0)
    watch.confirm(A, 1.0)
    watch.confirm(B, 1.0)
    assert suspected(watch, 1.0) == [(A, Cause.LINK_CLOSED)]


def test_its_own_lateness_accuses_nobody() -> None:
    watch = detector()
    watch.watch(A, 0.0)
    watch.watch(B, 0.5)
    assert watch.next_deadline() == 2.0
    late = 2.0 + LATENESS_MIN_S + 5.0
    assert suspected(watch, late) == []
    watch.heard(B, late)  # what had arrived is read first
    deadline = watch.next_deadline()
    assert deadline == late + LATENESS_MIN_S
    assert suspected(watch, deadline) == [(A, Cause.SILENT)]


def test_who_is_forgotten_is_not_suspected() -> None:
    watch = detector()
    watch.watch(A, 0.0)
    watch.forget(A)
    assert watch.next_deadline() is None
    assert suspected(watch, 9.0) == []
    assert not watch.is_watched(A)


def test_words_cost_no_entry_each() -> None:
    watch = detector()
    watch.watch(A, 0.0)
    for i in range(1000):
        watch.heard(A, i / 1000)
    assert len(watch._heap) == 1


EVENTS = st.tuples(
    st.sampled_from(["watch", "heard", "link_closed", "confirm", "forget"]), st.sampled_from([A, B]), st.floats(0, 3)
)


@given(st.lists(EVENTS))
def test_after_expiring_the_next_deadline_is_in_the_future(events: list[tuple[str, MemberId, float]]) -> None:
    watch, now = detector(), 0.0
    for event, member, delay in events:
        now += delay
        match event:
            case "watch":
                watch.watch(member, now)
            case "heard":
                watch.heard(member, now)
            case "link_closed":
                watch.link_closed(member, "", now)
            case "confirm":
                watch.confirm(member, now)
            case "forget":
                watch.forget(member)
        watch.expire(now)
        deadline = watch.next_deadline()
        assert deadline is None or deadline > now
