"""What the ranks of a group have reported to their leader of the quorum, and of the try of the step, at hand."""

import dataclasses
import hashlib

from everstep.core.group import RankReduced, StepKey
from everstep.core.moves import BarrierEnded
from everstep.core.types import QuorumId

OWN = 0  # the leader's rank in its group


@dataclasses.dataclass
class Tally:
    """Each by rank."""

    quorum_id: QuorumId | None = None
    barrier: BarrierEnded | None = None  # the leader's own
    settled: set[int] = dataclasses.field(default_factory=set)
    recovered: set[int] = dataclasses.field(default_factory=set)
    key: StepKey | None = None
    reduced: dict[int, RankReduced] = dataclasses.field(default_factory=dict)
    ballots: dict[int, str] = dataclasses.field(default_factory=dict)
    is_prepared: bool = False  # these reductions

    def samples(self) -> bytes:
        """Digest of who contributed what, over the ranks."""
        digest = hashlib.blake2b(digest_size=16)
        for _, report in sorted(self.reduced.items()):
            digest.update(report.samples)
        return digest.digest()

    def objection(self) -> str:
        """Why the group's vote is a no; empty when it is ok."""
        for rank, objection in sorted(self.ballots.items()):
            if objection:
                return objection if rank == OWN else f"rank {rank}: {objection}"
        if len({report.shares for report in self.reduced.values()}) > 1:
            return "the ranks of this group contributed different numbers of batches, or reduced in different quorums"
        return ""
