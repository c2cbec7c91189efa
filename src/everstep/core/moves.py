"""What passes between a member's machine and its own process: settings, events, and moves for the training thread."""

import dataclasses

from everstep.core.recovery_plan import Claim
from everstep.core.types import Lineage, Quorum, QuorumId


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplicaConfig:
    """`nonce` is a random name of the process; the addresses are those that the other members reach it at."""

    replica_id: str
    nonce: str
    store: str = ""
    recovery: str = ""
    expected_replicas: int = 0
    min_replicas: int = 1
    init_sync: bool = True
    start_step: int = 0
    keeps_gradients: bool = True
    freezes_on_notice: bool = True  # EVERSTEP_PROACTIVE_RECOVERY
    workers: tuple[str, ...] = ()  # as in Hello
    collective_timeout_s: float = 300.0  # a collective that takes longer has failed, though nobody said so


# ---- moves: what the training thread does next


@dataclasses.dataclass(frozen=True)
class Wait:
    """Nothing to do until the link thread changes something."""

    why: str


@dataclasses.dataclass(frozen=True)
class Build:
    """Build this quorum's collectives; exchange `claim` as their first operation; then BarrierEnded."""

    quorum: Quorum
    claim: Claim


@dataclasses.dataclass(frozen=True)
class Recover:
    """Fetch the live state of `lineage` from the members of ranks `donors`, `source` first; then StateRecovered."""

    quorum: Quorum
    source: int
    lineage: Lineage
    donors: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Reduce:
    """Issue every reduction of the step that has not completed in this quorum; then GradientsReduced."""

    quorum: Quorum
    attempt: int


@dataclasses.dataclass(frozen=True)
class Vote:
    """Call `cast_vote` and issue what it returns; then VoteEnded."""

    quorum: Quorum
    must_be_no: bool = False


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Run what the script does before the vote, now, whatever else has happened: the other ranks of this group do.

    It may contain collectives of the script's own among these ranks, which must match; then Prepared.
    """


@dataclasses.dataclass(frozen=True)
class Apply:
    """Put the state that this rank has fetched in place, now, whatever else has happened: all ranks of this group do.

    Before that, meet the donors where they lend: none of them is let go before every rank has its part. Then Applied.
    A group of one rank does both as soon as it has fetched.
    """


Move = Wait | Build | Recover | Reduce | Vote | Prepare | Apply


@dataclasses.dataclass(frozen=True)
class VoteCast:
    """The vote to issue: an allreduce with MIN over `[ok, p, -p]`."""

    quorum_id: QuorumId
    is_ok: bool
    proposal: QuorumId


# ---- events


@dataclasses.dataclass(frozen=True)
class LinkUp:
    """The link is open and authenticated."""


@dataclasses.dataclass(frozen=True)
class LinkDown:
    """It closed; what is not said yet will be said by the next Hello."""


@dataclasses.dataclass(frozen=True)
class ReadyToJoin:
    """The process has imported, built and registered what it trains: nobody will wait for that once it is in."""


@dataclasses.dataclass(frozen=True)
class BarrierEnded:
    """The first operation of the new quorum ended; everybody's claims in rank order."""

    quorum_id: QuorumId
    claims: tuple[Claim, ...]


@dataclasses.dataclass(frozen=True)
class StateRecovered:
    """Every byte of the state that the plan names is verified, and applied; of several ranks: kept until Apply."""

    quorum_id: QuorumId


@dataclasses.dataclass(frozen=True)
class GradientsReduced:
    """All reductions of the step completed in this quorum; `samples` digests who contributed what.

    `shares` is what of it must be the same on every rank of a group.
    """

    quorum_id: QuorumId
    contributors: int
    samples: bytes = b""
    shares: bytes = b""


@dataclasses.dataclass(frozen=True)
class MoreReductions:
    """The step has another reduction after all: it is not reduced yet."""


@dataclasses.dataclass(frozen=True)
class Deciding:
    """In a group of several ranks: this one adds nothing to the step any more. `together`: it wants a Prepare."""

    together: bool


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a Prepare asked for has run on this rank."""


@dataclasses.dataclass(frozen=True)
class Applied:
    """What an Apply asked for is done on this rank."""


@dataclasses.dataclass(frozen=True)
class VoteEnded:
    """The vote's result: everybody's ok, and the lowest and highest proposal that was voted for."""

    quorum_id: QuorumId
    is_ok: bool
    lowest: QuorumId
    highest: QuorumId


@dataclasses.dataclass(frozen=True)
class CollectiveFailed:
    """An operation of this quorum (its building included) failed; `peer` is the rank that the error names."""

    quorum_id: QuorumId
    peer: int | None = None
    detail: str = ""
    is_unreachable: bool = False  # nothing came back from the peer's host; not: it closed the connection


@dataclasses.dataclass(frozen=True)
class AskToLeave:
    """Leave at a step boundary (drain). After `grace_s` (0: never) without one it leaves as it is."""

    grace_s: float = 0.0


@dataclasses.dataclass(frozen=True)
class Leave:
    """The process ends on purpose, now."""

    reason: str = ""


@dataclasses.dataclass(frozen=True)
class TrainAlone:
    """No lighthouse is configured: a quorum of one, without network."""

    history: str


ReplicaEvent = (
    LinkUp
    | LinkDown
    | ReadyToJoin
    | BarrierEnded
    | StateRecovered
    | GradientsReduced
    | MoreReductions
    | Deciding
    | Prepared
    | Applied
    | VoteEnded
    | CollectiveFailed
    | AskToLeave
    | Leave
    | TrainAlone
)
