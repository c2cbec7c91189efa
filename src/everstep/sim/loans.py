"""Live state on its way in the virtual world: a donor lends its own and keeps still, a joiner reads it chunk by chunk.

Reading a chunk takes a while, and finds what the donor's state is by then; whether to believe it is decided after that,
by a look at the loan. One chunk after another, each from a donor drawn at random. Which donor's digests decide where
donors differ is not in this world (tests/recovery does that), nor are bytes, connections, retries, limits on silence,
and stripes in parallel.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from everstep.core.moves import Recover
from everstep.core.types import MemberId
from everstep.sim.checkers import Loan, Memory, Weights

if TYPE_CHECKING:
    from everstep.sim.trainer import Trainer
    from everstep.sim.world import World

CHUNKS = 4
LOOK_AGAIN_S = 0.01  # at a donor that has not offered the state yet


@dataclasses.dataclass(frozen=True)
class Seen:
    """The first half of a chunk, as it was read."""

    donor: "Trainer"
    loan: Loan
    memory: Memory


class Transfer:
    """One fetch, from all donors of `move`; it ends when the joiner's training thread is severed from it."""

    def __init__(self, joiner: "Trainer", world: "World", move: Recover, then: Callable[[Weights], None]) -> None:
        self._joiner = joiner
        self._world = world
        self._move = move
        self._then = then
        self._donors = [move.quorum.members[rank].id for rank in move.donors or (move.source,)]
        self._has_offered: set[str] = set()
        self._chunks: list[Memory] = []
        self._half_s = 0.0  # from a read to its look, and to the next read

    def start(self) -> None:
        self._half_s = self._world.draw("transfer") / (2 * CHUNKS)
        self._soon(self._half_s, self._read)

    def _soon(self, delay: float, call: Callable[[], None]) -> None:
        self._joiner.wait_for(("transfer", str(self._move.quorum.id)), delay, call)

    def _read(self) -> None:
        offering, is_waiting = self._look_round()
        if offering:
            donor = self._world.rng.choice(offering)
            assert donor.loan is not None
            seen = Seen(donor, donor.loan, donor.memory)
            self._soon(self._half_s, lambda: self._look(seen))
        elif is_waiting:
            self._soon(LOOK_AGAIN_S, self._read)
        else:
            self._joiner.fail_fetch(self._move, "no donor is left")

    def _look_round(self) -> tuple[list["Trainer"], bool]:
        """Who offers the state, and whether others may yet; who is gone or has withdrawn it is asked no more."""
        offering: list[Trainer] = []
        left: list[MemberId] = []
        is_waiting = False
        collectives = self._world.collectives_of(self._joiner.rank)
        for member in self._donors:
            donor = self._world.process_of(member, self._joiner.rank)
            if donor is None or not donor.is_alive:
                continue
            if not collectives.has_path(member.replica_id, self._joiner.replica_id):
                continue
            is_lent = donor.loan is not None and donor.loan.quorum_id == self._move.quorum.id
            if not is_lent and donor.name in self._has_offered:
                continue
            left.append(member)
            if is_lent and self._world.now >= donor.frozen_until:
                self._has_offered.add(donor.name)
                offering.append(donor)
            else:
                is_waiting = True
        self._donors = left
        return offering, is_waiting

    def _look(self, seen: Seen) -> None:
        """At the other half of the chunk, and after that at the loan, as the donor does before it gives the digest."""
        if seen.donor.is_alive and self._world.now < seen.donor.frozen_until:
            self._soon(seen.donor.frozen_until - self._world.now, lambda: self._look(seen))
        elif self._believes(seen):
            self._land(seen, seen.donor.memory)
        else:
            self._read()

    def _believes(self, seen: Seen) -> bool:
        return seen.donor.is_alive and not seen.loan.is_revoked

    def _land(self, seen: Seen, rest: Memory) -> None:
        for half in (seen.memory, rest):
            self._world.checkers.believed(self._joiner.name, seen.loan, half)
        if not self._chunks and self._joiner.may_overwrite(self._move.lineage):
            self._joiner.tear()
        self._chunks.append(seen.memory)
        self._world.faults.reached("Landed", self._joiner)
        if len(self._chunks) < CHUNKS:
            self._soon(self._half_s, self._read)
            return
        first = self._chunks[0]
        is_one = all(chunk.value == first.value for chunk in self._chunks)
        self._then(Weights(first.value if is_one else -1, first.step))
