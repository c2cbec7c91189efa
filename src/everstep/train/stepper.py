"""Follows the machine's moves on the training thread: settles quorums, reduces, votes, until a step is decided.

The script's thread is the only one here. Collectives end early when the link thread severs them; then the machine says
how to go on, and nothing that was computed is computed again.
"""

import dataclasses
import time
from collections.abc import Callable

import torch

from everstep.collectives.process_group import ReduceOp
from everstep.collectives.step_journal import Reduction, StepJournal
from everstep.core.group import Beginning, Outcome
from everstep.core.messages import Activity, Effect
from everstep.core.moves import (
    Applied,
    Apply,
    Build,
    Deciding,
    GradientsReduced,
    MoreReductions,
    Move,
    Prepare,
    Prepared,
    ReadyToJoin,
    Recover,
    Reduce,
    Vote,
    VoteCast,
    VoteEnded,
    Wait,
)
from everstep.core.types import MemberId, Quorum, QuorumId
from everstep.errors import GroupDrained
from everstep.train.header import Contribution, HeaderCarrier, StepHeader
from everstep.train.phases import REDUCTION, VOTE
from everstep.train.presence import Presence
from everstep.train.recovering import Recovery
from everstep.train.settling import WAIT_SLICE_S, Settler, reporting

SAY_WAITING_AFTER_S = 1.0


@dataclasses.dataclass(frozen=True)
class Decision:
    """How a step ended; when it committed, who contributed what, in rank order."""

    committed: bool
    step: int
    why: str
    contributions: dict[MemberId, Contribution] = dataclasses.field(default_factory=dict)

    @property
    def participants(self) -> int:
        return len(self.contributions)


class Stepper:
    """`begin` opens a step, `append` reduces something in it, `decide` ends it."""

    def __init__(self, presence: Presence, recovery: Recovery, contribution: Callable[[], Contribution]) -> None:
        self._presence = presence
        self._recovery = recovery
        self._settler = Settler(presence, recovery)
        self._contribution = contribution
        self._journal = StepJournal()
        self._header: StepHeader | None = None
        self._begun: Beginning | None = None
        self._before_vote: Callable[[], str] = lambda: ""
        self._is_prepared = False  # before_vote ran for the reduction at hand
        self._objection = ""
        self._has_asked_to_join = False
        self._said = ""  # what it was last said to wait for

    # ---- what the rest of train/ calls

    @property
    def is_open(self) -> bool:
        """Something was reduced, or is being reduced, since the last decision."""
        return self._begun is not None and len(self._journal) > 0

    @property
    def replays(self) -> int:
        return self._journal.replays

    @property
    def contributions(self) -> tuple[Contribution, ...]:
        """Everybody's, once the step is reduced."""
        return tuple(self._header.contributions.values()) if self._header is not None else ()

    def drawn_among(self) -> Beginning:
        """Whom the batch at hand was begun with; before that, whom it would be begun with now."""
        with self._presence.changed:
            return self._begun or self._presence.replica.beginning()

    def begin(self) -> None:
        """Be a settled member that holds the state: joins, recovers, builds as needed. Cheap when nothing is to do.

        A follower begins what its leader has begun, settled or not: the leader's script may wait for this one's.
        """
        if self._begun is not None:
            return
        replica = self._presence.replica
        with self._presence.changed:
            if self._presence.leaves_alone or (replica.has_left and not replica.has_begun):
                raise GroupDrained
        if not self._has_asked_to_join:
            self._has_asked_to_join = True
            self._presence.feed(ReadyToJoin())
        self._drive(lambda move: isinstance(move, Reduce) or replica.has_begun)
        self._begun = self._presence.begin_batch()

    def append(self, reduction: Reduction) -> None:
        """Add a reduction to the step and, where the group is up, issue it at once."""
        self.begin()
        if self._header is None:
            self._header = StepHeader(self._contribution())
            if not (isinstance(reduction, HeaderCarrier) and reduction.carry(self._header)):
                self._journal.append(self._header)
        self._journal.append(reduction)
        self._is_prepared = False
        with self._presence.changed:
            self._reopen()
            move = self._presence.replica.next_move()
            if self._is_decided():
                return
        if not isinstance(move, Reduce) or self._journal.issued_in not in (None, move.quorum.id):
            return  # a failure is being handled: the journal is issued when it is resolved
        self._journal.enter(move.quorum.id)
        with reporting(self._presence, move.quorum.id):
            self._journal.issue_pending(self._presence.group, move.quorum)

    def complete(self) -> None:
        """Block until every reduction so far has its result in place, or the step is decided against this batch."""
        replica = self._presence.replica
        self._drive(lambda _: replica.has_reduced and not replica.is_frozen)

    def wait_for(self, reduction: Reduction) -> None:
        """Block until this one (and those before it) is in place; more may follow in the step."""
        position = self._journal.position(reduction)
        self._drive(lambda _: self._journal.has_finished(position), until=lambda: self._journal.has_finished(position))

    def decide(self, before_vote: Callable[[], str], objection: str = "", *, together: bool = False) -> Decision:
        """Vote, and follow whatever happens, until the step is committed or aborted on every member.

        `before_vote` runs once for every completed reduction; what it returns, if anything, is why to vote no. With
        `together` it does so on all ranks of this group: there may be collectives among them in it.
        """
        self.begin()
        if self._header is None:
            self._header = StepHeader(self._contribution())
            self._journal.append(self._header)
            with self._presence.changed:
                self._reopen()
        self._before_vote, self._objection = before_vote, objection
        if self._presence.group_size > 1:
            self._presence.feed(Deciding(together))
        self._drive(lambda _: False)
        decision = self._close()
        if decision.committed:
            self._presence.steps_file.count(decision.step)
        return decision

    # ---- the loop

    def _drive(self, is_reached: Callable[[Move], bool], until: Callable[[], bool] | None = None) -> None:
        """Make moves until `is_reached`, or until the batch at hand is decided."""
        waiting_since = 0.0
        self._mark(Activity.WAITING)
        while True:
            self._presence.check()
            with self._presence.changed:
                move = self._presence.replica.next_move()
                self._presence.replica.book(move, time.monotonic())
                if not isinstance(move, Prepare | Apply):
                    if self._is_decided() or is_reached(move):
                        self._mark(Activity.COMPUTING)
                        return
                    if self._presence.replica.has_left:
                        raise GroupDrained
                if isinstance(move, Vote) and not self._journal.is_finished:
                    self._presence.feed(MoreReductions())  # one was added while a failure was being handled
                    continue
                if isinstance(move, Wait):
                    waiting_since = self._wait(move, waiting_since)
                    continue
            waiting_since = 0.0
            self._make(move, until)

    def _mark(self, activity: Activity) -> None:
        self._presence.replica.mark(activity, time.monotonic())
        self._presence.phases.mark(activity)

    def _make(self, move: Move, until: Callable[[], bool] | None) -> None:
        match move:
            case Build(quorum, claim):
                with reporting(self._presence, quorum.id):
                    self._settler.settle(quorum, claim)
            case Recover():
                self._mark(Activity.RECOVERING)
                self._settler.fetch(move)
                self._mark(Activity.WAITING)
            case Apply():
                self._mark(Activity.RECOVERING)
                self._settler.apply()
                self._presence.feed(Applied())
                self._mark(Activity.WAITING)
            case Reduce(quorum):
                self._presence.phases.enter(REDUCTION)
                with reporting(self._presence, quorum.id):
                    self._reduce(quorum, until)
            case Prepare():
                self._prepare()
                self._presence.feed(Prepared())
            case Vote(quorum, must_be_no):
                with reporting(self._presence, quorum.id):
                    self._vote(quorum, must_be_no)

    def _wait(self, move: Wait, since: float) -> float:
        """Under the lock, which waiting gives up."""
        now = time.monotonic()
        if since == 0.0:
            since, self._said = now, ""
        elif now - since >= SAY_WAITING_AFTER_S and move.why != self._said:
            self._said = move.why
            self._presence.log.warning("waiting for %s", move.why)
        self._presence.changed.wait(WAIT_SLICE_S)
        return since

    def _reduce(self, quorum: Quorum, until: Callable[[], bool] | None) -> None:
        journal = self._journal
        if not journal.reductions:
            return
        journal.enter(quorum.id)
        journal.issue_pending(self._presence.group, quorum)
        journal.wait(until)
        if not journal.is_finished:
            return
        assert self._header is not None
        self._is_prepared = False
        contributors = len(self._header.contributions)
        shares = self._header.shares() if self._presence.group_size > 1 else b""
        self._presence.feed(GradientsReduced(quorum.id, contributors, self._header.digest(len(journal)), shares))

    def _prepare(self) -> None:
        self._mark(Activity.COMPUTING)
        if not self._objection or self._presence.group_size > 1:
            objection = self._before_vote()
            self._objection = self._objection or objection
        self._mark(Activity.WAITING)
        self._is_prepared = True

    def _vote(self, quorum: Quorum, must_be_no: bool) -> None:
        if not self._is_prepared and not (must_be_no and self._presence.group_size > 1):
            self._prepare()
        if must_be_no:
            self._objection = self._objection or f"{len(quorum.members)} replica groups are fewer than min_replicas"
        cast: list[VoteCast] = []

        def cast_vote(_: float) -> list[Effect]:
            promise, effects = self._presence.replica.cast_ballot(self._objection)
            if promise is not None:
                cast.append(promise)
            return effects

        self._presence.run(cast_vote)
        if not cast:
            return
        self._presence.phases.enter(VOTE)
        number = _number(cast[0].proposal)
        vote = torch.tensor([int(cast[0].is_ok), number, -number], dtype=torch.int64)
        self._presence.group.allreduce(vote, ReduceOp.MIN).wait()
        is_ok, lowest, highest = vote.tolist()
        self._presence.feed(VoteEnded(quorum.id, bool(is_ok), _quorum_id(lowest), _quorum_id(-highest)))

    # ---- decisions

    def _is_decided(self) -> bool:
        """Under the lock: the machine has moved past the batch at hand."""
        return self._begun is not None and self._begun.batch != self._presence.replica.batch

    def _reopen(self) -> None:
        """Under the lock: one more reduction belongs to a step that looked complete."""
        if self._presence.replica.has_reduced:
            self._presence.feed(MoreReductions())

    def _close(self) -> Decision:
        assert self._begun is not None
        batch, header = self._begun.batch, self._header
        with self._presence.changed:
            replica = self._presence.replica
            is_committed = replica.evictions == batch.evictions and replica.step == batch.step + 1
            step = replica.step
            is_evicted = replica.evictions != batch.evictions
        why = "" if is_committed else self._why_not(is_evicted)
        outcome = self._presence.agree(Outcome(is_committed, step, why))
        contributions = header.contributions if header is not None and outcome.committed else {}
        self._journal.clear()
        self._header, self._begun, self._objection, self._is_prepared = None, None, "", False
        self._presence.phases.step_ended()
        if outcome.committed:
            self._recovery.withdraw()
        return Decision(outcome.committed, outcome.step, outcome.why, contributions)

    def _why_not(self, is_evicted: bool) -> str:
        if is_evicted:
            return "this member was left out of the quorum while it was away; it recovers the state from its peers"
        return self._presence.replica.objection or self._objection or "another member voted no"


def _number(quorum_id: QuorumId) -> int:
    """Ids as integers that compare alike, for the vote."""
    return quorum_id.epoch << 32 | quorum_id.seq


def _quorum_id(number: int) -> QuorumId:
    return QuorumId(number >> 32, number & 0xFFFFFFFF)
