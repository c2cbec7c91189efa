"""What happens in a job, for whoever wants to know: a bounded, numbered log, and where a reader stands in it.

A reader gets every event once and in order. Its cursor names the stream and the last number that it has; a cursor that
the log cannot continue (it fell behind, or the lighthouse restarted) is told so, with the state as it is now, instead
of being given a silent gap. Events are information: only a round's Notice freezes a member.
"""

import collections
import enum
import itertools
import re
from collections.abc import Iterable

import msgspec

from everstep.core.messages import Cause, Publish
from everstep.core.types import FailureRound, MemberId, Quorum

NAMES_MAX = 64  # in one event; the snapshot of a resync names every member
_CURSOR = re.compile(r"([0-9a-zA-Z_.-]{1,80})-(\d{1,18})")


class EventKind(str, enum.Enum):
    """What an event says."""

    RESYNC = "resync"  # the reader's past is not here: this is the state now (`snapshot`), and why (`evidence`)
    LIGHTHOUSE_STARTED = "lighthouse-started"
    MEMBER_WAITING = "member-waiting"  # a group said Hello and waits to be let in
    JOB_FOUNDED = "job-founded"  # the first quorum of a new history
    QUORUM_PROPOSED = "quorum-proposed"  # who comes and who goes at the next step boundary
    QUORUM_CHANGED = "quorum-changed"  # another membership trains from here on
    ROUND_OPENED = "round-opened"  # the members freeze and say how far they are
    MEMBER_FAILED = "member-failed"  # evidence against a member; a later quorum-changed without it makes it final
    MEMBER_CLEARED = "member-cleared"  # it answered after all
    MEMBER_EVICTED = "member-evicted"  # left out for good, under this incarnation
    DRAIN_ASKED = "drain-asked"  # a member is going to leave at a step boundary
    GROUP_HELD = "group-held"  # it dies again and again at one place: it waits before it is let in
    GROUP_LEFT_OUT = "group-left-out"  # it did so too often: it is turned away until the operator admits it
    MEMBER_LEFT = "member-left"  # on purpose; nobody aborts anything
    HISTORY_LOST = "history-lost"  # nobody holds the state any more
    JOB_ENDED = "job-ended"  # every member left
    RENDEZVOUS_COMPLETED = "rendezvous-completed"  # the nodes of `group` agree on ranks; `members`, in rank order
    RENDEZVOUS_DISSOLVED = "rendezvous-dissolved"  # that round is over, and why
    RENDEZVOUS_FAILED = "rendezvous-failed"  # too few nodes came in time
    RENDEZVOUS_CLOSED = "rendezvous-closed"  # a node closed it for all
    NODE_EVICTED = "node-evicted"  # `node` was silent in a complete round; it is told when it is heard of again

    NODE_EXCLUDED = "node-excluded"  # a script on `node` asked for it: it stays out until the operator admits it
    NODE_ADMITTED = "node-admitted"  # the operator did
    RECOVERY_STARTED = "recovery-started"  # a member fetches the live state of `step` from `donors`
    RECOVERY_RETRIED = "recovery-retried"  # connections failed: at the first, and each time that `retries` has doubled
    RECOVERY_DIGEST_ERROR = "recovery-digest-error"  # something arrived damaged, and is fetched again; told likewise
    RECOVERY_ENDED = "recovery-ended"  # `outcome`: done, failed or cut-short; and how much, how long, how often

    RANK_SUSPECTED = "rank-suspected"  # `rank` of `node` is past its soft deadline
    RANK_CLEARED = "rank-cleared"  # it moves on
    RANK_HUNG = "rank-hung"  # it is past its hard deadline, and is being ended; `culprit`: whom the others wait for


FAILURES = frozenset({EventKind.MEMBER_FAILED})


class JobEvent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One entry of a job's event log; what a field does not apply to is left at its default.

    `cursor` continues a subscription after this event; `at` is Unix time on the lighthouse's clock, for people;
    `cause` and `evidence` say why a member is held to have failed.
    """

    kind: EventKind
    job_id: str = ""
    cursor: str = ""
    at: float = 0.0
    replica_id: str = ""
    incarnation: int = 0
    quorum_id: str = ""
    round: str = ""
    cause: Cause | None = None
    evidence: str = ""
    member_count: int = 0  # of the quorum
    members: tuple[str, ...] = ()  # of the quorum, as `replica_id#incarnation`, in rank order; the first NAMES_MAX
    joined: tuple[str, ...] = ()  # the first NAMES_MAX
    left: tuple[str, ...] = ()  # the first NAMES_MAX
    step: int | None = None
    action: str = ""
    snapshot: dict[str, object] | None = None
    group: str = ""  # of a rendezvous
    node: str = ""  # whom a rendezvous event is about
    rank: str = ""  # as in `rank 3`, or `rank 3 of group g`
    section: str = ""  # of the rank, that is open for too long
    age_s: float = 0.0  # for how long
    culprit: str = ""  # the rank of the node that the others wait for, where it can be told
    waiting: tuple[str, ...] = ()  # ranks that wait for it
    stacks: str = ""  # of the rank, cut to a bound
    donors: tuple[str, ...] = ()  # of a recovery, those that still serve it
    done_bytes: int = 0
    total_bytes: int = 0
    seconds: float = 0.0  # since the recovery began
    retries: int = 0
    digest_errors: int = 0
    transport: str = ""
    outcome: str = ""

    @property
    def member(self) -> str:
        return f"{self.replica_id}#{self.incarnation}" if self.replica_id else ""


def of_member(
    kind: EventKind,
    member: MemberId,
    *,
    quorum: Quorum | None = None,
    cause: Cause | None = None,
    evidence: str = "",
) -> Publish:
    return Publish(
        JobEvent(
            kind=kind,
            replica_id=member.replica_id,
            incarnation=member.incarnation,
            quorum_id=str(quorum.id) if quorum is not None else "",
            cause=cause,
            evidence=evidence,
        )
    )


def of_quorum(
    kind: EventKind,
    quorum: Quorum,
    before: Quorum | None,
    *,
    round_id: FailureRound | None = None,
    step: int | None = None,
    action: str = "",
) -> Publish:
    """`quorum`, and how it differs from the one before."""
    joined = (m for m in quorum.member_ids if before is None or not before.is_member(m))
    left = (m for m in before.member_ids if not quorum.is_member(m)) if before is not None else iter(())
    return Publish(
        JobEvent(
            kind=kind,
            quorum_id=str(quorum.id),
            round=str(round_id) if round_id is not None else "",
            member_count=len(quorum.members),
            members=_names(quorum.member_ids),
            joined=_names(joined),
            left=_names(left),
            step=step,
            action=action,
        )
    )


def _names(members: Iterable[MemberId]) -> tuple[str, ...]:
    return tuple(str(m) for m in itertools.islice(members, NAMES_MAX))


class EventLog:
    """The newest `kept_max` events of one life of a job at its lighthouse. `stream` names that life."""

    def __init__(self, job_id: str, stream: str, kept_max: int) -> None:
        self._job_id = job_id
        self._stream = stream
        self._events: collections.deque[JobEvent] = collections.deque(maxlen=kept_max)
        self._last = 0

    @property
    def cursor(self) -> str:
        """Where a reader stands that has read everything."""
        return f"{self._stream}-{self._last}"

    @property
    def oldest_cursor(self) -> str:
        """Where a reader stands that has still to read everything that is kept."""
        return f"{self._stream}-{self._last - len(self._events)}"

    def append(self, event: JobEvent, at: float) -> JobEvent:
        self._last += 1
        entry = msgspec.structs.replace(event, job_id=self._job_id, cursor=self.cursor, at=round(at, 6))
        self._events.append(entry)
        return entry

    def after(self, cursor: str, count_max: int) -> list[JobEvent] | None:
        """The next events after `cursor`, oldest first; None when the log cannot continue it."""
        match = _CURSOR.fullmatch(cursor)
        if match is None or match[1] != self._stream:
            return None
        behind = self._last - int(match[2])
        if not 0 <= behind <= len(self._events):
            return None
        start = len(self._events) - behind
        return list(itertools.islice(self._events, start, start + count_max))

    def resync(self, why: str, snapshot: dict[str, object], at: float) -> JobEvent:
        """For a reader that cannot continue: the state now, under the cursor to go on from. Not kept."""
        return JobEvent(
            kind=EventKind.RESYNC,
            job_id=self._job_id,
            cursor=self.cursor,
            at=round(at, 6),
            evidence=why,
            snapshot=snapshot,
        )
