"""Every message of the link, both ways. The table in docs/protocol.md is generated from this file.

Messages are tagged MessagePack maps: a receiver ignores keys that it does not know, and a key added later needs a
default. That is the version-skew rule within one PROTOCOL_VERSION; a member of another version is refused.
"""

import dataclasses
import enum
from typing import TYPE_CHECKING

import msgspec

from everstep.core.ledger import Spent
from everstep.core.node_messages import ToNode
from everstep.core.recovery_report import RecoveryReport
from everstep.core.types import (
    Action,
    FailureRound,
    Lineage,
    Member,
    MemberId,
    Quorum,
    QuorumId,
    RefusalCode,
    Report,
    in_rank_order,
)

if TYPE_CHECKING:
    from everstep.core.events import JobEvent

PROTOCOL_VERSION = 2


class Cause(str, enum.Enum):
    """What kind of evidence says that a member failed."""

    PROCESS_EXITED = "process-exited"  # the agent that started it says so; conclusive
    LINK_CLOSED = "link-closed"  # without Goodbye, and not open again within the grace
    SILENT = "silent"  # nothing heard on an open link for the heartbeat timeout
    SUPERSEDED = "superseded"  # a newer incarnation of it said Hello
    LEFT = "left"  # said Goodbye while the others go on
    COLLECTIVE_FAILED = "collective-failed"  # a member said Failed; nobody need have died
    NO_READY = "no-ready"  # it did not answer a round within the heartbeat timeout
    BROKEN_PATH = "broken-path"  # two members cannot reach each other, though both reach the lighthouse
    STUCK = "stuck"  # its training thread stands still while the others wait for it
    OUT_OF_STEP = "out-of-step"  # it (re)connected in a state that only a round can mend


class Activity(enum.IntEnum):
    """What a member's training thread is doing."""

    STARTING = 0  # not a member yet
    COMPUTING = 1  # the script runs: forward, backward, optimizer, data
    WAITING = 2  # for a collective, or for a decision: for somebody else
    RECOVERING = 3  # fetching live state


class MembersChange(msgspec.Struct, frozen=True, array_like=True):
    """A member list: whole (`base` is None), or what differs from the list of the quorum `base`."""

    base: QuorumId | None
    removed: tuple[MemberId, ...]
    added: tuple[Member, ...]
    store: str = ""


# ---- member to lighthouse


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """First message on every (re)connected link: everything the member knows of itself.

    `report.member.incarnation` is 0 in a process that has none yet; Welcome assigns it.
    """

    report: Report
    nonce: str  # names the process: two live processes with one replica_id differ here
    store: str = ""
    recovery: str = ""
    lighthouse: str = ""  # identity that Welcome told it; "" in a fresh process
    expected_replicas: int = 0  # how many groups the first step waits for; 0: not known
    min_replicas: int = 1
    init_sync: bool = True
    start_step: int = 0  # the step a fresh process starts from (a checkpoint on disk)
    round: FailureRound = FailureRound(0, 0)
    freezes_on_notice: bool = True  # False: it answers a round only when its own collective has failed
    workers: tuple[str, ...] = ()  # the processes of its ranks, in order, as their agents name them; "": no agent


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """Answer to a Notice: frozen in this round, and what is held."""

    round: FailureRound
    report: Report


class Adopted(msgspec.Struct, frozen=True, tag="adopted"):
    """A completed vote made this proposal the member's quorum."""

    quorum_id: QuorumId


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """A collective of this quorum failed. `peer` is the member that the error names, if it names one."""

    quorum_id: QuorumId
    peer: MemberId | None = None
    detail: str = ""
    is_unreachable: bool = False  # nothing came back from its host; not: it closed the connection


class Heartbeat(msgspec.Struct, frozen=True, tag="heartbeat"):
    """Alive; with how far it is, and what its training thread is doing."""

    step: int = 0
    phase: int = 0
    activity: Activity = Activity.STARTING
    activity_s: float = 0.0  # since the training thread last moved on
    section: str = ""  # the innermost that the script has open
    steps: int = 0  # committed in this process
    longest_s: float = 0.0  # that it computed between two collectives lately
    spent: Spent = Spent()  # where the training thread's time went
    recovery: RecoveryReport | None = None  # while it fetches live state, and a little longer


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """Asks to leave at a step boundary."""


class Goodbye(msgspec.Struct, frozen=True, tag="goodbye"):
    """The process ends on purpose; its link closes next."""

    reason: str = ""
    had_state: bool = False


# ---- lighthouse to member


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """Answer to Hello: who you are, and how often to be heard."""

    member: MemberId
    lighthouse: str  # identity of the job's memory there; a member that holds state accepts no other
    heartbeat_interval_s: float
    heartbeat_timeout_s: float
    min_replicas: int = 1


class Waiting(msgspec.Struct, frozen=True, tag="waiting"):
    """Nothing to do yet, and why; for the log."""

    reason: str


class Proposal(msgspec.Struct, frozen=True, tag="proposal"):
    """The next quorum; adopted at a step boundary by a completed vote that shows MIN(p) == MAX(p)."""

    quorum_id: QuorumId
    members: MembersChange


class Switch(msgspec.Struct, frozen=True, tag="switch"):
    """To a member without state: enter this quorum now. `founder` holds the initial state of a new history."""

    quorum_id: QuorumId
    members: MembersChange
    founding: Lineage | None = None
    founder: MemberId | None = None  # None with `founding`: every member keeps its own initial state


class Notice(msgspec.Struct, frozen=True, tag="notice"):
    """Order to freeze: a failure round is open. `victims` and `cause` are for the log."""

    round: FailureRound
    victims: tuple[MemberId, ...] = ()
    cause: Cause = Cause.OUT_OF_STEP
    detail: str = ""


class Grant(msgspec.Struct, frozen=True, tag="grant"):
    """The decision of a round: the survivors' quorum and what becomes of the step they were in."""

    round: FailureRound
    quorum_id: QuorumId
    members: MembersChange
    step: int  # T: the highest committed step among the survivors
    attempt: int  # K: the highest attempt among those at T
    action: Action


class Probe(msgspec.Struct, frozen=True, tag="probe"):
    """Asks for a Heartbeat at once."""


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """Turned away. With EVICTED the process goes on as `incarnation`, without state; else it ends."""

    code: RefusalCode
    detail: str
    member: MemberId | None = None  # whom it concerns: a newer incarnation on the same link ignores it
    incarnation: int = 0


ToLighthouse = Hello | Ready | Adopted | Failed | Heartbeat | Drain | Goodbye
ToMember = Welcome | Waiting | Proposal | Switch | Notice | Grant | Probe | Refused


# ---- what machines return to their shells


class Send(msgspec.Struct, frozen=True):
    """Send `message` on each of these links (the lighthouse's links; a member has one: `()`)."""

    message: ToLighthouse | ToMember
    links: tuple[int, ...] = ()


class SendToNodes(msgspec.Struct, frozen=True):
    """The rendezvous: send `message` on each of these links."""

    message: ToNode
    links: tuple[int, ...]


class Sever(msgspec.Struct, frozen=True):
    """A member's shell: end every collective of the quorums up to this one, from whatever thread, at once."""

    up_to: QuorumId


class Exit(msgspec.Struct, frozen=True):
    """A member's shell: show what every thread is doing, and end the process; its training thread cannot."""

    reason: str


class Close(msgspec.Struct, frozen=True):
    """Close this link after what was sent on it before."""

    link: int
    reason: str


class Persist(msgspec.Struct, frozen=True):
    """Make this record durable before anything that stands after it is sent."""

    record: "JournalRecord"


class Log(msgspec.Struct, frozen=True):
    """One line for people: a state change, with its cause. `fields` are plain values."""

    event: str
    fields: dict[str, object]


@dataclasses.dataclass(frozen=True)
class Publish:
    """Append this to the job's event log."""

    event: "JobEvent"


class JournalRecord(msgspec.Struct, frozen=True):
    """All that the lighthouse must remember of a job; each record replaces the one before."""

    job_id: str
    lighthouse: str
    epoch: int
    incarnation_limit: int  # no incarnation above it was ever assigned
    history: str = ""
    current: Quorum | None = None
    proposals: tuple[Quorum, ...] = ()
    is_founding: bool = False  # `current` is the first quorum of its history
    ended: bool = False  # every member left on purpose
    leaving: tuple[MemberId, ...] = ()  # members of `current` that were asked to leave, and have not left yet
    gives_up: bool = False  # the operator gave the members' state up, and the new history is not founded yet


class Tell(msgspec.Struct, frozen=True):
    """Within a replica group: the leader to every follower, or a follower to the leader (core/group.py)."""

    message: object


Effect = Send | SendToNodes | Sever | Exit | Close | Persist | Log | Publish | Tell


def changed(new: Quorum, base: Quorum) -> MembersChange:
    """`new` as its difference from `base`."""
    old = dict.fromkeys(base.members)
    now = dict.fromkeys(new.members)
    removed = tuple(m.id for m in base.members if m not in now)
    return MembersChange(base.id, removed, tuple(m for m in new.members if m not in old), new.store)


def whole(new: Quorum) -> MembersChange:
    return MembersChange(None, (), new.members, new.store)


def applied(change: MembersChange, quorum_id: QuorumId, base: Quorum | None) -> Quorum:
    """The quorum that `change` describes; `base` is the list it differs from."""
    removed = dict.fromkeys(change.removed)
    kept = [m for m in base.members if m.id not in removed] if base is not None else []
    added = dict.fromkeys(m.id for m in change.added)
    members = in_rank_order([*(m for m in kept if m.id not in added), *change.added])
    return Quorum(quorum_id, members, change.store)
