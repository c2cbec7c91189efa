"""Follows the machine's moves on the training thread: settles quorums, reduces, votes, until a step is decided.

The script's thread is the only one here. Collectives end early when the link thread severs them; then the machine says
how to go on, and nothing that was computed is computed again.
"""

import dataclasses
import time
from collections.abc import Callable

import torch

from everstep.collectives.process_group import Membership, ReduceOp
from everstep.collectives.step_journal import Reduction, StepJournal
from everstep.core.group import Batch, Outcome
from everstep.core.messages import Activity, Effect
from everstep.core.moves import (
    Applied,
    Apply,
    BarrierEnded,
    Build,
    CollectiveFailed,
    Deciding,
    GradientsReduced,
    MoreReductions,
    Move,
    Prepare,
    Prepared,
    ReadyToJoin,
    Recover,
    Reduce,
    StateRecovered,
    Vote,
    VoteCast,
    VoteEnded,
    Wait,
)
from everstep.core.recovery_plan import Claim
from everstep.core.types import MemberId, Quorum, QuorumId
from everstep.errors import GroupDrained, PeerLost, RecoveryFailed, StepInterrupted
from everstep.train.claims import check_sizes, pack, unpack
from everstep.train.header import Contribution, HeaderCarrier, StepHeader
from everstep.train.phases import REDUCTION, VOTE
from everstep.train.presence import Presence
from everstep.train.recovering import Recovery
from everstep.train.transports import Roll, check_same_transport

WAIT_SLICE_S = 0.5  # so that Python runs signal handlers while it waits
SAY_WAITING_AFTER_S = 1.0
FETCH_AGAIN_S = (0.05, 2.0)


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
        self._contribution = contribution
        self._journal = StepJournal()
        self._header: StepHeader | None = None
        self._batch: Batch | None = None
        self._before_vote: Callable[[], str] = lambda: ""
        self._is_prepared = False  # before_vote ran for the reduction at hand
        self._objection = ""
        self._has_asked_to_join = False
        self._said = ""  # what it was last said to wait for
        self._fetch_again_s = FETCH_AGAIN_S[0]
        self._roll: Roll | None = None  # where each member's rank of this group rank serves its state
        self._meets = False  # every member of the quorum: when the joiners have the state, before anybody goes on

    # ---- what the rest of train/ calls

    @property
    def is_open(self) -> bool:
        """Something was reduced, or is being reduced, since the last decision."""
        return self._batch is not None and len(self._journal) > 0

    @property
    def replays(self) -> int:
        return self._journal.replays

    @property
    def contributions(self) -> tuple[Contribution, ...]:
        """Everybody's, once the step is reduced."""
        return tuple(self._header.contributions.values()) if self._header is not None else ()

    def begin(self) -> None:
        """Be a settled member that holds the state: joins, recovers, builds as needed. Cheap when nothing is to do."""
        if self._batch is not None:
            return
        with self._presence.changed:
            if self._presence.replica.has_left or self._presence.leaves_alone:
                raise GroupDrained
        if not self._has_asked_to_join:
            self._has_asked_to_join = True
            self._presence.feed(ReadyToJoin())
        self._drive(lambda move: isinstance(move, Reduce))
        self._batch = self._presence.begin_batch()

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
        self._try(move.quorum.id, lambda: self._journal.issue_pending(self._presence.group, move.quorum))

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
                self._try(quorum.id, lambda: self._settle(quorum, claim))
            case Recover():
                self._mark(Activity.RECOVERING)
                self._fetch(move)
                self._mark(Activity.WAITING)
            case Apply():
                self._mark(Activity.RECOVERING)
                self._recovery.apply()
                self._presence.feed(Applied())
                self._mark(Activity.WAITING)
            case Reduce(quorum):
                self._presence.phases.enter(REDUCTION)
                self._try(quorum.id, lambda: self._reduce(quorum, until))
            case Prepare():
                self._prepare()
                self._presence.feed(Prepared())
            case Vote(quorum, must_be_no):
                self._try(quorum.id, lambda: self._vote(quorum, must_be_no))

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

    def _try(self, quorum_id: QuorumId, operate: Callable[[], None]) -> None:
        try:
            operate()
        except PeerLost as error:
            self._presence.feed(CollectiveFailed(quorum_id, error.peer, _first_line(error)))
        except StepInterrupted as error:
            self._presence.feed(CollectiveFailed(quorum_id, None, _first_line(error)))

    def _settle(self, quorum: Quorum, claim: Claim) -> None:
        presence = self._presence
        if claim.lineage is not None:
            self._recovery.check_whole()
        with presence.changed:
            rank = presence.replica.rank
        if rank is None:
            return
        group = presence.group
        membership = Membership(
            quorum_id=quorum.id,
            rank=rank,
            size=len(quorum.members),
            store=quorum.store,
            timeout_s=presence.replica.config.collective_timeout_s,
            prefix=presence.rank_prefix,
        )
        group.configure(membership)
        gathered = group.allgather(pack(presence.rank_claim(claim)))
        claims = tuple(map(unpack, gathered))
        check_sizes(claims, rank)
        check_same_transport(claims, rank)
        addresses = tuple(c.recovery or m.recovery for c, m in zip(claims, quorum.members, strict=True))
        self._roll = Roll(quorum=quorum, rank=rank, addresses=addresses, prefix=presence.rank_prefix)
        self._meets = all(c.meets for c in claims)
        presence.feed(BarrierEnded(quorum.id, tuple(c.claim for c in claims)))
        with presence.changed:
            replica = presence.replica
            while replica.awaits_plan and replica.quorum == quorum:  # for the other ranks of this group
                presence.check()
                presence.changed.wait(WAIT_SLICE_S)
            is_current = replica.quorum is not None and replica.quorum.id == quorum.id
            plan = replica.plan if is_current and not replica.is_frozen else None
        if plan is not None:
            group.release_previous()
            presence.replica.open_section("snapshot")
            self._recovery.offer(self._roll, plan, is_lent=self._meets)
            presence.replica.close_section(time.monotonic())
            if self._meets and plan.source_of and rank not in plan.source_of:
                self._recovery.await_joiners()

    def _fetch(self, move: Recover) -> None:
        quorum_id = move.quorum.id
        try:
            assert self._roll is not None
            self._recovery.fetch(move, self._roll)
        except StepInterrupted:
            return  # frozen: the machine has left this quorum already
        except RecoveryFailed as error:
            self._presence.log.warning("recovery failed: %s; trying again in %.2f s", error, self._fetch_again_s)
            self._presence.feed(CollectiveFailed(quorum_id, move.source, f"recovery: {_first_line(error)}"))
            with self._presence.changed:
                self._presence.changed.wait(self._fetch_again_s)
            self._fetch_again_s = min(2 * self._fetch_again_s, FETCH_AGAIN_S[1])
            return
        self._fetch_again_s = FETCH_AGAIN_S[0]
        self._try(quorum_id, lambda: self._take_over(quorum_id))

    def _take_over(self, quorum_id: QuorumId) -> None:
        """The state is here, whole: let go of who lent it, and go on with it."""
        if self._meets:
            self._recovery.meet()
        if self._presence.group_size == 1:
            self._recovery.apply()
        self._presence.feed(StateRecovered(quorum_id))

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
        return self._batch is not None and self._batch != self._presence.replica.batch

    def _reopen(self) -> None:
        """Under the lock: one more reduction belongs to a step that looked complete."""
        if self._presence.replica.has_reduced:
            self._presence.feed(MoreReductions())

    def _close(self) -> Decision:
        batch, header = self._batch, self._header
        assert batch is not None
        with self._presence.changed:
            replica = self._presence.replica
            is_committed = replica.evictions == batch.evictions and replica.step == batch.step + 1
            step = replica.step
            is_evicted = replica.evictions != batch.evictions
        why = "" if is_committed else self._why_not(is_evicted)
        outcome = self._presence.agree(Outcome(is_committed, step, why))
        contributions = header.contributions if header is not None and outcome.committed else {}
        self._journal.clear()
        self._header, self._batch, self._objection, self._is_prepared = None, None, "", False
        self._presence.phases.step_ended()
        if outcome.committed:
            self._recovery.withdraw()
        return Decision(outcome.committed, outcome.step, outcome.why, contributions)

    def _why_not(self, is_evicted: bool) -> str:
        if is_evicted:
            return "this member was left out of the quorum while it was away; it recovers the state from its peers"
        return self._presence.replica.objection or self._objection or "another member voted no"


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]


def _number(quorum_id: QuorumId) -> int:
    """Ids as integers that compare alike, for the vote."""
    return quorum_id.epoch << 32 | quorum_id.seq


def _quorum_id(number: int) -> QuorumId:
    return QuorumId(number >> 32, number & 0xFFFFFFFF)
