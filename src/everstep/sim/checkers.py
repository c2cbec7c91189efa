"""What must hold in every schedule (invariants I1 to I5 of the design), apart from the machines that they check."""

import dataclasses
import hashlib

from everstep.core.replica_state import ReplicaState
from everstep.core.types import Lineage, MemberId, Quorum, QuorumId

Batch = tuple[str, int]  # (name of a process, number of its batch)
TORN = -1  # value and step of weights that a transfer has begun to overwrite


class Violation(Exception):
    """A schedule led to a state that the design rules out."""


@dataclasses.dataclass
class Weights:
    """Stands for a model: the batches that made it, in order, as a chain of hashes."""

    value: int = 0
    step: int = 0

    def applied(self, gradient: tuple[Batch, ...]) -> "Weights":
        digest = hashlib.blake2b(repr((self.value, gradient)).encode(), digest_size=8).digest()
        return Weights(int.from_bytes(digest, "big"), self.step + 1)


@dataclasses.dataclass(frozen=True)
class Memory:
    """What a process trains, as it is at one instant; `changes` counts what has changed it, a forward pass included."""

    value: int
    step: int
    changes: int


@dataclasses.dataclass
class Loan:
    """Live state that readers may believe, until it is revoked."""

    quorum_id: QuorumId
    lent: Memory
    is_revoked: bool = False


class Checkers:
    """Fed with every change that a member makes visible. Raises Violation."""

    def __init__(self) -> None:
        self.committed: dict[tuple[str, int], bytes] = {}
        self.weights: dict[tuple[str, int], int] = {}
        self.batch_at: dict[tuple[str, Batch], int] = {}
        # The last step of each history, in the order of their first commits; -1 while it is the newest.
        self._ends: dict[str, int] = {}
        self._members_of: dict[QuorumId, tuple[MemberId, ...]] = {}
        self._seen: dict[str, Quorum | None] = {}  # what was checked last
        self._quorum_of: dict[str, QuorumId] = {}
        self._lineage_of: dict[str, Lineage] = {}

    def observe(self, process: str, replica: ReplicaState) -> None:
        """After every event of `process`: ids grow and name one membership (I5); one lineage a step (I1, I3)."""
        if replica.quorum is not self._seen.get(process):
            self._check_quorum(process, replica)
        lineage = replica.lineage
        before = self._lineage_of.pop(process, None)
        if lineage is None:
            return
        self._lineage_of[process] = lineage
        if (
            before is not None
            and before.history == lineage.history
            and lineage.step not in (before.step, before.step + 1)
        ):
            raise Violation(f"I3 {process} jumps from step {before.step} to {lineage.step}")
        known = self.committed.setdefault((lineage.history, lineage.step), lineage.digest)
        if known != lineage.digest:
            raise Violation(f"I1 {process} has another lineage at step {lineage.step} of {lineage.history}")

    def _check_quorum(self, process: str, replica: ReplicaState) -> None:
        self._seen[process] = replica.quorum
        if replica.quorum is None:
            return
        quorum_id = replica.quorum.id
        if quorum_id < self._quorum_of.get(process, quorum_id):
            raise Violation(f"I5 {process} goes back from quorum {self._quorum_of[process]} to {quorum_id}")
        self._quorum_of[process] = quorum_id
        members = self._members_of.setdefault(quorum_id, replica.quorum.member_ids)
        if members != replica.quorum.member_ids:
            raise Violation(f"I5 quorum {quorum_id} is {members} and {replica.quorum.member_ids}")

    def applied(self, process: str, lineage: Lineage, weights: Weights, gradient: tuple[Batch, ...]) -> None:
        """`process` applied the gradient of a committed step: same weights everywhere (I2), each batch once (I4).

        A history that was founded anew ends the one before it (I1 over histories). One step of that may still be
        committed by somebody who was away: the step whose votes were complete when all others died.
        """
        if lineage.history not in self._ends:
            self._ends[lineage.history] = -1
            for older in list(self._ends)[:-1]:
                if self._ends[older] < 0:
                    self._ends[older] = max(step for history, step in self.weights if history == older)
        elif 0 <= self._ends[lineage.history] < lineage.step - 1:
            raise Violation(f"I1 {process} commits to {lineage.history}, but {list(self._ends)[-1]} has begun")
        known = self.weights.setdefault((lineage.history, lineage.step), weights.value)
        if known != weights.value:
            raise Violation(f"I2 {process} has other weights at step {lineage.step}")
        for batch in gradient:
            step = self.batch_at.setdefault((lineage.history, batch), lineage.step)
            if step != lineage.step:
                raise Violation(f"I4 batch {batch} counts in steps {step} and {lineage.step}")

    def ledger(self, process: str, replica: ReplicaState, wall_s: float, now: float) -> None:
        """Every instant of the process is on one account."""
        spent_s = replica.ledger.spent(now).total_ms / 1e3
        if abs(spent_s - wall_s) > 0.01:
            raise Violation(f"the ledger of {process} adds up to {spent_s:.3f} s of {wall_s:.3f} s")

    def recovered(self, process: str, lineage: Lineage, weights: Weights) -> None:
        known = self.weights.setdefault((lineage.history, lineage.step), weights.value)
        if known != weights.value:
            raise Violation(f"I2 {process} recovered other weights at step {lineage.step}")

    # ---- the loan of live state (docs/decisions/011)

    def lent(self, process: str, lineage: Lineage, weights: Weights) -> None:
        """A donor lends the state of the step that it committed to."""
        known = self.weights.setdefault((lineage.history, lineage.step), weights.value)
        if known != weights.value or weights.step != lineage.step:
            raise Violation(f"R1 {process} lends {weights} for step {lineage.step}")

    def changes(self, process: str, loan: Loan | None) -> None:
        if loan is not None:
            raise Violation(f"R2 {process} changes what it has lent in quorum {loan.quorum_id}")

    def believed(self, process: str, loan: Loan, seen: Memory) -> None:
        if seen != loan.lent:
            raise Violation(f"R3 {process} believes {seen}, and {loan.lent} was lent")

    def let_go(self, process: str, quorum_id: QuorumId, *, have_all: bool) -> None:
        """A donor has met the joiners' ranks of its own rank, and goes on."""
        if not have_all:
            raise Violation(f"R5 {process} is let go in quorum {quorum_id} before every rank has its part")

    def contributes(self, process: str, weights: Weights) -> None:
        if weights.value == TORN:
            raise Violation(f"R4 {process} trains with weights that are half overwritten")
