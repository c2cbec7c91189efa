"""The leader's machine: the member's rules of replica.py, where an event happened once it happened on every rank.

    barrier ended, gradients reduced                       fed to the rules when all ranks have reported it
    state recovered                                        when all ranks have fetched it; then they apply it
    vote                                                   ok if every rank's ballot is; cast when all are in
    collective failed, drain                               at once, whichever rank says so
    Ready (answer to a Notice)                             when all ranks have severed their collectives
    heartbeat, Hello                                       while every rank is heard: the group lives as a whole
    Goodbye                                                when all ranks have left

What a rank reports names the quorum, step and attempt it is about, so that a late report changes nothing.
"""

import msgspec

from everstep.core.group import (
    AllLeft,
    Ballot,
    Began,
    Decided,
    FromRank,
    Outcome,
    RankBeat,
    RankDecides,
    RankDrains,
    RankFailed,
    RankFroze,
    RankLeaves,
    RankReady,
    RankRecovered,
    RankReduced,
    RankReopened,
    RankSettled,
    StepKey,
    ToLeader,
    View,
)
from everstep.core.messages import Effect, Heartbeat, Send, Sever, Tell, ToMember
from everstep.core.moves import (
    Applied,
    Apply,
    AskToLeave,
    BarrierEnded,
    CollectiveFailed,
    Deciding,
    GradientsReduced,
    Leave,
    LinkUp,
    MoreReductions,
    Move,
    Prepare,
    Prepared,
    ReadyToJoin,
    Recover,
    Reduce,
    ReplicaConfig,
    ReplicaEvent,
    StateRecovered,
    TrainAlone,
    Vote,
    VoteCast,
    Wait,
)
from everstep.core.recovery_report import RecoveryReport
from everstep.core.replica import Replica
from everstep.core.tally import OWN, Tally
from everstep.core.types import LocalProtocolError, Phase, Quorum, QuorumId
from everstep.core.vouching import Vouching

DIVIDED = "the ranks of this group came to the vote differently: some skipped the step"


class Leader(Replica):
    """Of a group of `group_size` ranks, at least two. Its followers are connected from the start."""

    def __init__(self, config: ReplicaConfig, group_size: int, now: float) -> None:
        super().__init__(config)
        self.group_size = group_size
        self._tally = Tally()
        self._ranks_ready: set[int] = set()
        self._ranks_left: dict[int, str] = {}
        self._vouching = Vouching(range(1, group_size), now)
        self._is_alone = False  # without a lighthouse
        self._severed: QuorumId | None = None
        self._holds_average = False
        self._shown: View | None = None
        self._shown_quorum: Quorum | None = None
        self._batches = 0
        self._deciding: dict[int, bool] = {}  # who has come to the vote on this batch, and whether it wants a Prepare
        self._is_divided = False  # some do, some do not
        self._is_reopened = False  # by a rank, while a round was open
        self._prepares = 0
        self._prepared = 0  # by this rank
        self._has_to_apply = False  # every rank has its part of the state; this one has yet to put it in place

    # ---- the machine contract

    def receive(self, event: ToMember | ReplicaEvent | FromRank, now: float) -> list[Effect]:
        if isinstance(event, FromRank):
            return self._finish(self._from_rank(event.rank, event.message, now), now)
        return self._finish(self._from_own(event, now), now)

    def tick(self, now: float) -> list[Effect]:
        return self._finish(super().tick(now), now)

    def heartbeat(self, now: float) -> Heartbeat:
        """The group's."""
        return self._vouching.heartbeat(super().heartbeat(now))

    def show_recovery(self, report: RecoveryReport, now: float) -> list[Effect]:
        return self._finish(super().show_recovery(report, now), now)

    # ---- what the training thread asks

    @property
    def has_reduced(self) -> bool:
        return OWN in self._tally.reduced or super().has_reduced

    @property
    def has_everyone_left(self) -> bool:
        return len(self._ranks_left) == self.group_size

    def next_move(self) -> Move:
        move, tally = super().next_move(), self._tally
        if self._has_to_apply:
            return Apply()
        if self._prepared < self._prepares:
            return Prepare()
        if isinstance(move, Recover) and OWN in tally.recovered:
            return Wait("the other ranks of this group to recover")
        is_voting = isinstance(move, Vote) or (isinstance(move, Reduce) and OWN in tally.reduced)
        if self._is_divided and isinstance(move, Vote) and len(tally.ballots) == self.group_size:
            return Vote(move.quorum, must_be_no=True)
        if is_voting and self._deciding.get(OWN, False) and not tally.is_prepared:
            return Wait("the other ranks' reductions")
        if is_voting and OWN in tally.ballots and (isinstance(move, Reduce) or len(tally.ballots) < self.group_size):
            return Wait("the other ranks' votes")
        if isinstance(move, Reduce) and is_voting:
            return Vote(move.quorum)  # this rank's part of it need not wait for the others' reductions
        return move

    def cast_ballot(self, objection: str) -> tuple[VoteCast | None, list[Effect]]:
        tally = self._tally
        if self.is_frozen or not self.is_settled or self._doubt_at is not None or not self.has_reduced:
            return None, []
        if not (self._is_divided and OWN in tally.ballots):
            tally.ballots[OWN] = objection
        if self.phase is not Phase.REDUCED or len(tally.ballots) < self.group_size:
            return None, []
        self.objection = tally.objection()
        return self.cast_vote(not self.objection), []

    def begin_batch(self) -> list[Effect]:
        self._batches += 1
        self.objection, self._is_divided, self._is_reopened = "", False, False
        self._deciding.clear()
        return [Tell(Began(self._batches, self.batch))]

    def end_batch(self, outcome: Outcome) -> list[Effect]:
        return [Tell(Decided(self._batches, outcome))]

    # ---- events

    def _from_own(self, event: ToMember | ReplicaEvent, now: float) -> list[Effect]:
        tally = self._tally
        match event:
            case ReadyToJoin():
                return self._rank_ready(OWN, now)
            case BarrierEnded(quorum_id):
                tally.barrier = event
                return self._rank_settled(OWN, quorum_id, now)
            case StateRecovered(quorum_id):
                return self._rank_recovered(OWN, quorum_id, now)
            case GradientsReduced(quorum_id, contributors, samples, shares):
                if tally.key is None or quorum_id != tally.key.quorum_id:
                    return []
                return self._rank_reduced(OWN, RankReduced(tally.key, contributors, samples, shares), now)
            case MoreReductions():
                return self._rank_reopened(OWN, self._batches, now)
            case Deciding(together):
                self._deciding[OWN] = together
                return []
            case Prepared():
                self._prepared += 1
                return []
            case Applied():
                self._has_to_apply = False
                return []
            case AskToLeave():
                return self._drain(event, now)
            case TrainAlone():
                self._is_alone = True
            case Leave(reason):
                return self._rank_leaves(OWN, reason, now)
        return super().receive(event, now)

    def _from_rank(self, rank: int, message: ToLeader, now: float) -> list[Effect]:
        if not 0 < rank < self.group_size:
            raise LocalProtocolError(f"a message of rank {rank} in a group of {self.group_size}")
        self._vouching.heard(rank, now)
        match message:
            case RankBeat():
                self._vouching.beat(rank, message)
                return []
            case RankFroze(round_):
                self._vouching.froze(rank, round_)
                return []
            case RankReady():
                return self._rank_ready(rank, now)
            case RankSettled(quorum_id):
                return self._rank_settled(rank, quorum_id, now)
            case RankRecovered(quorum_id):
                return self._rank_recovered(rank, quorum_id, now)
            case RankReduced():
                return self._rank_reduced(rank, message, now)
            case RankReopened(number):
                return self._rank_reopened(rank, number, now)
            case RankDecides(number, together):
                if number == self._batches:
                    self._deciding[rank] = together
                return []
            case Ballot(key, objection):
                if key == self._tally.key:
                    self._tally.ballots[rank] = objection
                return []
            case RankFailed(quorum_id, peer, detail, is_unreachable):
                failed = CollectiveFailed(quorum_id, peer, f"rank {rank}: {detail}", is_unreachable)
                return super().receive(failed, now)
            case RankDrains(grace_s):
                return self._drain(AskToLeave(grace_s), now)
            case RankLeaves(reason):
                return self._rank_leaves(rank, reason, now)
        raise LocalProtocolError(f"unknown message {message!r}")

    def _rank_ready(self, rank: int, now: float) -> list[Effect]:
        self._ranks_ready.add(rank)
        return super().receive(ReadyToJoin(), now) if len(self._ranks_ready) == self.group_size else []

    def _rank_settled(self, rank: int, quorum_id: QuorumId, now: float) -> list[Effect]:
        tally = self._tally
        if quorum_id != tally.quorum_id:
            return []
        tally.settled.add(rank)
        if len(tally.settled) < self.group_size or tally.barrier is None:
            return []
        return super().receive(tally.barrier, now)

    def _rank_recovered(self, rank: int, quorum_id: QuorumId, now: float) -> list[Effect]:
        tally = self._tally
        if quorum_id != tally.quorum_id:
            return []
        tally.recovered.add(rank)
        if len(tally.recovered) < self.group_size or self.lineage is not None:
            return []
        out = super().receive(StateRecovered(quorum_id), now)
        self._has_to_apply |= self.lineage is not None
        return [*out, *self._send(self.heartbeat(now))]  # the group's recovery has ended

    def _rank_reduced(self, rank: int, report: RankReduced, now: float) -> list[Effect]:
        tally = self._tally
        if report.key != tally.key or self.is_frozen:
            return []
        tally.reduced[rank] = report
        if len(tally.reduced) < self.group_size:
            return []
        contributors = tally.reduced[OWN].contributors
        return super().receive(GradientsReduced(report.key.quorum_id, contributors, tally.samples()), now)

    def _rank_reopened(self, rank: int, number: int, now: float) -> list[Effect]:
        if number != self._batches:
            return []
        self._tally.reduced.pop(rank, None)
        self._tally.ballots.pop(rank, None)
        self._tally.is_prepared = False
        self._is_reopened = self.is_frozen  # what was reported stands for the round; then the step goes on from here
        return super().receive(MoreReductions(), now)

    def _drain(self, event: AskToLeave, now: float) -> list[Effect]:
        if self._is_alone:  # there is nobody to ask
            self.has_left = True
            return []
        return super().receive(event, now)

    def _rank_leaves(self, rank: int, reason: str, now: float) -> list[Effect]:
        self._ranks_left[rank] = reason
        if not self.has_everyone_left:
            return []
        return [*super().receive(Leave(self._ranks_left[OWN]), now), Tell(AllLeft())]

    # ---- after every event

    def _finish(self, effects: list[Effect], now: float) -> list[Effect]:
        """Turn to the new quorum or try, keep back what needs every rank, and show the followers what changed."""
        self._vouching.interval_s = self._beat_interval_s
        if self._is_reopened and not self.is_frozen:
            # First: then all ranks reduce again, also one whose report of what it added came while this one was frozen.
            self._is_reopened = False
            effects = [*effects, *super().receive(MoreReductions(), now)]
        self._turn_tally()
        self._let_prepare()
        out: list[Effect] = []
        for effect in effects:
            if isinstance(effect, Sever):
                self._severed = effect.up_to if self._severed is None else max(self._severed, effect.up_to)
            if not isinstance(effect, Send) or self._vouching.may_send(effect, now):
                out.append(effect)
        if self._is_up:
            out += self._vouching.due_ready(self.round, self.member)
            if self._vouching.takes_hello(now):
                out += super().receive(LinkUp(), now)
        view = self._view()
        if view != self._shown:
            # The followers have the quorum of the last view already.
            shown = view if self.quorum != self._shown_quorum else msgspec.structs.replace(view, quorum=None)
            self._shown, self._shown_quorum = view, self.quorum
            out.append(Tell(shown))
        return out

    def _turn_tally(self) -> None:
        tally, quorum = self._tally, self.quorum
        quorum_id = quorum.id if quorum is not None else None
        if quorum_id != tally.quorum_id:
            tally.quorum_id, tally.barrier = quorum_id, None
            tally.settled.clear()
            tally.recovered.clear()
            self._holds_average = self.phase is not Phase.RUNNING
        key = (
            StepKey(quorum_id, self.step, self.attempt) if quorum_id is not None and self.lineage is not None else None
        )
        if key != tally.key:
            tally.key = key
            tally.ballots.clear()
            if self.phase is Phase.RUNNING:  # else the average outlived the change of the quorum
                tally.reduced.clear()
                tally.is_prepared = False

    def _let_prepare(self) -> None:
        """When all ranks have reduced and come to the vote: from here on every one runs what comes before it."""
        wishes = self._deciding
        if len(wishes) < self.group_size or not any(wishes.values()):
            return
        self._is_divided = not all(wishes.values())
        if self._is_divided:  # on one rank a GradScaler found infinities, say: nobody can wait for it in a collective
            self._tally.ballots |= {rank: DIVIDED for rank, together in wishes.items() if together}
            return
        # Not before all have settled: a rank that waits for the others' barriers runs nothing.
        is_due = self.phase is Phase.REDUCED and self.vote is None and self.is_settled and not self.is_frozen
        if is_due and not self._tally.is_prepared and not self.has_left:
            self._tally.is_prepared = True
            self._prepares += 1

    def _view(self) -> View:
        return View(
            member=self.member,
            lighthouse=self.lighthouse,
            round=self.round,
            severed=self._severed,
            quorum_id=self.quorum.id if self.quorum is not None else None,
            quorum=self.quorum,
            lineage=self.lineage,
            attempt=self.attempt,
            evictions=self.evictions,
            is_settled=self.is_settled,
            is_frozen=self.is_frozen,
            is_in_doubt=self._doubt_at is not None,
            has_left=self.has_left or OWN in self._ranks_left,
            holds_average=self._holds_average,
            prepares=self._prepares,
            is_prepared=self._tally.is_prepared,
            plan=self.plan,
            refusal=self.refusal,
            waiting_for=self.waiting_for,
            beat_interval_s=self._beat_interval_s,
        )
