"""Who gives the live state to whom when a quorum with new members settles (rule T1)."""

import dataclasses
from collections.abc import Sequence

from everstep.core.types import Lineage, LocalProtocolError


@dataclasses.dataclass(frozen=True)
class Claim:
    """What a member brings to the first operation of a quorum. `lineage` is None without state."""

    lineage: Lineage | None
    attempt: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecoveryPlan:
    """The state that the quorum starts with, and which rank each rank without it copies from."""

    lineage: Lineage
    attempt: int
    source_of: dict[int, int]

    def receivers_of(self, rank: int) -> tuple[int, ...]:
        return tuple(receiver for receiver, source in self.source_of.items() if source == rank)


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
    return RecoveryPlan(lineage=first.lineage, attempt=first.attempt, source_of=source_of)
