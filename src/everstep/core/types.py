"""The nouns of the protocol: who, which quorum, which step, which weights.

Every type is an immutable value that travels on the wire as it is (msgspec, MessagePack). Types that appear often
on the wire are encoded as arrays.
"""

import enum
import functools
import hashlib
import re
from collections.abc import Iterable

import msgspec

REPLICA_ID_CHARS_MAX = 128
JOB_ID_CHARS_MAX = 128
_NATURAL = re.compile(r"(\d+)")


class LocalProtocolError(Exception):
    """We broke the protocol ourselves: a bug. Nothing was changed; let it crash the process."""


class RemoteProtocolError(Exception):
    """The other side sent something that the protocol does not allow; drop it."""


class QuorumId(msgspec.Struct, frozen=True, order=True, array_like=True):
    """Names one membership for ever; grows whenever collectives are rebuilt, also across lighthouse restarts."""

    epoch: int
    seq: int

    def __str__(self) -> str:
        return f"{self.epoch}.{self.seq}"


class FailureRound(msgspec.Struct, frozen=True, order=True, array_like=True):
    """One handling of a failure, numbered by the lighthouse."""

    epoch: int
    n: int

    def __str__(self) -> str:
        return f"{self.epoch}/{self.n}"


NO_ROUND = FailureRound(0, 0)


class RendezvousRound(msgspec.Struct, frozen=True, order=True, array_like=True):
    """One agreement of nodes on their ranks; `n` grows, and `life` names the lighthouse's memory that numbered it."""

    n: int
    life: str

    def __str__(self) -> str:
        return f"{self.n}@{self.life}"


class MemberId(msgspec.Struct, frozen=True, array_like=True):
    """A replica group's stable name and the number of this start of it."""

    replica_id: str
    incarnation: int

    def __str__(self) -> str:
        return f"{self.replica_id}#{self.incarnation}"


class Member(msgspec.Struct, frozen=True, array_like=True):
    """A member and where the others reach it: its collectives' store (`host:port`) and its recovery server (URL)."""

    id: MemberId
    store: str = ""
    recovery: str = ""


class Quorum(msgspec.Struct, frozen=True, array_like=True, dict=True):
    """An agreed membership. The position of a member is its replica_rank; `store` names who hosts the rendezvous."""

    id: QuorumId
    members: tuple[Member, ...]
    store: str = ""

    @functools.cached_property
    def member_ids(self) -> tuple[MemberId, ...]:
        return tuple(member.id for member in self.members)

    @functools.cached_property
    def _ranks(self) -> dict[MemberId, int]:
        return {member.id: rank for rank, member in enumerate(self.members)}

    def rank_of(self, member: MemberId) -> int | None:
        return self._ranks.get(member)

    def is_member(self, member: MemberId) -> bool:
        return member in self._ranks


class Phase(enum.IntEnum):
    """How far a member is within its step."""

    RUNNING = 0  # forward, backward; nothing of this attempt is reduced everywhere
    REDUCED = 1  # holds the averaged gradient, has not voted
    VOTING = 2  # has voted; the vote is a promise


class Action(enum.IntEnum):
    """What a Grant makes the survivors do with the step they were in (DESIGN 4.3)."""

    REDUCE = 0  # reduce the kept local gradients again over the survivors
    VOTE = 1  # everybody holds the same averaged gradient: vote in the new quorum
    COMMIT = 2  # everybody voted ok: it is committed, no second vote
    ABORT = 3  # somebody voted no: the attempt counts on no member


class LineageEntry(msgspec.Struct, frozen=True, array_like=True):
    """One committed step, fixed when its reduction ended: normal, late and granted commit append the same entry."""

    step: int
    attempt: int
    quorum_id: QuorumId
    contributors: int  # how many members of the quorum put gradients in
    samples: bytes = b""  # digest of who they are and of their sample ids (a list would be long in every Ready)


class Lineage(msgspec.Struct, frozen=True, array_like=True):
    """Hash chain over committed steps; equal lineages mean equal weights. Starts with a history id."""

    history: str
    step: int
    digest: bytes

    def extended(self, entry: LineageEntry) -> "Lineage":
        """The lineage after `entry` is committed; raises LocalProtocolError unless it is the very next step."""
        if entry.step != self.step + 1:
            raise LocalProtocolError(f"entry of step {entry.step} cannot follow step {self.step}")
        digest = hashlib.blake2b(self.digest + _encode_entry(entry), digest_size=16).digest()
        return Lineage(self.history, entry.step, digest)

    def __str__(self) -> str:
        return f"{self.history}:{self.step}:{self.digest.hex()[:8]}"


def genesis(history: str, step: int = 0) -> Lineage:
    """The lineage before the first committed step of a history (step > 0 when it continues from a checkpoint)."""
    return Lineage(history, step, hashlib.blake2b(f"{history}/{step}".encode(), digest_size=16).digest())


class Report(msgspec.Struct, frozen=True, array_like=True):
    """What a member says of itself in Hello and Ready. `lineage` is None while it holds no state."""

    member: MemberId
    quorum_id: QuorumId | None
    is_unsettled: bool  # frozen, or between quorums: it needs the lighthouse to go on
    lineage: Lineage | None
    attempt: int
    phase: Phase
    vote: bool | None
    tag: LineageEntry | None
    voted_for: QuorumId | None = None  # the proposal that its vote carried, while it is VOTING
    keeps_gradients: bool = True

    @property
    def has_state(self) -> bool:
        return self.lineage is not None

    @property
    def step(self) -> int:
        return self.lineage.step if self.lineage else -1


class RefusalCode(str, enum.Enum):
    """Why the lighthouse turns somebody away. EVICTED, BUSY and STRANGER let the same process go on."""

    EVICTED = "evicted"  # a grant left it out; it goes on under a new incarnation, without state
    REPLICA_ID_TAKEN = "replica-id-taken"  # by another live process
    WRONG_JOB = "wrong-job"  # not served here, or no job id at all
    STRANGER = "stranger"  # holds state of this job that this lighthouse knows nothing of
    BAD_VERSION = "bad-version"  # another PROTOCOL_VERSION, or no client of ours
    BAD_TOKEN = "bad-token"  # wrong or missing, on either side
    BAD_CONFIG = "bad-config"  # settings that contradict each other; a journal that cannot be used
    DRAINED = "drained"  # the others went on without it, as it or the operator asked
    STUCK = "stuck"  # its training thread stood still while the others waited; the process ends
    CRASH_LOOP = "crash-loop"  # its processes died again and again at one place
    BUSY = "busy"  # no room for another job, or it is just starting anew; try again
    JOB_ENDED = "job-ended"  # every member left while it was joining or away; or the operator gave its state up


def natural_key(text: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that orders `node2` before `node10`."""
    parts = _NATURAL.split(text)
    return tuple((0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts if p)


def in_rank_order(members: Iterable[Member]) -> tuple[Member, ...]:
    """Members as they stand in a quorum: natural order of replica_id, then incarnation."""
    return tuple(sorted(members, key=lambda m: (natural_key(m.id.replica_id), m.id.replica_id, m.id.incarnation)))


_encoder = msgspec.msgpack.Encoder()


def _encode_entry(entry: LineageEntry) -> bytes:
    return _encoder.encode(entry)
