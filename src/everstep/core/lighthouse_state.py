"""What the lighthouse knows of one job: its settings, and the part of its state that the journal carries."""

import dataclasses

from everstep.core.broken_paths import BrokenPaths
from everstep.core.crash_loop import CrashPolicy
from everstep.core.failure_detector import DetectorPolicy
from everstep.core.messages import Cause, Effect, JournalRecord, Persist
from everstep.core.progress import StuckPolicy
from everstep.core.types import FailureRound, Member, MemberId, Quorum, QuorumId, Report, in_rank_order

STUCK_KEPT_MAX = 1000
INCARNATIONS_RESERVED = 1000  # reserved in the journal at a time, so that a start costs no write of its own


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobConfig:
    """Settings of one job at its lighthouse. Durations in seconds; identity and history are random names."""

    job_id: str
    lighthouse: str
    history: str
    min_replicas: int = 1
    join_timeout_s: float = 10.0
    heartbeat_interval_s: float = 0.5
    heartbeat_timeout_s: float = 2.0
    link_grace_s: float = 0.02
    leave_grace_s: float = 0.2
    stuck_timeout_s: float | None = None  # None: learned from the job's steps
    stuck_floor_s: float = 10.0
    stuck_initial_s: float = 300.0
    crash_loop_limit: int = (
        8  # deaths in a row at one place, before a group is left out; 0: that, and pauses before it, are off
    )
    path_pause_s: float = 10.0  # that a member first stays out for which there is no path to another
    return_timeout_s: float = 10.0  # after a restart of the lighthouse: members have this long to connect again

    @property
    def detector_policy(self) -> DetectorPolicy:
        return DetectorPolicy(
            heartbeat_timeout_s=self.heartbeat_timeout_s,
            link_grace_s=self.link_grace_s,
            ask_before_s=self.heartbeat_timeout_s / 8,
        )

    @property
    def crash_policy(self) -> CrashPolicy:
        return CrashPolicy(limit=self.crash_loop_limit)

    @property
    def stuck_policy(self) -> StuckPolicy:
        return StuckPolicy(timeout_s=self.stuck_timeout_s, floor_s=self.stuck_floor_s, initial_s=self.stuck_initial_s)


@dataclasses.dataclass
class OpenRound:
    """One handling of a failure, from the first evidence to the Grant."""

    id: FailureRound
    deadline: float  # who has not answered then becomes a suspect
    opened_at: float
    missing: dict[MemberId, None]
    reports: dict[MemberId, Report] = dataclasses.field(default_factory=dict)
    noticed: dict[MemberId, None] = dataclasses.field(default_factory=dict)
    reported_why: str = ""


class JobState:
    """Mutable state of one job, shared by the parts of the lighthouse machine; no behaviour but bookkeeping."""

    def __init__(self, config: JobConfig, record: JournalRecord | None) -> None:
        self.config = config
        self.is_new = record is None
        self.lighthouse = record.lighthouse if record else config.lighthouse
        self.epoch = (record.epoch if record else 0) + 1
        self.seq = 0
        self.rounds = 0
        self.history = record.history if record else ""
        self.current: Quorum | None = record.current if record else None
        self.proposals: dict[QuorumId, Quorum] = {q.id: q for q in record.proposals} if record else {}
        # The newest proposal, while every member of the current quorum has been sent it.
        self.wanted = next(reversed(self.proposals.values())) if self.proposals else None
        self.is_founding = record.is_founding if record else False
        self.ended = record.ended if record else False
        self.gives_up = record.gives_up if record else False
        # Groups that hold state which this lighthouse knows nothing of: no history is founded beside theirs.
        self.strangers: dict[str, None] = {}
        self.incarnation_limit = record.incarnation_limit if record else 0
        self._incarnation = self.incarnation_limit
        self.round: OpenRound | None = None
        self.paths = BrokenPaths(config.path_pause_s)
        self.suspects: dict[MemberId, Cause] = {}
        self.evicted: dict[str, int] = {}  # highest evicted incarnation of each replica_id
        self.stuck: dict[MemberId, None] = {}  # evicted so, and perhaps not told yet; the newest STUCK_KEPT_MAX
        self.held: dict[MemberId, float] = {}  # joiners that are let in no earlier than that
        self.leaving: dict[MemberId, None] = {m: None for m in record.leaving if self.is_current(m)} if record else {}
        self.departed: dict[MemberId, bool] = {}  # who of known_members said Goodbye, and whether it held the state
        self.left_out: dict[MemberId, Cause] = {}  # by the last Grant, and not looked at by the AgentDesk yet
        self.failures = 0
        self._known_of: tuple[QuorumId | None, ...] = (None,)
        self._known: dict[MemberId, Member] = {}

    @property
    def known_members(self) -> dict[MemberId, Member]:
        """Members of the current quorum and of every outstanding proposal, in a fixed order."""
        key = (self.current.id if self.current else None, *self.proposals)
        if key != self._known_of:  # asked for with every message, while quorums change seldom
            members = {m.id: m for m in self.current.members} if self.current else {}
            for proposal in self.proposals.values():
                for member in proposal.members:
                    members.setdefault(member.id, member)
            self._known_of, self._known = key, members
        return self._known

    def is_current(self, member: MemberId) -> bool:
        return self.current is not None and self.current.is_member(member)

    def list_of(self, quorum_id: QuorumId) -> Quorum | None:
        if self.current is not None and self.current.id == quorum_id:
            return self.current
        return self.proposals.get(quorum_id)

    def new_quorum(self, members: dict[MemberId, Member], store: str = "") -> Quorum:
        """A quorum under the next id. `store` defaults to the first member's."""
        self.seq += 1
        ordered = in_rank_order(members.values())
        return Quorum(QuorumId(self.epoch, self.seq), ordered, store or ordered[0].store)

    def new_round_id(self) -> FailureRound:
        self.rounds += 1
        return FailureRound(self.epoch, self.rounds)

    def new_incarnation(self, out: list[Effect]) -> int:
        """Never used before, in this life of the lighthouse or an earlier one."""
        self._incarnation += 1
        if self._incarnation > self.incarnation_limit:
            self.incarnation_limit = self._incarnation - 1 + INCARNATIONS_RESERVED
            out.append(self.persist())
        return self._incarnation

    def persist(self) -> Persist:
        return Persist(
            JournalRecord(
                job_id=self.config.job_id,
                lighthouse=self.lighthouse,
                epoch=self.epoch,
                incarnation_limit=self.incarnation_limit,
                history=self.history,
                current=self.current,
                proposals=tuple(self.proposals.values()),
                is_founding=self.is_founding,
                ended=self.ended,
                leaving=tuple(self.leaving),
                gives_up=self.gives_up,
            )
        )

    @property
    def how_to_give_up(self) -> str:
        """What an operator can do when the state that members hold is lost to this lighthouse."""
        job = self.config.job_id
        return f"`everstep new-history --job {job}` gives that state up; then start the groups again"

    def forget_quorums(self) -> None:
        """Nobody is a member any more."""
        self.current, self.round, self.wanted = None, None, None
        self.is_founding = False
        self.proposals.clear()
        self.suspects.clear()
        self.departed.clear()
        self.leaving.clear()

    def evict(self, member: MemberId) -> None:
        self.evicted[member.replica_id] = max(member.incarnation, self.evicted.get(member.replica_id, 0))

    def condemn(self, member: MemberId) -> None:
        self.stuck[member] = None
        if len(self.stuck) > STUCK_KEPT_MAX:
            del self.stuck[next(iter(self.stuck))]

    def is_evicted(self, member: MemberId) -> bool:
        return member.incarnation <= self.evicted.get(member.replica_id, 0)
