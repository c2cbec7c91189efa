"""A member's training thread, rule by rule (T1 to T5 of the design); what has no place changes nothing."""

import copy

import pytest

from everstep.core.messages import (
    Activity,
    Adopted,
    Failed,
    Heartbeat,
    Notice,
    Refused,
    Sever,
    Switch,
    ToMember,
    whole,
)
from everstep.core.moves import (
    AskToLeave,
    BarrierEnded,
    Build,
    CollectiveFailed,
    GradientsReduced,
    LinkDown,
    MoreReductions,
    Recover,
    Reduce,
    ReplicaEvent,
    StateRecovered,
    TrainAlone,
    Vote,
    VoteCast,
    VoteEnded,
    Wait,
)
from everstep.core.recovery_plan import Claim
from everstep.core.replica import FAILED_AGAIN_S
from everstep.core.types import (
    Action,
    LocalProtocolError,
    Phase,
    QuorumId,
    RefusalCode,
    genesis,
)
from tests.core.member import (
    FIRST,
    GROWN,
    LATER,
    ROUND,
    WITHOUT_A,
    A,
    B,
    Driver,
    grant,
    joined,
    proposal,
    reduced,
    sent,
    settled,
    told,
    voting,
)


def test_it_waits_in_a_collective_in_every_phase_and_while_frozen_for_the_lighthouse() -> None:
    for replica in (settled(), reduced(), voting()):
        since = [replica.waits_since]
        replica.mark(Activity.WAITING, 7.0)
        since.append(replica.waits_since)
        replica.tell(Notice(ROUND))
        since.append(replica.waits_since)
        assert since == [None, 7.0, None]
    assert settled().patience_s == 2.0


def test_t1_with_the_state_it_settles_when_the_barrier_ends() -> None:
    replica = settled()
    assert replica.next_move() == Reduce(FIRST, 0)


def test_t1_without_the_state_it_recovers_from_the_planned_source_first() -> None:
    replica = joined()
    replica.tell(Switch(FIRST.id, whole(FIRST)))
    assert replica.next_move() == Build(FIRST, Claim(None, 0))
    replica.tell(BarrierEnded(FIRST.id, (Claim(None, 0), Claim(genesis("h"), 2))))
    assert replica.next_move() == Recover(FIRST, 1, genesis("h"), (1,))
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
    assert reduced().cast_vote(True) == VoteCast(FIRST.id, True, FIRST.id)
    replica = reduced()
    replica.tell(proposal(WITHOUT_A), proposal(GROWN))
    assert replica.cast_vote(True) == VoteCast(FIRST.id, True, WITHOUT_A.id)


def test_t3_a_vote_never_changes() -> None:
    replica = voting(is_ok=True)
    replica.tell(Notice(ROUND), grant(Action.VOTE), BarrierEnded(LATER.id, (Claim(genesis("h"), 0),)))
    assert replica.cast_vote(False) == VoteCast(LATER.id, True, LATER.id)


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
    replica.cast_vote(is_ok)
    effects = replica.tell(VoteEnded(FIRST.id, is_ok, GROWN.id, GROWN.id))
    assert sent(effects) == [Adopted(GROWN.id)]
    assert not any(isinstance(effect, Sever) for effect in effects), "the old group stays open"
    assert replica.quorum == GROWN
    assert not replica.is_settled


def test_t4_nothing_is_adopted_unless_all_voted_for_the_same() -> None:
    replica = reduced()
    replica.tell(proposal(GROWN))
    replica.cast_vote(True)
    replica.tell(VoteEnded(FIRST.id, True, FIRST.id, GROWN.id))
    assert replica.quorum == FIRST


def test_t4_who_is_not_in_the_adopted_quorum_leaves() -> None:
    replica = reduced()
    replica.tell(proposal(WITHOUT_A))
    replica.cast_vote(True)
    assert sent(replica.tell(VoteEnded(FIRST.id, True, WITHOUT_A.id, WITHOUT_A.id))) == [Adopted(WITHOUT_A.id)]
    assert replica.has_left


def test_t5_a_failed_collective_is_reported_with_the_peer_and_again_while_nothing_happens() -> None:
    replica = reduced()
    assert sent(replica.tell(CollectiveFailed(FIRST.id, 1, "reset"))) == [Failed(FIRST.id, B, "reset")]
    assert isinstance(replica.next_move(), Wait)
    assert replica.cast_vote(True) is None
    again = [m for m in sent(replica.tick(1.0 + FAILED_AGAIN_S)) if isinstance(m, Failed)]
    assert [m.quorum_id for m in again] == [FIRST.id]


def test_t5_a_failure_of_an_older_quorum_or_of_no_peer_of_ours_names_nobody() -> None:
    replica = settled()
    assert not told(replica, CollectiveFailed(QuorumId(1, 0), 1, "late"))
    assert sent(replica.tell(CollectiveFailed(FIRST.id, 7, "reset"))) == [Failed(FIRST.id, None, "reset")]


@pytest.mark.parametrize("how", ["left out", "out of time"])
def test_who_leaves_from_within_a_collective_lets_go_of_it(how: str) -> None:
    """The meeting of those who lend live state has no deadline, and the others may be out of reach."""
    replica = settled()
    replica.tell(AskToLeave(grace_s=5.0))
    if how == "left out":
        effects = replica.tell(Refused(RefusalCode.EVICTED, "it was away", A, incarnation=7))
    else:
        effects = replica.tick(9.0)
    assert replica.has_left
    assert Sever(FIRST.id) in effects
    assert not told(replica, CollectiveFailed(FIRST.id, None, "severed")), "nobody asks it any more"


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
    assert replica.cast_vote(True) is not None
    replica.tell(VoteEnded(quorum.id, True, quorum.id, quorum.id))
    assert replica.step == 1
