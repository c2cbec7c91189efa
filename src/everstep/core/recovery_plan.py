"""Who gives the live state to whom when a quorum with new members settles (rule T1)."""

import dataclasses
from collections.abc import Sequence

from everstep.core.types import Lineage, LocalProtocolError

DONORS_MAX = 8  # of one receiver
READERS_MAX = 16  # of one donor, as far as every receiver still has one


@dataclasses.dataclass(frozen=True)
class Claim:
    """What a member brings to the first operation of a quorum. `lineage` is None without state."""

    lineage: Lineage | None
    attempt: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecoveryPlan:
    """The state that the quorum starts with, and which rank each rank without it copies from.

    `holders`: all who have it, in rank order; () from a peer of an older version.
    """

    lineage: Lineage
    attempt: int
    source_of: dict[int, int]
    holders: tuple[int, ...] = ()

    def donors_of(self, receiver: int) -> tuple[int, ...]:
        """Its source, and the others that may serve it stripes of the same state."""
        source = self.source_of[receiver]
        if source not in self.holders:
            return (source,)
        count = min(DONORS_MAX, max(1, READERS_MAX * len(self.holders) // len(self.source_of)))
        at = self.holders.index(source)
        return (self.holders[at:] + self.holders[:at])[:count]

    def receivers_of(self, rank: int) -> tuple[int, ...]:
        return tuple(receiver for receiver in self.source_of if rank in self.donors_of(receiver))


def plan_recovery(claims: Sequence[Claim]) -> RecoveryPlan:
    """Plan from everybody's claims, in rank order; every member computes the same plan.

    Sources are spread over all members that hold the state. Raises LocalProtocolError when nobody holds it, or when
    those who do disagree: members of one quorum never do.
    """
    holders = [rank for rank, claim in enumerate(claims) if claim.lineage is not None]
    if not holders:
        raise LocalProtocolError("a quorum without a member that holds the state")
    first = claims[holders[0]]
    for rank in holders:
        if claims[rank] != first:
            raise LocalProtocolError(f"members of one quorum start from {first} and {claims[rank]} (rank {rank})")
    assert first.lineage is not None
    joiners = [rank for rank, claim in enumerate(claims) if claim.lineage is None]
    source_of = {rank: holders[i % len(holders)] for i, rank in enumerate(joiners)}
    return RecoveryPlan(lineage=first.lineage, attempt=first.attempt, source_of=source_of, holders=tuple(holders))
