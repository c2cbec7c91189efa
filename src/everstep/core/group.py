"""What the ranks of one replica group say to each other: the leader is rank 0, the others follow it.

The leader's machine (leader.py) is the group's only member of the protocol; a follower's (follower.py) holds what the
leader last showed. All of it travels on one ordered connection a follower, which is never repaired: when it ends, the
group ends. docs/groups.md has the whole picture.
"""

import dataclasses

import msgspec

from everstep.core.messages import Activity, Refused
from everstep.core.recovery_plan import RecoveryPlan
from everstep.core.recovery_report import RecoveryReport
from everstep.core.types import FailureRound, Lineage, MemberId, Quorum, QuorumId


class StepKey(msgspec.Struct, frozen=True, array_like=True):
    """Which try of which step in which quorum; a report for another one is too late."""

    quorum_id: QuorumId
    step: int
    attempt: int


class Batch(msgspec.Struct, frozen=True, array_like=True):
    """What the gradients at hand were computed for."""

    step: int
    attempt: int
    evictions: int


@dataclasses.dataclass(frozen=True)
class Beginning:
    """Of a batch, as it was when the group's script began it: the same on every rank, whenever each one's begins.

    `members` are those of the quorum, in rank order; what a rank draws depends on them.
    """

    batch: Batch
    members: tuple[MemberId, ...]
    member: MemberId  # this group


class Outcome(msgspec.Struct, frozen=True, array_like=True):
    """How a batch ended; `step` counts committed steps."""

    committed: bool
    step: int
    why: str


# ---- a follower to the leader


class RankReady(msgspec.Struct, frozen=True, array_like=True, tag="ready"):
    """It has built and registered what it trains."""


class RankBeat(msgspec.Struct, frozen=True, array_like=True, tag="beat"):
    """Alive, and what its training thread does. While one rank is silent the leader does not vouch for the group."""

    activity: Activity = Activity.STARTING
    activity_s: float = 0.0
    section: str = ""
    longest_s: float = 0.0
    recovery: RecoveryReport | None = None


class RankFroze(msgspec.Struct, frozen=True, array_like=True, tag="froze"):
    """It has severed its collectives for this round."""

    round: FailureRound


class RankSettled(msgspec.Struct, frozen=True, array_like=True, tag="settled"):
    """The first operation of its own group of this quorum ended."""

    quorum_id: QuorumId


class RankRecovered(msgspec.Struct, frozen=True, array_like=True, tag="recovered"):
    """It has fetched and verified its part of the state, and lets go of the donors once the group has all parts."""

    quorum_id: QuorumId


class RankReduced(msgspec.Struct, frozen=True, array_like=True, tag="reduced"):
    """All of its reductions completed. `shares` is who drew how many samples: the same on every rank of the group."""

    key: StepKey
    contributors: int
    samples: bytes
    shares: bytes


class RankReopened(msgspec.Struct, frozen=True, array_like=True, tag="reopened"):
    """Batch `number` has one more reduction on it after all; said whatever has become of the quorum meanwhile."""

    number: int


class RankDecides(msgspec.Struct, frozen=True, array_like=True, tag="decides"):
    """Its script has come to the vote on batch `number`; `together`: what it does before needs the other ranks."""

    number: int
    together: bool


class Ballot(msgspec.Struct, frozen=True, array_like=True, tag="ballot"):
    """Its vote; `objection` is why it is a no."""

    key: StepKey
    objection: str = ""


class RankFailed(msgspec.Struct, frozen=True, array_like=True, tag="failed"):
    """A collective of its own group of this quorum failed; `peer` is the replica rank that the error names."""

    quorum_id: QuorumId
    peer: int | None
    detail: str
    is_unreachable: bool = False


class RankDrains(msgspec.Struct, frozen=True, array_like=True, tag="drains"):
    """It was asked to leave: so is the group."""

    grace_s: float


class RankLeaves(msgspec.Struct, frozen=True, array_like=True, tag="leaves"):
    """Its script has ended; it waits for the others."""

    reason: str


ToLeader = (
    RankReady
    | RankBeat
    | RankFroze
    | RankSettled
    | RankRecovered
    | RankReduced
    | RankReopened
    | RankDecides
    | Ballot
    | RankFailed
    | RankDrains
    | RankLeaves
)


# ---- the leader to all followers


class View(msgspec.Struct, frozen=True, array_like=True, tag="view", kw_only=True):
    """The leader's machine as far as it concerns a rank; sent when it changes."""

    member: MemberId
    lighthouse: str
    round: FailureRound
    severed: QuorumId | None  # the newest quorum whose collectives are cut off
    quorum_id: QuorumId | None
    quorum: Quorum | None  # left out while it is the one of the last view
    lineage: Lineage | None
    attempt: int
    evictions: int
    is_settled: bool
    is_frozen: bool
    is_in_doubt: bool
    has_left: bool
    holds_average: bool  # the averaged gradient of the step outlived the change to this quorum
    prepares: int  # how many Prepares every rank has run, or runs now
    is_prepared: bool  # one of them was for the reductions at hand
    plan: RecoveryPlan | None
    refusal: Refused | None
    waiting_for: str
    beat_interval_s: float


class Began(msgspec.Struct, frozen=True, array_like=True, tag="began"):
    """The leader's script has begun its batch `number`: so do the followers', though they may hear of it too late.

    It did so in the quorum of the last View before this.
    """

    number: int
    batch: Batch


class Decided(msgspec.Struct, frozen=True, array_like=True, tag="decided"):
    """How batch `number` ended."""

    number: int
    outcome: Outcome


class AllLeft(msgspec.Struct, frozen=True, array_like=True, tag="all-left"):
    """Every rank has ended: go."""


class GroupEnds(msgspec.Struct, frozen=True, array_like=True, tag="group-ends"):
    """Another rank died, or the leader gives up."""

    detail: str


ToFollower = View | Began | Decided | AllLeft | GroupEnds


class FromRank(msgspec.Struct, frozen=True):
    """An event of the leader's machine: what a follower said."""

    rank: int
    message: ToLeader
