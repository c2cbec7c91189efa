"""The state of a member's machine, and the questions it answers. `replica.py` holds what changes it."""

from everstep.core.group import Batch, Beginning
from everstep.core.ledger import Account, Ledger
from everstep.core.messages import (
    Activity,
    Effect,
    Heartbeat,
    Hello,
    MembersChange,
    Notice,
    Refused,
    Send,
    Sever,
    applied,
)
from everstep.core.moves import Build, Move, Recover, Reduce, ReplicaConfig, Vote, Wait
from everstep.core.recovery_plan import Claim, RecoveryPlan, plan_recovery
from everstep.core.recovery_report import SHOWN_S, RecoveryReport
from everstep.core.transitions import Turn, after
from everstep.core.types import (
    NO_ROUND,
    FailureRound,
    Lineage,
    LineageEntry,
    LocalProtocolError,
    MemberId,
    Phase,
    Quorum,
    QuorumId,
    Report,
)

STEPS_WARM_UP = 3  # of a process: they compile, allocate and fill caches, and say nothing of those that follow
LONGEST_DECAY = 0.99  # a step: one slow step is forgotten after some hundred
SECTION_CHARS_MAX = 64
PAUSE_S = 1.0  # a heartbeat so late says that nothing of this process ran meanwhile
BEATS_MISSED = 4  # until the lighthouse takes a member for silent
LISTS_KEPT_MAX = 16  # member lists kept so that the lighthouse may send differences


class ReplicaState:
    """Read its attributes under the lock that all calls of the machine share."""

    def __init__(self, config: ReplicaConfig) -> None:
        self.config = config
        self.member = MemberId(config.replica_id, 0)
        self.lighthouse = ""
        self.lineage: Lineage | None = None
        self.quorum: Quorum | None = None
        self.is_settled = False
        self.is_frozen = False
        self.round: FailureRound = NO_ROUND
        self.attempt = 0
        self.phase = Phase.RUNNING
        self.vote: bool | None = None
        self.voted_for: QuorumId | None = None
        self.tag: LineageEntry | None = None
        self.plan: RecoveryPlan | None = None
        self.evictions = 0
        self.has_left = False
        self.refusal: Refused | None = None
        self.min_replicas = config.min_replicas
        self.objection = ""  # why this group's ranks voted no, last; a group of one knows without
        self.waiting_for = "the lighthouse"
        self._proposals: dict[QuorumId, Quorum] = {}
        self._lists: dict[QuorumId, Quorum] = {}
        self._left_quorum: QuorumId | None = None  # the newest that it severed while it had no state
        self._is_up = False
        self._is_ready = False  # to join: no Hello before
        self.wants_to_leave = False
        self._leave_at: float | None = None
        self._put_off: Notice | None = None  # not reacted to yet: freezes_on_notice is off
        self._doubt_at: float | None = None  # a collective failed; when to report it again
        self._beat_at: float | None = None
        self._beat_interval_s = 0.0
        self._doing = (Activity.STARTING, 0.0)
        self._pause = (0.0, 0.0)  # the last: until when, and how long
        self._sections: tuple[str, ...] = ()
        self._had_section = False  # since it began to compute
        self._recovery: RecoveryReport | None = None  # the latest
        self._recovery_until = 0.0  # heartbeats carry it until then
        self.ledger = Ledger()
        self._is_disturbed = False  # by a failure, since the training thread computed last
        self._round_booked = NO_ROUND
        self._steps = 0  # committed in this process
        self._longest_s = 0.0

    # ---- what the training thread is doing: its own, and without the lock (each is one store)

    def mark(self, activity: Activity, now: float) -> None:
        """The training thread moves on. Cheap enough for every collective."""
        before, since = self._doing
        self._doing = (activity, now)
        if activity is Activity.COMPUTING:
            self._is_disturbed = False
            self.ledger.enter(Account.TRAINING, now)
        if before is not Activity.COMPUTING:
            return
        if self._steps > STEPS_WARM_UP and not self._had_section:
            self._longest_s = max(now - since, self._longest_s * LONGEST_DECAY)
        self._had_section = bool(self._sections)

    def book(self, move: Move, now: float) -> None:
        """Training thread, under the lock: where the time from now on goes, while it makes this move."""
        is_struck = self._doubt_at is not None or self.round != self._round_booked
        if is_struck and not self._is_disturbed and self.lineage is not None:
            self._is_disturbed = True
            self.ledger.rebook(Account.DETECTING, self._doing[1], now)
        self._round_booked = self.round
        self.ledger.enter(self._account_of(move), now)

    def _account_of(self, move: Move) -> Account:
        if self.lineage is None:
            return Account.WAITING if self.quorum is None else Account.RECOVERING
        if self._doubt_at is not None and not self.is_frozen:
            return Account.DETECTING
        if self.is_frozen or not self.is_settled:
            return Account.RECONFIGURING
        is_short = isinstance(move, Wait) and self.phase is Phase.REDUCED
        awaits_joiners = self.plan is not None and self.plan.source_of and self.plan.lineage.step == self.step
        if is_short or awaits_joiners:
            return Account.WAITING
        return Account.RECONFIGURING if self._is_disturbed else Account.TRAINING

    def open_section(self, name: str) -> None:
        """Until it is closed nobody counts this member's time."""
        self._had_section = True
        self._sections = (*self._sections, name)

    def close_section(self, now: float) -> None:
        self._sections = self._sections[:-1]
        if self._doing[0] is Activity.COMPUTING:
            self._doing = (Activity.COMPUTING, now)

    def heartbeat(self, now: float) -> Heartbeat:
        activity, since = self._doing
        if self._beat_at is not None and now - self._beat_at >= PAUSE_S:
            self._pause = (now, now - self._beat_at)
        paused_until, paused_s = self._pause
        if since < paused_until:
            since += paused_s  # its own lateness is held against nobody
        return Heartbeat(
            step=max(0, self.step),
            phase=int(self.phase),
            activity=activity,
            activity_s=max(0.0, now - since),
            section=self._sections[-1][:SECTION_CHARS_MAX] if self._sections else "",
            steps=self._steps,
            longest_s=self._longest_s,
            spent=self.ledger.spent(now),
            recovery=self._recovery_now(now),
        )

    def show_recovery(self, report: RecoveryReport, now: float) -> list[Effect]:
        """Any thread, under the lock: how the fetch at hand goes. Its beginning and its end are told at once."""
        is_turn = self._is_turn(report)
        return [Send(self.heartbeat(now))] if is_turn and self._beat_at is not None else []

    def _is_turn(self, report: RecoveryReport) -> bool:
        before, self._recovery = self._recovery, report
        return before is None or (before.quorum_id, before.outcome) != (report.quorum_id, report.outcome)

    def _recovery_now(self, now: float) -> RecoveryReport | None:
        """In a group it is kept until every rank has its part, and the group holds the state."""
        if self.lineage is None:
            self._recovery_until = now + SHOWN_S
        return self._recovery if now < self._recovery_until else None

    # ---- questions

    @property
    def waits_since(self) -> float | None:
        """Since when it has been waiting in collectives with others, this quorum's or one before in the same call."""
        activity, since = self._doing
        waits_for_lighthouse = self.is_frozen or self._doubt_at is not None
        if activity is not Activity.WAITING or waits_for_lighthouse or self.quorum is None:
            return None
        return since if len(self.quorum.members) > 1 else None

    @property
    def patience_s(self) -> float:
        """How long nobody asks why: as long as the lighthouse waits for a heartbeat."""
        return BEATS_MISSED * self._beat_interval_s

    @property
    def step(self) -> int:
        """Committed steps; -1 without state."""
        return self.lineage.step if self.lineage is not None else -1

    @property
    def rank(self) -> int | None:
        return self.quorum.rank_of(self.member) if self.quorum is not None else None

    @property
    def has_reduced(self) -> bool:
        """This rank's reductions of the step are complete, and it has not voted."""
        return self.phase is Phase.REDUCED

    @property
    def awaits_plan(self) -> bool:
        """The barrier has not ended on every rank of the group; nothing else happened to the quorum."""
        is_undecided = self.plan is None and not self.is_settled and self._doubt_at is None
        return is_undecided and self.quorum is not None and not self.is_frozen and not self.has_left

    @property
    def has_proposal(self) -> bool:
        return bool(self._proposals)

    def next_move(self) -> Move:
        """What the training thread does next to get its step decided."""
        if self.has_left:
            return Wait("this group has left the job")
        if self.quorum is None:
            return Wait(self.waiting_for)
        if self.is_frozen:
            return Wait(f"failure round {self.round}")
        if self._doubt_at is not None:
            return Wait("a collective failed; the lighthouse decides")
        if not self.is_settled:
            return self._move_to_settle(self.quorum)
        if self.phase is Phase.RUNNING:
            return Reduce(self.quorum, self.attempt)
        if self.phase is Phase.REDUCED:
            return self._move_to_vote(self.quorum)
        return Wait("the vote")

    def _move_to_settle(self, quorum: Quorum) -> Move:
        if self.plan is None or self.lineage is not None:
            return Build(quorum, Claim(self.lineage, self.attempt))
        rank = quorum.rank_of(self.member)
        assert rank is not None
        return Recover(quorum, self.plan.source_of[rank], self.plan.lineage, self.plan.donors_of(rank))

    def _move_to_vote(self, quorum: Quorum) -> Move:
        is_short = len(quorum.members) < self.min_replicas
        if is_short and self.vote is None and not self._proposals:
            return Wait(f"{len(quorum.members)} replica groups are fewer than min_replicas={self.min_replicas}")
        # Too few to commit, but others want in: a vote that says no lets them (T4 adopts whatever the vote says).
        return Vote(quorum, must_be_no=is_short and self.vote is None)

    @property
    def batch(self) -> Batch:
        """The try of the step that is under way."""
        return Batch(self.step, self.attempt, self.evictions)

    @property
    def has_begun(self) -> bool:
        """The leader of this group has begun the batch that is this rank's next: it must, too, whatever happened."""
        return False

    def beginning(self) -> Beginning:
        """Of a batch that this group begins now."""
        return Beginning(self.batch, self.quorum.member_ids if self.quorum is not None else (), self.member)

    def report(self) -> Report:
        return Report(
            member=self.member,
            quorum_id=self.quorum.id if self.quorum is not None else None,
            is_unsettled=self.is_frozen or not self.is_settled or self._doubt_at is not None,
            lineage=self.lineage,
            attempt=self.attempt,
            phase=self.phase,
            vote=self.vote,
            tag=self.tag,
            voted_for=self.voted_for if self.phase is Phase.VOTING else None,
            keeps_gradients=self.config.keeps_gradients,
        )

    def hello(self) -> Hello:
        config = self.config
        return Hello(
            report=self.report(),
            nonce=config.nonce,
            store=config.store,
            recovery=config.recovery,
            lighthouse=self.lighthouse,
            expected_replicas=config.expected_replicas,
            min_replicas=config.min_replicas,
            init_sync=config.init_sync,
            start_step=config.start_step,
            round=self.round,
            freezes_on_notice=config.freezes_on_notice,
            workers=config.workers,
        )

    # ---- entering and leaving quorums

    def _leave_group(self) -> list[Effect]:
        out: list[Effect] = []
        if self.quorum is not None:
            self._left_quorum = self.quorum.id
            out.append(Sever(self.quorum.id))
        self.quorum, self.plan, self._doubt_at = None, None, None
        self.is_settled = False
        self._proposals.clear()
        return out

    def _cut(self) -> list[Effect]:
        """It has left, maybe in a collective that has no deadline, and whose other ends it may not hear closing."""
        return [Sever(self.quorum.id)] if self.quorum is not None else []

    def _enter(self, quorum: Quorum) -> None:
        self.quorum, self.plan, self._doubt_at = quorum, None, None
        self.is_settled = False
        self._keep_list(quorum)
        for older in [q for q in self._proposals if q <= quorum.id]:
            del self._proposals[older]

    def _resolve(self, quorum_id: QuorumId, change: MembersChange) -> Quorum | None:
        base = self._lists.get(change.base) if change.base is not None else None
        if change.base is not None and base is None:
            return None
        quorum = applied(change, quorum_id, base)
        self._keep_list(quorum)
        return quorum

    def _plan(self, claims: tuple[Claim, ...]) -> RecoveryPlan:
        return plan_recovery(claims)

    def _keep_list(self, quorum: Quorum) -> None:
        self._lists[quorum.id] = quorum
        if len(self._lists) > LISTS_KEPT_MAX:
            del self._lists[next(iter(self._lists))]

    # ---- bookkeeping

    def _is_in_a_collective(self) -> bool:
        """Or will be: it goes on as if nothing were known until its own collective says so."""
        if self.quorum is None or len(self.quorum.members) < max(2, self.min_replicas):
            return False  # there is none that could fail
        return self.lineage is not None and not self.is_frozen and self._doubt_at is None

    def _is_live(self, quorum_id: QuorumId) -> bool:
        return (
            not self.is_frozen and self.is_settled and self.quorum is not None and quorum_id == self.quorum.id
        ) and self._doubt_at is None

    def _commit(self) -> None:
        if self.tag is None or self.lineage is None:
            raise LocalProtocolError(f"nothing to commit: {self.report()}")
        lineage = self.lineage.extended(self.tag)
        self._turn(Turn.COMMITTED)
        self.lineage = lineage
        self._steps += 1
        self._begin_attempt(0)

    def _abort(self, next_attempt: int) -> None:
        self._turn(Turn.ABORTED)
        self._begin_attempt(next_attempt)

    def _begin_attempt(self, attempt: int) -> None:
        self.attempt = attempt
        self.tag, self.vote, self.voted_for = None, None, None

    def _turn(self, turn: Turn) -> None:
        """The one place where the phase changes."""
        self.phase = after(self.phase, turn)
