"""A member's link thread, rule by rule (L1 to L7 of the design)."""

from collections.abc import Callable

import pytest

from everstep.core.messages import (
    Failed,
    Grant,
    Hello,
    Notice,
    Ready,
    Refused,
    Sever,
    Switch,
    whole,
)
from everstep.core.moves import (
    BarrierEnded,
    Build,
    CollectiveFailed,
    GradientsReduced,
    LinkDown,
    LinkUp,
    MoreReductions,
    ReadyToJoin,
    ReplicaEvent,
    VoteEnded,
    Wait,
)
from everstep.core.recovery_plan import Claim
from everstep.core.types import (
    Action,
    FailureRound,
    LocalProtocolError,
    MemberId,
    Phase,
    Quorum,
    QuorumId,
    RefusalCode,
    genesis,
)
from tests.core.member import (
    FIRST,
    GROWN,
    LATER,
    ROUND,
    A,
    Driver,
    grant,
    joined,
    proposal,
    reduced,
    sent,
    settled,
    told,
    voting,
    welcome,
)


@pytest.mark.parametrize(
    ("make", "phase"), [(settled, Phase.RUNNING), (reduced, Phase.REDUCED), (voting, Phase.VOTING)]
)
def test_l1_a_notice_freezes_severs_and_is_answered_at_once(make: Callable[[], Driver], phase: Phase) -> None:
    replica = make()
    effects = replica.tell(Notice(ROUND))
    assert Sever(FIRST.id) in effects
    (ready,) = sent(effects)
    assert isinstance(ready, Ready)
    assert (ready.round, ready.report.phase, ready.report.is_unsettled) == (ROUND, phase, True)
    assert isinstance(replica.next_move(), Wait)


def test_l1_a_notice_of_an_older_round_changes_nothing() -> None:
    replica = settled()
    replica.tell(Notice(FailureRound(1, 2)), grant(Action.REDUCE, round_=FailureRound(1, 2)))
    assert not told(replica, Notice(ROUND))


def test_l1_without_the_state_it_leaves_the_group_and_says_so() -> None:
    replica = joined()
    replica.tell(Switch(FIRST.id, whole(FIRST)))
    effects = replica.tell(Notice(ROUND))
    (ready,) = sent(effects)
    assert isinstance(ready, Ready)
    assert not ready.report.has_state
    assert replica.quorum is None
    assert Sever(FIRST.id) in effects


@pytest.mark.parametrize(
    ("make", "given", "step", "attempt", "phase"),
    [
        (voting, grant(Action.COMMIT), 1, 0, Phase.RUNNING),
        (voting, grant(Action.ABORT), 0, 1, Phase.RUNNING),
        (voting, grant(Action.VOTE), 0, 0, Phase.REDUCED),
        (reduced, grant(Action.VOTE), 0, 0, Phase.REDUCED),
        (voting, grant(Action.REDUCE), 0, 0, Phase.RUNNING),
        (settled, grant(Action.REDUCE), 0, 0, Phase.RUNNING),
        (voting, grant(Action.REDUCE, step=1), 1, 0, Phase.RUNNING),
        (voting, grant(Action.REDUCE, attempt=2), 0, 2, Phase.RUNNING),
    ],
    ids=[
        "commit",
        "abort",
        "vote",
        "vote, not voted yet",
        "reduce",
        "reduce, nothing yet",
        "late commit",
        "late abort",
    ],
)
def test_l2_a_grant_ends_the_round(
    make: Callable[[], Driver], given: Grant, step: int, attempt: int, phase: Phase
) -> None:
    replica = make()
    replica.tell(Notice(ROUND))
    replica.tell(given)
    assert (replica.step, replica.attempt, replica.phase) == (step, attempt, phase)
    assert replica.quorum == LATER
    assert not replica.is_frozen
    assert replica.next_move() == Build(LATER, Claim(replica.lineage, attempt))


def test_l2_a_late_commit_appends_the_entry_of_the_reduction() -> None:
    replica = voting()
    tag = replica.tag
    assert tag is not None
    replica.tell(Notice(ROUND), grant(Action.REDUCE, step=1))
    assert replica.lineage == genesis("h").extended(tag)


def test_l2_a_grant_is_taken_only_while_frozen_and_of_that_round() -> None:
    assert not told(voting(), grant(Action.COMMIT))
    replica = voting()
    replica.tell(Notice(FailureRound(1, 2)))
    assert not told(replica, grant(Action.COMMIT, round_=ROUND))


def test_l2_a_late_commit_that_was_not_promised_is_a_bug() -> None:
    replica = settled()
    replica.tell(Notice(ROUND))
    with pytest.raises(LocalProtocolError, match="late"):
        replica.tell(grant(Action.REDUCE, step=1))


def test_l2_a_grant_voids_proposals() -> None:
    replica = reduced()
    replica.tell(proposal(GROWN), Notice(ROUND), grant(Action.VOTE))
    assert not replica.has_proposal


def test_l2_a_grant_based_on_a_list_it_lacks_is_answered_with_hello() -> None:
    replica = settled()
    replica.tell(Notice(ROUND))
    change = whole(LATER).__class__(QuorumId(9, 9), (), ())
    (hello,) = sent(replica.tell(Grant(ROUND, LATER.id, change, 0, 0, Action.REDUCE)))
    assert isinstance(hello, Hello)
    assert replica.is_frozen


def test_l3_proposals_are_kept_until_the_quorum_passes_them() -> None:
    replica = settled()
    assert not replica.tell(proposal(Quorum(QuorumId(1, 1), FIRST.members)))
    assert not replica.has_proposal
    replica.tell(proposal(GROWN))
    assert replica.has_proposal


def test_l4_a_switch_is_for_those_without_the_state() -> None:
    assert not [e for e in settled().tell(Switch(GROWN.id, whole(GROWN))) if not isinstance(e, Sever)]
    replica = joined()
    replica.tell(Switch(GROWN.id, whole(GROWN)))
    assert replica.quorum == GROWN


def test_l4_a_group_that_it_severed_is_not_entered_again() -> None:
    replica = joined()
    replica.tell(Switch(FIRST.id, whole(FIRST)), LinkDown(), LinkUp(), welcome())
    (failed,) = sent(replica.tell(Switch(FIRST.id, whole(FIRST))))
    assert isinstance(failed, Failed)
    assert replica.quorum is None


def test_l5_the_evicted_goes_on_as_another_incarnation_without_the_state() -> None:
    replica = voting()
    refusal = Refused(RefusalCode.EVICTED, "left out", A, incarnation=9)
    (hello,) = sent(replica.tell(refusal))
    assert isinstance(hello, Hello)
    assert hello.report.member == MemberId("a", 9)
    assert not hello.report.has_state
    assert replica.evictions == 1
    assert not told(replica, refusal), "it concerns who it was"


def test_l5_a_welcome_from_before_the_eviction_does_not_bring_the_old_name_back() -> None:
    replica = settled()
    replica.tell(Refused(RefusalCode.EVICTED, "left out", A, incarnation=9))
    assert not told(replica, welcome(A))
    assert replica.member == MemberId("a", 9)


def test_l5_other_refusals_end_it() -> None:
    replica = joined()
    replica.tell(Refused(RefusalCode.JOB_ENDED, "too late"))
    assert replica.refusal is not None


def test_l6_hello_says_everything_each_time_the_link_comes_up() -> None:
    replica = voting()
    replica.tell(LinkDown())
    (hello,) = sent(replica.tell(LinkUp()))
    assert isinstance(hello, Hello)
    assert hello.report == replica.report()
    assert (hello.lighthouse, hello.nonce) == ("lh", "n")


def test_l6_one_hello_a_link() -> None:
    replica = Driver()
    assert sent(replica.tell(LinkUp())) == []
    assert len(sent(replica.tell(ReadyToJoin()))) == 1
    assert sent(replica.tell(ReadyToJoin())) == []


def test_l6_without_the_state_it_leaves_its_group_first() -> None:
    replica = joined()
    replica.tell(Switch(FIRST.id, whole(FIRST)), LinkDown())
    effects = replica.tell(LinkUp())
    assert effects[0] == Sever(FIRST.id)
    (hello,) = sent(effects)
    assert isinstance(hello, Hello)
    assert hello.report.quorum_id is None


@pytest.mark.parametrize(
    "late",
    [
        GradientsReduced(FIRST.id, 2, b"s"),
        VoteEnded(FIRST.id, True, FIRST.id, FIRST.id),
        VoteEnded(FIRST.id, False, FIRST.id, FIRST.id),
        BarrierEnded(FIRST.id, (Claim(genesis("h"), 0), Claim(None, 0))),
        CollectiveFailed(FIRST.id, 1, "severed"),
        MoreReductions(),
    ],
    ids=lambda event: type(event).__name__,
)
@pytest.mark.parametrize("make", [settled, reduced, voting])
def test_l7_after_a_freeze_a_late_result_changes_nothing(make: Callable[[], Driver], late: ReplicaEvent) -> None:
    replica = make()
    replica.tell(Notice(ROUND))
    assert not told(replica, late)
    assert replica.cast_vote(True) is None
    replica.tell(grant(Action.REDUCE))
    assert not told(replica, late), "nor after the Grant: it is of another quorum"
