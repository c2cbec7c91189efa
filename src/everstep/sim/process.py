"""A replica group of one process in the virtual world: a training thread that follows the machine's moves."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from everstep.core.messages import Activity
from everstep.core.moves import Build, GradientsReduced, Recover, Reduce, ReplicaConfig, Vote, VoteEnded
from everstep.core.recovery_plan import Claim
from everstep.core.replica import Replica
from everstep.core.types import Quorum, QuorumId
from everstep.sim.checkers import Batch, Violation, Weights
from everstep.sim.trainer import Trainer

if TYPE_CHECKING:
    from everstep.sim.world import World


class Process(Trainer):
    """One start of it."""

    replica: Replica

    def __init__(self, world: "World", name: str, config: ReplicaConfig, initial: Weights) -> None:
        super().__init__(world, name, config.replica_id, initial)
        self.replica = world.replica_type(config)
        self._batch: Batch = (name, 1)
        self._batch_for: tuple[int, int, int] | None = None  # (step, attempt, evictions) whose gradient is computed
        self._gradient: tuple[Batch, ...] | None = None
        self._evictions = 0
        self.replica.ledger.begin(world.now)

    def _advance(self) -> None:
        if not self.is_alive or self._is_hung or (self._busy is not None and not self._is_let_go()):
            return
        if self._world.now < self.frozen_until:
            self.wait_for(("stopped",), self.frozen_until - self._world.now, lambda: None)
            return
        self._revoke()
        if self._settling is not None and self._lends():
            return
        self._take_decisions()
        if self._is_leaving:
            return
        move = self.replica.next_move()
        self.replica.book(move, self._world.now)
        match move:
            case Build(quorum, claim):
                self._world.faults.reached("Build", self)
                if self._must_end(claim):
                    self._world.exited(self)
                    return
                self._issue(quorum, "barrier", claim, lambda values: self._built(quorum, values))
            case Recover():
                self._world.faults.reached("Recover", self)
                self._recover(move)
            case Reduce(quorum):
                self._world.faults.reached("Reduce", self)
                self._reduce(quorum)
            case Vote(quorum, must_be_no):
                self._vote(quorum, must_be_no)
            case _:
                self._mark(Activity.WAITING)

    def _take_decisions(self) -> None:
        """What the step() call of a script does when its step is decided: run the optimizer, or drop the gradient."""
        replica = self.replica
        if replica.has_left or replica.refusal is not None:
            if not self._is_leaving:
                self._is_leaving = True
                self._world.left(self)
            return
        if replica.evictions != self._evictions:
            self._evictions, self._gradient, self._batch_for = replica.evictions, None, None
            self._new_batch()
            self._applied_step = -1
        if replica.lineage is None:
            self._applied_step = -1
            return
        if self._applied_step < 0:
            self._applied_step = replica.step
            self.weights = Weights(self.weights.value, replica.step)  # its own initial state founds a history
        if replica.step == self._applied_step + 1:
            if self._gradient is None:
                raise Violation(f"{self.name} committed step {replica.step} without holding its gradient")
            self._change()
            self.weights = self.weights.applied(self._gradient)
            self._applied_step = replica.step
            self._world.checkers.applied(self.name, replica.lineage, self.weights, self._gradient)
            self._gradient, self._batch_for = None, None
            self._new_batch()
        elif replica.step != self._applied_step:
            raise Violation(f"{self.name} applied step {self._applied_step} but committed {replica.step}")
        elif self._batch_for is not None and self._batch_for[:2] != (replica.step, replica.attempt):
            self._world.aborted(self.name, replica.step)
            self._gradient, self._batch_for = None, None
            self._new_batch()

    def _must_end(self, claim: Claim) -> bool:
        """It is to found a history with what a transfer that did not end has left of its weights."""
        return claim.lineage is not None and self.is_torn

    def _new_batch(self) -> None:
        self._batch = (self.name, self._batch[1] + 1)

    def _reduce(self, quorum: Quorum) -> None:
        key = (self.replica.step, self.replica.attempt, self.replica.evictions)
        if self._batch_for != key:

            def computed() -> None:
                if (self.replica.step, self.replica.attempt, self.replica.evictions) == key:
                    self._batch_for = key

            self._mark(Activity.COMPUTING)
            if self._hangs_next:
                self._hangs_next, self._is_hung = False, True
                return
            self._change()
            self.wait_for(("compute",), self._world.compute_s(self.replica.step), computed)
            return
        self._world.checkers.contributes(self.name, self.weights)
        value = (self.replica.lineage, self.replica.attempt, self._batch)
        self._issue(quorum, "reduce", value, lambda values: self._reduced(quorum, values))

    def _reduced(self, quorum: Quorum, values: Sequence[object]) -> None:
        parts = [v for v in values if isinstance(v, tuple)]
        if len({part[:2] for part in parts}) > 1:
            raise Violation(f"I2 quorum {quorum.id} reduces different steps: {[part[:2] for part in parts]}")
        gradient = tuple(part[2] for part in parts)
        before = self.replica.tag
        event = GradientsReduced(quorum.id, len(quorum.members), repr(gradient).encode())
        effects = self.replica.receive(event, self._world.now)
        if self.replica.tag is not before:
            self._gradient = gradient
        self._perform(effects)
        self._world.faults.reached("GradientsReduced", self)
        self._advance()

    def _vote(self, quorum: Quorum, must_be_no: bool) -> None:
        is_ok = not must_be_no and not self._world.faults.wants_veto()
        cast = self.replica.cast_vote(is_ok)
        if cast is None:
            return
        value = (self.replica.lineage, self.replica.attempt, cast.is_ok, cast.proposal)
        self._world.faults.reached("VoteCast", self)
        self._issue(quorum, "vote", value, lambda values: self._voted(quorum, values))

    def _voted(self, quorum: Quorum, values: Sequence[object]) -> None:
        votes = [v for v in values if isinstance(v, tuple)]
        if len({vote[:2] for vote in votes}) > 1:
            raise Violation(f"I2 quorum {quorum.id} votes on different steps")
        proposals: list[QuorumId] = [vote[3] for vote in votes]
        is_ok = all(vote[2] for vote in votes)
        self._report(VoteEnded(quorum.id, is_ok, min(proposals), max(proposals)))
