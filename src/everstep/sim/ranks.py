"""The ranks of one replica group in the virtual world: what `train/stepper.py` does on each, with their machines."""

import abc
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from everstep.core.group import Batch as Try
from everstep.core.group import Beginning, Outcome
from everstep.core.messages import Activity
from everstep.core.moves import (
    Applied,
    Apply,
    Build,
    Deciding,
    GradientsReduced,
    Leave,
    MoreReductions,
    Move,
    Prepare,
    Prepared,
    Recover,
    Reduce,
    StateRecovered,
    Vote,
    VoteEnded,
)
from everstep.core.types import Lineage, Quorum, QuorumId
from everstep.sim.checkers import Batch, Violation, Weights
from everstep.sim.group_rank import GroupRank

if TYPE_CHECKING:
    from everstep.sim.teams import Team

OLD_QUORUM_S = 0.5  # that the others keep it open for one that leaves
MOVES_MAX = 100  # without anything that takes time: more is a spin


class RankParty(GroupRank):
    """One rank. Its script computes, may wait for a first reduction before it adds a second, and comes to the vote."""

    def __init__(self, team: "Team", name: str, rank: int, initial: Weights) -> None:
        super().__init__(team, name, rank, initial)
        self._script_has_ended = False
        self._try: Try | None = None  # the batch at hand; core's word for it is Batch
        self._is_agreeing = False
        self._number = 0  # of batches that ended
        self._together = 0  # times that the script prepared with the other ranks
        self._fetched: tuple[Lineage, Weights]
        self._meets_in: Quorum | None = None  # those who lent what was fetched: before it is applied
        self._reset()

    def _reset(self) -> None:
        self._try = None
        self._appended = 0
        self._finished = 0
        self._reduced_in: QuorumId | None = None
        self._results: list[tuple[Batch, ...]] = []
        self._is_deciding = False
        self._wants_together = False
        self._prepared_for: tuple[tuple[Batch, ...], ...] = ()
        self._is_prepared = False
        self._objection = ""

    # ---- the training thread

    def _advance(self) -> None:
        for _ in range(MOVES_MAX):
            if self._waits_in is not None and self._is_let_go():
                self._end_collective(self._busy)
            if not self.is_alive or self._is_hung or self._busy is not None or not self._go_on():
                return
        raise Violation(f"{self.name} spins: {self.replica.next_move()}")

    def _end_collective(self, busy: object) -> None:
        """The others went on without it: in the end they close the quorum that it was in."""

        def ended() -> None:
            if self._busy is busy:
                self._busy = None
                self._advance()

        self._world.after(OLD_QUORUM_S, ended)

    def _go_on(self) -> bool:
        """One move of it. Whether to look again at once."""
        replica = self.replica
        if self._world.now < self.frozen_until:
            self.wait_for(("stopped",), self.frozen_until - self._world.now, lambda: None)
            return False
        self._revoke()
        if replica.refusal is not None:
            self.team.give_up(self)
            return False
        if self._script_has_ended:
            if replica.has_everyone_left:
                self.has_left = True
                self.kill()
            return False
        if self._settling is not None:
            if replica.awaits_plan and replica.quorum.id == self._settling:
                return False  # for the other ranks' barriers
            self._note_history()
            if self._lends():
                return False
        if self._is_agreeing:
            return self._agree()
        return self._follow(replica.next_move())

    def _follow(self, move: Move) -> bool:
        replica = self.replica
        replica.book(move, self._world.now)
        if isinstance(move, Prepare):
            self._prepare_together(lambda: self._say(Prepared()))
            return False
        if isinstance(move, Apply):
            self._apply()
            return False
        if self._try is not None and self._try != replica.batch:
            self._close()
            return True
        if self._try is None and replica.has_begun:
            self._begin()
            return True
        is_done = self._try is None and self.team.ends_at is not None and replica.step >= self.team.ends_at
        if replica.has_left or is_done:
            self._script_has_ended = True
            self._say(Leave("drained" if replica.has_left else "done"))
            return True
        if self._try is None and isinstance(move, Reduce):
            self._begin()
            return True
        if self._try is not None and self._appended == 0:
            self._compute(self._append)
            return False
        if self._try is not None and not self._is_deciding and replica.has_reduced and not replica.is_frozen:
            is_last = self._appended == self._world.script.reductions_of(self._try.step)
            self._compute(self._decide if is_last else self._append)
            return False
        return self._make(move)

    def _fetched_all(self, move: Recover, fetched: Weights) -> None:
        self._has_fetched(move.quorum)
        self._take(move.lineage, fetched)
        self._meets_in = move.quorum
        self._report(StateRecovered(move.quorum.id))

    def _take(self, lineage: Lineage, weights: Weights) -> None:
        """Aside, until every rank has its part."""
        self._fetched = (lineage, weights)

    def _apply(self) -> None:
        """Having let go of those who lent it, or lost them."""
        quorum, self._meets_in = self._meets_in, None
        if quorum is not None and (self._severed is None or self._severed < quorum.id):
            self._mark(Activity.RECOVERING)
            self._issue(quorum, "meet", None, lambda _: self._advance())
            return
        self._world.faults.reached("Apply", self)
        lineage, weights = self._fetched

        def applied() -> None:
            super(RankParty, self)._take(lineage, weights)
            self._say(Applied())

        self.wait_for(("apply",), self._world.draw("apply"), applied)

    def _begin(self) -> None:
        self._note_history()
        replica, begun = self.replica, self._begin_batch()
        self.team.began(self.name, self._number + 1, begun)
        if begun.batch == replica.batch and self.weights.step != replica.step:
            raise Violation(f"{self.name} trains step {replica.step} with the weights of step {self.weights.step}")
        self._try = begun.batch
        if self._world.script.is_sharded:
            self._mark(Activity.COMPUTING)
            self._change()
            self._with_the_ranks(f"forward {self._number + 1}", None, lambda: None)

    def _note_history(self) -> None:
        """It may have founded one with what it has: its initial state, or what it applied of one that was lost."""
        lineage = self.replica.lineage
        if lineage is not None and self._history != lineage.history:
            self._history, self.weights = lineage.history, Weights(self.weights.value, lineage.step)

    def _compute(self, then: Callable[[], None]) -> None:
        self._mark(Activity.COMPUTING)
        if self._hangs_next:
            self._hangs_next, self._is_hung = False, True
            return
        self._change()
        self.wait_for(("compute",), self._world.compute_s(self.replica.step), then)

    def _append(self) -> None:
        """The script adds a reduction. It comes to the vote at once, or when the reductions so far are complete."""
        self._appended += 1
        self._is_prepared = False
        if self.replica.has_reduced:
            self._say(MoreReductions())
        assert self._try is not None
        script = self._world.script
        if self._appended == script.reductions_of(self._try.step) and not script.completes_first(self._try.step):
            self._decide()

    def _decide(self) -> None:
        self._is_deciding = True
        self._wants_together = self._world.script.is_together()
        if not self._wants_together and self._world.script.has_before_step:
            self._objection = "skipped"
        self._say(Deciding(self._wants_together))

    def _make(self, move: Move) -> bool:
        match move:
            case Build(quorum, claim):
                self._world.faults.reached("Build", self)
                self._issued_in = quorum.id
                self._issue(quorum, "barrier", claim, lambda values: self._built(quorum, values))
            case Recover(quorum):
                self._world.faults.reached("Recover", self)
                self._issued_in = quorum.id
                self._recover(move)
            case Reduce(quorum):
                self._world.faults.reached("Reduce", self)
                self._reduce(quorum)
            case Vote(quorum, must_be_no):
                return self._vote(quorum, must_be_no)
            case _:
                self._mark(Activity.WAITING)
        return False

    def _reduce(self, quorum: Quorum) -> None:
        if self._reduced_in != quorum.id:
            self._reduced_in, self._finished, self._results = quorum.id, 0, []
        index, batch = self._finished, (self.team.name, self._number + 1)
        value = (self.replica.lineage, self.replica.attempt, index, batch)
        self._issued_in = quorum.id
        self._issue(quorum, f"reduce {index}", value, lambda values: self._reduced(quorum, index, values))

    def _reduced(self, quorum: Quorum, index: int, values: Sequence[object]) -> None:
        parts = [v for v in values if isinstance(v, tuple)]
        if len({part[:3] for part in parts}) > 1:
            raise Violation(f"I2 quorum {quorum.id} reduces different steps: {[part[:3] for part in parts]}")
        if self._reduced_in == quorum.id and self._finished == index < self._appended:
            self._finished += 1
            self._results.append(tuple(part[3] for part in parts))
        if self._finished == self._appended:
            self._is_prepared = False
            samples = repr(self._results).encode()
            self._say(GradientsReduced(quorum.id, len(quorum.members), samples, samples))
        self._advance()

    def _prepare_together(self, then: Callable[[], None]) -> None:
        """What the script does before the vote: a collective among the ranks of this group."""
        self._world.faults.reached("Prepare", self)
        self._mark(Activity.COMPUTING)
        self._together += 1
        self._prepared_for = tuple(self._results)

        def done() -> None:
            self._prepared()
            then()

        self._with_the_ranks(f"prepare {self._together}", self._try, done)

    def _with_the_ranks(self, what: str, value: object, then: Callable[[], None]) -> None:
        """A collective of the script's own, which ends when all ranks of this group are in it, and for nothing else."""
        self._busy = token = ("together", what)

        def done() -> None:
            if not self.is_alive or self._busy is not token:
                return
            if self._world.now < self.frozen_until:
                self._world.at(self.frozen_until, done)
                return
            self._busy = None
            then()
            self._advance()

        self.team.together(what, self, value, done)

    def _prepared(self) -> None:
        if self._world.faults.wants_veto():
            self._objection = "veto"
        self._is_prepared = True

    def _vote(self, quorum: Quorum, must_be_no: bool) -> bool:
        if self._reduced_in is None or self._finished < self._appended:
            self._say(MoreReductions())
            return True
        if not self._is_prepared and not must_be_no:
            if self._wants_together:
                self._prepare_together(lambda: None)
                return False
            self._prepared()
        if must_be_no:
            self._objection = self._objection or "too few"
        cast, effects = self.replica.cast_ballot(self._objection)
        self._perform(effects)
        self._world.faults.reached("VoteCast", self)
        if cast is None:
            return True
        value = (self.replica.lineage, self.replica.attempt, cast.is_ok, cast.proposal)
        self._issued_in = quorum.id
        self._issue(quorum, "vote", value, lambda values: self._voted(quorum, values))
        return False

    def _voted(self, quorum: Quorum, values: Sequence[object]) -> None:
        votes = [v for v in values if isinstance(v, tuple)]
        if len({vote[:2] for vote in votes}) > 1:
            raise Violation(f"I2 quorum {quorum.id} votes on different steps")
        proposals: list[QuorumId] = [vote[3] for vote in votes]
        is_ok = all(vote[2] for vote in votes)
        self._report(VoteEnded(quorum.id, is_ok, min(proposals), max(proposals)))

    # ---- the end of a batch

    def _close(self) -> None:
        replica, batch = self.replica, self._try
        assert batch is not None
        is_committed = replica.evictions == batch.evictions and replica.step == batch.step + 1
        self._end_batch(Outcome(is_committed, replica.step, ""))

    def _agree(self) -> bool:
        raise Violation(f"{self.name} waits for nobody's agreement")

    @abc.abstractmethod
    def _begin_batch(self) -> Beginning: ...

    @abc.abstractmethod
    def _end_batch(self, outcome: Outcome) -> None: ...

    def _finish(self, outcome: Outcome) -> None:
        assert self._try is not None
        self._number += 1
        lineage = self.team.ended(self, self._number, self._try, outcome)
        if outcome.committed:
            if not self._results or self._finished < self._appended or len(set(self._results)) > 1:
                raise Violation(f"{self.name} committed step {outcome.step} and holds {self._results}")
            if self._wants_together and self._prepared_for != tuple(self._results):
                raise Violation(f"{self.name} prepared for {self._prepared_for} and committed {self._results}")
            self._change()
            self.weights = self.weights.applied(self._results[0])
            assert lineage is not None
            self._world.checkers.applied(self.name, lineage, self.weights, self._results[0])
        self._reset()
