"""Brings this rank into a quorum: builds its group, lends live state to who needs it, takes over that of the others."""

import contextlib
import time
from collections.abc import Iterator

from everstep.collectives.process_group import Membership
from everstep.core.moves import BarrierEnded, CollectiveFailed, Recover, StateRecovered
from everstep.core.recovery_plan import Claim, RecoveryPlan
from everstep.core.types import Quorum, QuorumId
from everstep.errors import PeerLost, RecoveryFailed, StepInterrupted
from everstep.train.claims import check_sizes, pack, unpack
from everstep.train.presence import Presence
from everstep.train.recovering import Recovery
from everstep.train.transports import Roll, check_same_transport

WAIT_SLICE_S = 0.5  # so that Python runs signal handlers while it waits
FETCH_AGAIN_S = (0.05, 2.0)


@contextlib.contextmanager
def reporting(presence: Presence, quorum_id: QuorumId) -> Iterator[None]:
    """A collective that fails in here is told to the machine, which says how to go on, and raises no further."""
    try:
        yield
    except PeerLost as error:
        presence.feed(CollectiveFailed(quorum_id, error.peer, _first_line(error)))
    except StepInterrupted as error:
        presence.feed(CollectiveFailed(quorum_id, None, _first_line(error)))


class Settler:
    """Of the training thread, one after the other: `settle`, where the machine says so `fetch`, and then `apply`."""

    def __init__(self, presence: Presence, recovery: Recovery) -> None:
        self._presence = presence
        self._recovery = recovery
        self._fetch_again_s = FETCH_AGAIN_S[0]
        self._roll: Roll | None = None  # where each member's rank of this group rank serves its state
        self._meets = False  # every member of the quorum: when the joiners have the state, before anybody goes on

    def settle(self, quorum: Quorum, claim: Claim) -> None:
        """Build its group and meet the others; lend the state to who needs it, until he has it. Raises as they do."""
        presence = self._presence
        if claim.lineage is not None:
            self._recovery.check_whole()
        with presence.changed:
            rank = presence.replica.rank
        if rank is None:
            return
        group = presence.group
        membership = Membership(
            quorum_id=quorum.id,
            rank=rank,
            size=len(quorum.members),
            store=quorum.store,
            timeout_s=presence.replica.config.collective_timeout_s,
            prefix=presence.rank_prefix,
        )
        group.configure(membership)
        gathered = group.allgather(pack(presence.rank_claim(claim)))
        claims = tuple(map(unpack, gathered))
        check_sizes(claims, rank)
        check_same_transport(claims, rank)
        addresses = tuple(c.recovery or m.recovery for c, m in zip(claims, quorum.members, strict=True))
        self._roll = Roll(quorum=quorum, rank=rank, addresses=addresses, prefix=presence.rank_prefix)
        self._meets = all(c.meets for c in claims)
        presence.feed(BarrierEnded(quorum.id, tuple(c.claim for c in claims)))
        plan = self._await_plan(quorum)
        if plan is None:
            return
        group.release_previous()
        presence.replica.open_section("snapshot")
        self._recovery.offer(self._roll, plan, is_lent=self._meets)
        presence.replica.close_section(time.monotonic())
        if self._meets and plan.source_of and rank not in plan.source_of:
            self._recovery.await_joiners()

    def _await_plan(self, quorum: Quorum) -> RecoveryPlan | None:
        """Once the other ranks of this group have met theirs; None when something else has happened to the quorum."""
        presence = self._presence
        with presence.changed:
            replica = presence.replica
            while replica.awaits_plan and replica.quorum == quorum:
                presence.check()
                presence.changed.wait(WAIT_SLICE_S)
            is_current = replica.quorum is not None and replica.quorum.id == quorum.id
            return replica.plan if is_current and not replica.is_frozen else None

    def fetch(self, move: Recover) -> None:
        """This rank's part of the state; a group of one rank goes on with it."""
        quorum_id = move.quorum.id
        try:
            assert self._roll is not None
            self._recovery.fetch(move, self._roll)
        except StepInterrupted:
            return  # frozen: the machine has left this quorum already
        except RecoveryFailed as error:
            self._presence.log.warning("recovery failed: %s; trying again in %.2f s", error, self._fetch_again_s)
            self._presence.feed(CollectiveFailed(quorum_id, move.source, f"recovery: {_first_line(error)}"))
            with self._presence.changed:
                self._presence.changed.wait(self._fetch_again_s)
            self._fetch_again_s = min(2 * self._fetch_again_s, FETCH_AGAIN_S[1])
            return
        self._fetch_again_s = FETCH_AGAIN_S[0]
        if self._presence.group_size > 1:
            self._presence.feed(StateRecovered(quorum_id))
            return
        with reporting(self._presence, quorum_id):
            self._let_go()
            self._recovery.apply()
            self._presence.feed(StateRecovered(quorum_id))

    def apply(self) -> None:
        """Every rank of this group has its part: it holds the state, whatever becomes of those who lent it."""
        assert self._roll is not None
        with reporting(self._presence, self._roll.quorum.id):
            self._let_go()
        self._recovery.apply()

    def _let_go(self) -> None:
        """Of those who lent the state; they go on from here."""
        if self._meets:
            self._recovery.meet()


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]
