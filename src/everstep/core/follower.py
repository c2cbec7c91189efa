"""A follower's machine: what the leader last showed, and which of its own results it has told the leader.

It asks the training thread for the same moves as replica.py does; only the vote of the group is the leader's alone.
A follower decides nothing: results go to the leader, and what they come to arrives as the next View.
"""

from everstep.core.group import (
    AllLeft,
    Ballot,
    Began,
    Beginning,
    Decided,
    GroupEnds,
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
    ToFollower,
    View,
)
from everstep.core.messages import Effect, Log, Sever, Tell
from everstep.core.moves import (
    Applied,
    Apply,
    AskToLeave,
    BarrierEnded,
    Build,
    CollectiveFailed,
    Deciding,
    GradientsReduced,
    Leave,
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
    Vote,
    VoteCast,
    Wait,
)
from everstep.core.recovery_report import RecoveryReport
from everstep.core.replica_state import ReplicaState
from everstep.core.types import LocalProtocolError, Phase, Quorum, QuorumId

BEAT_S = 0.125  # at least as often
IN_DOUBT = 0.0  # a follower's doubt has no deadline: the leader's has


class Follower(ReplicaState):
    """Read its attributes under the lock; only events change them. REDUCED here means that this rank has reduced."""

    def __init__(self, config: ReplicaConfig) -> None:
        super().__init__(config)
        self.min_replicas = 0  # the leader's business
        self.waiting_for = "the leader of this group"
        self.has_view = False
        self.has_everyone_left = False
        # By number: the leader may be a batch ahead, after an eviction that this rank's script has yet to notice.
        self._began: dict[int, Beginning] = {}
        self._decided: dict[int, Outcome] = {}
        self.beat_interval_s = 0.0
        self._batches_ended = 0
        self._is_together = False
        self._reopened = 0  # the batch that had one more reduction than the leader may know of
        self._prepares = 0
        self._prepared = 0  # by this rank
        self._is_prepared = False  # the reductions at hand
        self._severed: QuorumId | None = None
        self._settled_in: QuorumId | None = None
        self._recovered_in: QuorumId | None = None
        self._has_to_apply = False  # every rank has its part of the state
        self._failed_in: QuorumId | None = None
        self._balloted_for: StepKey | None = None

    # ---- the machine contract

    def receive(self, event: ToFollower | ReplicaEvent, now: float) -> list[Effect]:  # noqa: ARG002
        match event:
            case View():
                return self._show(event)
            case Began(number, batch):
                self._began[number] = Beginning(batch, self.beginning().members, self.member)
                return []
            case Decided(number, outcome):
                self._decided[number] = outcome
                return []
            case AllLeft():
                self.has_everyone_left = True
                return []
            case GroupEnds():  # the shell acts on it
                return []
        return self._from_own(event)

    def tick(self, now: float) -> list[Effect]:  # noqa: ARG002
        return []

    def next_deadline(self) -> float | None:
        return None

    def beat(self, now: float) -> RankBeat:
        """What this rank's training thread is doing, for the group's heartbeat."""
        own = self.heartbeat(now)
        self._beat_at = now + self.beat_interval_s
        return RankBeat(own.activity, own.activity_s, own.section, own.longest_s, own.recovery)

    def show_recovery(self, report: RecoveryReport, now: float) -> list[Effect]:
        return [Tell(self.beat(now))] if self._is_turn(report) else []

    @property
    def beat_after_s(self) -> float:
        """Twice in every heartbeat interval, so that the leader never takes one late beat for silence."""
        return min(BEAT_S, self.beat_interval_s / 2) if self.beat_interval_s > 0 else BEAT_S

    # ---- what the training thread asks

    def next_move(self) -> Move:
        move = super().next_move()
        if self._has_to_apply:
            return Apply()
        if self._prepared < self._prepares:
            return Prepare()
        match move:
            case Build(quorum) if self._settled_in == quorum.id:
                return Wait("the other ranks of this group to settle")
            case Recover(quorum) if self._recovered_in == quorum.id:
                return Wait("the other ranks of this group to recover")
            case Reduce() if not self.has_begun:
                return Wait("the leader of this group to begin the step")
            case Vote() if self._is_together and not self._is_prepared:
                return Wait("the other ranks' reductions")
            case Vote() if self._balloted_for == self._key:
                return Wait("the vote")
        return move

    def cast_ballot(self, objection: str) -> tuple[VoteCast | None, list[Effect]]:
        key = self._key
        if self.is_frozen or not self.is_settled or self._doubt_at is not None or key is None or not self.has_reduced:
            return None, []
        self._balloted_for = key
        return None, [Tell(Ballot(key, objection))]

    @property
    def has_begun(self) -> bool:
        """Also while `next_move` asks for something else: the leader's script may wait in a collective for this rank's.

        Until that is there the group settles in no other quorum.
        """
        return self._batch_number in self._began

    def begin_batch(self) -> Beginning:
        """The leader's batch of this number, once it `has_begun`."""
        return self._began[self._batch_number]

    def end_batch(self) -> Outcome | None:
        """How the batch ended, once the leader has said so."""
        outcome = self._decided.pop(self._batch_number, None)
        if outcome is not None:
            self._began.pop(self._batch_number, None)
            self._batches_ended += 1
            self._is_together = False
        return outcome

    @property
    def _batch_number(self) -> int:
        return self._batches_ended + 1

    # ---- events

    def _show(self, view: View) -> list[Effect]:
        if view.lineage is not None and view.lineage.step == self.step + 1:
            self._steps += 1
        if self.lineage is None and view.lineage is not None and self._recovered_in is not None:
            self._has_to_apply |= view.quorum_id == self._recovered_in  # in any other it has founded the history
        key, quorum_id, round_ = self._key, self._quorum_id, self.round
        self.has_view = True
        self.quorum = self._quorum_of(view)
        self.member, self.lighthouse, self.round = view.member, view.lighthouse, view.round
        self.lineage, self.attempt, self.evictions = view.lineage, view.attempt, view.evictions
        self.is_settled, self.is_frozen, self.plan = view.is_settled, view.is_frozen, view.plan
        self.has_left, self.refusal, self.waiting_for = view.has_left, view.refusal, view.waiting_for
        self.beat_interval_s = view.beat_interval_s
        self._prepares, self._is_prepared = view.prepares, view.is_prepared
        is_in_doubt = view.is_in_doubt or (self._failed_in is not None and self._failed_in == view.quorum_id)
        self._doubt_at = IN_DOUBT if is_in_doubt else None
        if view.quorum_id != quorum_id:
            is_reduced = view.holds_average and self._reopened != self._batch_number
            self.phase = Phase.REDUCED if is_reduced else Phase.RUNNING
        elif self._key != key:
            self.phase = Phase.RUNNING
        out: list[Effect] = []
        if view.severed is not None and (self._severed is None or view.severed > self._severed):
            self._severed = view.severed
            out.append(Sever(view.severed))
        if view.round != round_:
            out.append(Tell(RankFroze(view.round)))
        return out

    def _from_own(self, event: ReplicaEvent) -> list[Effect]:
        key = self._key
        match event:
            case ReadyToJoin():
                return [Tell(RankReady())]
            case BarrierEnded(quorum_id):
                if self.is_frozen or quorum_id != self._quorum_id:
                    return []
                self._settled_in = quorum_id
                return [Tell(RankSettled(quorum_id))]
            case StateRecovered(quorum_id):
                if quorum_id != self._quorum_id:
                    return []
                self._recovered_in = quorum_id
                return [Tell(RankRecovered(quorum_id)), Log("rank recovered", {"quorum": str(quorum_id)})]
            case GradientsReduced(quorum_id, contributors, samples, shares):
                is_live = self.is_settled and not self.is_frozen and self._doubt_at is None
                if not is_live or key is None or quorum_id != key.quorum_id:
                    return []
                self.phase, self._reopened = Phase.REDUCED, 0
                return [Tell(RankReduced(key, contributors, samples, shares))]
            case MoreReductions():
                self._reopened = self._batch_number
                if not self.is_frozen:
                    self.phase = Phase.RUNNING
                return [Tell(RankReopened(self._batch_number))]
            case Deciding(together):
                self._is_together = together
                return [Tell(RankDecides(self._batch_number, together))]
            case Prepared():
                self._prepared += 1
                return []
            case Applied():
                self._has_to_apply = False
                return []
            case CollectiveFailed(quorum_id, peer, detail, is_unreachable):
                if self.is_frozen or quorum_id != self._quorum_id:
                    return []
                self._failed_in, self._doubt_at = quorum_id, IN_DOUBT
                fields: dict[str, object] = {"quorum": str(quorum_id), "peer": peer, "detail": detail}
                return [Log("collective failed", fields), Tell(RankFailed(quorum_id, peer, detail, is_unreachable))]
            case AskToLeave(grace_s):
                self.wants_to_leave = True
                return [Tell(RankDrains(grace_s))]
            case Leave(reason):
                return [Tell(RankLeaves(reason))]
        raise LocalProtocolError(f"unknown event {event!r}")

    # ---- values

    @property
    def _quorum_id(self) -> QuorumId | None:
        return self.quorum.id if self.quorum is not None else None

    @property
    def _key(self) -> StepKey | None:
        if self.quorum is None or self.lineage is None:
            return None
        return StepKey(self.quorum.id, self.step, self.attempt)

    def _quorum_of(self, view: View) -> Quorum | None:
        if view.quorum is not None or view.quorum_id is None:
            return view.quorum
        if view.quorum_id != self._quorum_id:
            raise LocalProtocolError(f"a view of quorum {view.quorum_id}, which this rank was never shown")
        return self.quorum
