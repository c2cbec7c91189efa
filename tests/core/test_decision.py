"""Rule G3 against a slow, obvious version, written from the design's table and not from the code."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from everstep.core.quorum import Lost, Pending, RoundView, Won, count_round
from everstep.core.resolution import Resolution, resolve
from everstep.core.types import (
    Action,
    Lineage,
    LineageEntry,
    LocalProtocolError,
    Member,
    MemberId,
    Phase,
    Quorum,
    QuorumId,
    Report,
    genesis,
)

NAMES = [MemberId(f"m{i}", 1) for i in range(4)]
CURRENT = QuorumId(1, 1)


def entry(step: int, attempt: int, sample: bytes) -> LineageEntry:
    return LineageEntry(step, attempt, CURRENT, 3, sample)


ONE = genesis("h").extended(entry(1, 0, b"x"))
OTHER = genesis("h").extended(entry(1, 0, b"y"))
LINEAGES = [genesis("h"), ONE, ONE.extended(entry(2, 0, b"x")), OTHER]
TAGS = [entry(step, attempt, sample) for step in (1, 2, 3) for attempt in (0, 1) for sample in (b"x", b"y")]


def reports(member: MemberId) -> st.SearchStrategy[Report]:
    return st.builds(
        Report,
        member=st.just(member),
        quorum_id=st.just(CURRENT),
        is_unsettled=st.just(True),
        lineage=st.sampled_from(LINEAGES),
        attempt=st.integers(0, 2),
        phase=st.sampled_from(Phase),
        vote=st.sampled_from([True, True, False]),
        tag=st.sampled_from(TAGS),
        voted_for=st.sampled_from([QuorumId(1, 1), QuorumId(1, 2), QuorumId(1, 3)]),
        keeps_gradients=st.sampled_from([True, True, True, False]),
    )


def as_members_say(report: Report) -> Report:
    """What a member can say at all: its tag is of the next step, a vote exists while VOTING only."""
    tag = report.tag if report.phase is not Phase.RUNNING else None
    if tag is not None:
        tag = entry(report.step + 1, report.attempt, tag.samples)
    is_voting = report.phase is Phase.VOTING
    return Report(
        member=report.member,
        quorum_id=report.quorum_id,
        is_unsettled=True,
        lineage=report.lineage,
        attempt=report.attempt,
        phase=report.phase,
        vote=report.vote if is_voting else None,
        tag=tag,
        voted_for=report.voted_for if is_voting else None,
        keeps_gradients=report.keeps_gradients,
    )


def slow_resolve(said: list[Report]) -> Resolution | None:
    """Row by row; None when the reports contradict each other."""
    steps = [r.step for r in said]
    top, holders = max(steps), [r for r in said if r.step == max(steps)]
    for a, b in itertools.product(holders, holders):
        if a.lineage != b.lineage:
            return None
    for r in said:
        if r.step == top:
            continue
        if not (r.phase == Phase.VOTING and r.vote and r.tag is not None and r.lineage is not None):
            return None
        if r.tag.step != r.step + 1 or r.lineage.extended(r.tag) != holders[0].lineage:
            return None
    highest = max(r.attempt for r in holders)
    if any(r.step < top or r.attempt < highest for r in said):
        row = "somebody does not hold it"
    elif any(r.phase == Phase.VOTING and r.vote is False for r in said):
        row = "somebody voted no"
    elif any(r.phase == Phase.RUNNING for r in said) or any(r.tag != said[0].tag for r in said):
        row = "somebody does not hold it"
    elif all(r.phase == Phase.VOTING for r in said):
        row = "all voted ok"
    else:
        row = "somebody had not voted"
    action = {
        "somebody does not hold it": Action.REDUCE if all(r.keeps_gradients for r in said) else Action.ABORT,
        "somebody voted no": Action.ABORT,
        "all voted ok": Action.COMMIT,
        "somebody had not voted": Action.VOTE,
    }[row]
    return Resolution(step=top, attempt=highest, action=action)


@given(st.lists(st.sampled_from(NAMES), min_size=1, unique=True).flatmap(lambda ms: st.tuples(*map(reports, ms))))
def test_the_step_is_resolved_as_the_table_says(drawn: tuple[Report, ...]) -> None:
    said = [as_members_say(report) for report in drawn]
    expected = slow_resolve(said)
    try:
        resolved = resolve(said)
    except LocalProtocolError:
        assert expected is None
    else:
        assert resolved == expected


@given(st.data())
def test_the_resolution_depends_on_nobodys_place(data: st.DataObject) -> None:
    said = [as_members_say(data.draw(reports(member))) for member in NAMES[:3]]
    expected = slow_resolve(said)
    for order in itertools.permutations(said):
        if expected is not None:
            assert resolve(order) == expected


def slow_count(view: RoundView) -> str | tuple[MemberId, ...]:
    """ "wait", "lost", "unused", or the survivors."""
    everybody = view.current.member_ids
    waited_for = [m for m in everybody if m not in view.suspects]
    if not all(m in view.reports for m in waited_for):
        return "wait"
    with_state = tuple(m for m in waited_for if view.reports[m].lineage is not None)
    if not with_state:
        answered = [m for m in everybody if m in view.reports]
        if not answered:
            return "wait"
        none_among_them = [m for m in answered if view.reports[m].lineage is None]
        return "unused" if view.is_founding and none_among_them else "lost"
    for proposal in view.proposals:
        if proposal.id <= view.current.id:
            continue
        witnesses = 0
        for m in with_state:
            said = view.reports[m]
            voted_for_it = said.phase == Phase.VOTING and said.voted_for == proposal.id
            if proposal.is_member(m) or not voted_for_it:
                witnesses += 1
        witnesses += sum(m in view.reports and view.reports[m].lineage is None for m in proposal.member_ids)
        if witnesses == 0:
            return "wait"
    return with_state


def quorum(quorum_id: QuorumId, members: list[MemberId]) -> Quorum:
    return Quorum(quorum_id, tuple(Member(m) for m in members))


@st.composite
def views(draw: st.DrawFn) -> RoundView:
    def some(least: int = 1) -> list[MemberId]:
        return sorted(draw(st.lists(st.sampled_from(NAMES), min_size=least, unique=True)), key=str)

    said = {}
    for member in draw(st.lists(st.sampled_from(NAMES), unique=True)):
        report = as_members_say(draw(reports(member)))
        lineage: Lineage | None = report.lineage if draw(st.integers(0, 3)) else None
        said[member] = Report(
            member, CURRENT, True, lineage, report.attempt, report.phase, report.vote, report.tag, report.voted_for
        )
    proposals = [quorum(QuorumId(1, seq), some()) for seq in draw(st.sampled_from([[], [2], [2, 3], [0, 2]]))]
    return RoundView(
        current=quorum(CURRENT, some()),
        proposals=proposals,
        reports=said,
        suspects=dict.fromkeys(some(0)),
        is_founding=draw(st.booleans()),
    )


@given(views())
def test_a_round_is_counted_as_the_rule_says(view: RoundView) -> None:
    match count_round(view):
        case Pending():
            assert slow_count(view) == "wait"
        case Lost(is_unused):
            assert slow_count(view) == ("unused" if is_unused else "lost")
        case Won(survivors):
            assert slow_count(view) == survivors


def test_one_no_aborts_even_when_others_have_not_reduced() -> None:
    no = Report(NAMES[0], CURRENT, True, ONE, 0, Phase.VOTING, False, entry(2, 0, b"x"))
    running = Report(NAMES[1], CURRENT, True, ONE, 0, Phase.RUNNING, None, None)
    assert resolve([no, running]).action is Action.ABORT
