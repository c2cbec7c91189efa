"""A member's rules, one test each (T1 to T5, L1 to L7 of the design); what is not allowed changes nothing."""

import copy
from collections.abc import Callable

import pytest

from everstep.core.messages import (
    Adopted,
    Effect,
    Failed,
    Grant,
    Heartbeat,
    Hello,
    Notice,
    Proposal,
    Ready,
    Refused,
    Send,
    Sever,
    Switch,
    ToMember,
    Welcome,
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
    Recover,
    Reduce,
    ReplicaConfig,
    ReplicaEvent,
    StateRecovered,
    TrainAlone,
    Vote,
    VoteCast,
    VoteEnded,
    Wait,
)
from everstep.core.recovery_plan import Claim
from everstep.core.replica import FAILED_AGAIN_S, Replica
from everstep.core.types import (
    Action,
    FailureRound,
    LocalProtocolError,
    Member,
    MemberId,
    Phase,
    Quorum,
    QuorumId,
    RefusalCode,
    genesis,
)

A, B, C = MemberId("a", 1), MemberId("b", 2), MemberId("c", 3)
FIRST = Quorum(QuorumId(1, 1), (Member(A), Member(B)), "s")
LATER = Quorum(QuorumId(1, 2), (Member(A),), "s")
GROWN = Quorum(QuorumId(1, 3), (Member(A), Member(B), Member(C)), "s")
WITHOUT_A = Quorum(QuorumId(1, 4), (Member(B),), "s")
ROUND = FailureRound(1, 1)


def welcome(member: MemberId = A) -> Welcome:
    return Welcome(member, "lh", 0.5, 2.0)


def grant(
    action: Action, *, step: int = 0, attempt: int = 0, quorum: Quorum = LATER, round_: FailureRound = ROUND
) -> Grant:
    return Grant(round_, quorum.id, whole(quorum), step, attempt, action)


def proposal(quorum: Quorum) -> Proposal:
    return Proposal(quorum.id, whole(quorum))


def sent(effects: list[Effect]) -> list[object]:
    return [effect.message for effect in effects if isinstance(effect, Send)]


class Driver(Replica):
    """A replica with a clock that stands still."""

    def __init__(self, **settings: object) -> None:
        super().__init__(ReplicaConfig(replica_id="a", nonce="n", **settings))  # type: ignore[arg-type]

    def tell(self, *events: ToMember | ReplicaEvent) -> list[Effect]:
        out: list[Effect] = []
        for event in events:
            out += self.receive(event, 1.0)
        return out


def joined(**settings: object) -> Driver:
    replica = Driver(**settings)
    replica.tell(ReadyToJoin(), LinkUp(), welcome())
    return replica


def settled(**settings: object) -> Driver:
    """A founding member at step 0, past the barrier."""
    replica = joined(**settings)
    replica.tell(Switch(FIRST.id, whole(FIRST), genesis("h"), A))
    replica.tell(BarrierEnded(FIRST.id, (Claim(genesis("h"), 0), Claim(None, 0))))
    return replica


def reduced(**settings: object) -> Driver:
    replica = settled(**settings)
    replica.tell(GradientsReduced(FIRST.id, 2, b"s"))
    return replica


def voting(is_ok: bool = True) -> Driver:
    replica = reduced()
    assert replica.cast_vote(is_ok, 1.0) is not None
    return replica


def told(replica: Driver, event: ToMember | ReplicaEvent) -> bool:
    """Whether `event` changed anything."""
    before = copy.deepcopy(vars(replica))
    effects = replica.tell(event)
    return bool(effects) or vars(replica) != before


# ---- the training thread


def test_t1_with_the_state_it_settles_when_the_barrier_ends() -> None:
    replica = settled()
    assert replica.next_move() == Reduce(FIRST, 0)


def test_t1_without_the_state_it_recovers_from_the_planned_source_first() -> None:
    replica = joined()
    replica.tell(Switch(FIRST.id, whole(FIRST)))
    assert replica.next_move() == Build(FIRST, Claim(None, 0))
    replica.tell(BarrierEnded(FIRST.id, (Claim(None, 0), Claim(genesis("h"), 2))))
    assert replica.next_move() == Recover(FIRST, 1, genesis("h"))
    assert replica.report().is_unsettled
    assert not replica.report().has_state
    replica.tell(StateRecovered(FIRST.id))
    assert replica.next_move() == Reduce(FIRST, 2)


def test_t2_the_lineage_entry_is_fixed_when_the_reduction_ends() -> None:
    replica = reduced()
    assert replica.phase is Phase.REDUCED
    assert replica.tag is not None
    assert (replica.tag.step, replica.tag.attempt, replica.tag.quorum_id) == (1, 0, FIRST.id)
    assert replica.next_move() == Vote(FIRST)


def test_t2_more_reductions_lead_back_to_running_until_the_vote() -> None:
    replica = reduced()
    replica.tell(MoreReductions())
    assert replica.next_move() == Reduce(FIRST, 0)
    assert not told(voting(), MoreReductions())


def test_t3_the_vote_carries_the_highest_proposal_or_the_quorum_itself() -> None:
    assert reduced().cast_vote(True, 1.0) == VoteCast(FIRST.id, True, FIRST.id)
    replica = reduced()
    replica.tell(proposal(WITHOUT_A), proposal(GROWN))
    assert replica.cast_vote(True, 1.0) == VoteCast(FIRST.id, True, WITHOUT_A.id)


def test_t3_a_vote_never_changes() -> None:
    replica = voting(is_ok=True)
    replica.tell(Notice(ROUND), grant(Action.VOTE), BarrierEnded(LATER.id, (Claim(genesis("h"), 0),)))
    assert replica.cast_vote(False, 1.0) == VoteCast(LATER.id, True, LATER.id)


def test_t3_below_min_replicas_it_does_not_vote_ok() -> None:
    replica = reduced(min_replicas=3)
    assert isinstance(replica.next_move(), Wait)
    replica.tell(proposal(GROWN))
    assert replica.next_move() == Vote(FIRST, must_be_no=True)


def test_t4_a_vote_of_all_commits() -> None:
    replica = voting()
    tag = replica.tag
    assert tag is not None
    replica.tell(VoteEnded(FIRST.id, True, FIRST.id, FIRST.id))
    assert replica.lineage == genesis("h").extended(tag)
    assert (replica.step, replica.attempt, replica.phase, replica.vote) == (1, 0, Phase.RUNNING, None)


def test_t4_a_no_ends_the_attempt() -> None:
    replica = voting()
    replica.tell(VoteEnded(FIRST.id, False, FIRST.id, FIRST.id))
    assert (replica.step, replica.attempt, replica.phase, replica.tag) == (0, 1, Phase.RUNNING, None)


@pytest.mark.parametrize("is_ok", [True, False])
def test_t4_a_proposal_that_all_voted_for_is_adopted_whatever_the_vote_says(is_ok: bool) -> None:
    replica = reduced()
    replica.tell(proposal(GROWN))
    replica.cast_vote(is_ok, 1.0)
    effects = replica.tell(VoteEnded(FIRST.id, is_ok, GROWN.id, GROWN.id))
    assert sent(effects) == [Adopted(GROWN.id)]
    assert not any(isinstance(effect, Sever) for effect in effects), "the old group stays open"
    assert replica.quorum == GROWN
    assert not replica.is_settled


def test_t4_nothing_is_adopted_unless_all_voted_for_the_same() -> None:
    replica = reduced()
    replica.tell(proposal(GROWN))
    replica.cast_vote(True, 1.0)
    replica.tell(VoteEnded(FIRST.id, True, FIRST.id, GROWN.id))
    assert replica.quorum == FIRST


def test_t4_who_is_not_in_the_adopted_quorum_leaves() -> None:
    replica = reduced()
    replica.tell(proposal(WITHOUT_A))
    replica.cast_vote(True, 1.0)
    assert sent(replica.tell(VoteEnded(FIRST.id, True, WITHOUT_A.id, WITHOUT_A.id))) == [Adopted(WITHOUT_A.id)]
    assert replica.has_left


def test_t5_a_failed_collective_is_reported_with_the_peer_and_again_while_nothing_happens() -> None:
    replica = reduced()
    assert sent(replica.tell(CollectiveFailed(FIRST.id, 1, "reset"))) == [Failed(FIRST.id, B, "reset")]
    assert isinstance(replica.next_move(), Wait)
    assert replica.cast_vote(True, 1.0) is None
    again = [m for m in sent(replica.tick(1.0 + FAILED_AGAIN_S)) if isinstance(m, Failed)]
    assert [m.quorum_id for m in again] == [FIRST.id]


def test_t5_a_failure_of_an_older_quorum_or_of_no_peer_of_ours_names_nobody() -> None:
    replica = settled()
    assert not told(replica, CollectiveFailed(QuorumId(1, 0), 1, "late"))
    assert sent(replica.tell(CollectiveFailed(FIRST.id, 7, "reset"))) == [Failed(FIRST.id, None, "reset")]


# ---- the link thread


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
    assert replica.cast_vote(True, 1.0) is None
    replica.tell(grant(Action.REDUCE))
    assert not told(replica, late), "nor after the Grant: it is of another quorum"


@pytest.mark.parametrize(
    "event",
    [
        StateRecovered(FIRST.id),
        GradientsReduced(LATER.id, 1, b""),
        VoteEnded(FIRST.id, True, FIRST.id, FIRST.id),
        BarrierEnded(FIRST.id, (Claim(None, 0), Claim(None, 0))),
        grant(Action.COMMIT),
        Switch(WITHOUT_A.id, whole(WITHOUT_A)),
        Refused(RefusalCode.EVICTED, "of somebody else", B, incarnation=7),
    ],
    ids=lambda event: type(event).__name__,
)
def test_what_has_no_place_changes_nothing(event: ToMember | ReplicaEvent) -> None:
    replica = settled()
    lists = dict(replica._lists)
    before = {k: v for k, v in copy.deepcopy(vars(replica)).items() if k != "_lists"}
    assert sent(replica.tell(event)) == []
    assert {k: v for k, v in vars(replica).items() if k != "_lists"} == before
    assert lists.items() <= replica._lists.items(), "a list more to know does no harm"


def test_a_vote_for_a_proposal_it_never_had_is_a_bug() -> None:
    replica = voting()
    with pytest.raises(LocalProtocolError, match="never had"):
        replica.tell(VoteEnded(FIRST.id, True, GROWN.id, GROWN.id))


def test_heartbeats_go_on_at_the_interval_of_the_welcome() -> None:
    replica = settled()
    assert replica.next_deadline() == 1.5
    (beat,) = sent(replica.tick(1.5))
    assert isinstance(beat, Heartbeat)
    deadline = replica.next_deadline()
    assert deadline is not None
    assert deadline > 1.5
    replica.tell(LinkDown())
    assert replica.next_deadline() is None


def test_alone_it_needs_no_lighthouse() -> None:
    replica = Driver()
    replica.tell(TrainAlone("h"))
    quorum = replica.quorum
    assert quorum is not None
    replica.tell(BarrierEnded(quorum.id, (Claim(replica.lineage, 0),)))
    replica.tell(GradientsReduced(quorum.id, 1, b"s"))
    assert replica.cast_vote(True, 1.0) is not None
    replica.tell(VoteEnded(quorum.id, True, quorum.id, quorum.id))
    assert replica.step == 1
