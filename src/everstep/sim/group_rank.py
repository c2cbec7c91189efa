"""A process of a replica group of several ranks in the virtual world: it hears the others, and ends with them.

What its training thread does is in ranks.py.
"""

import abc
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from everstep.core.moves import CollectiveFailed, ReplicaEvent
from everstep.core.types import QuorumId
from everstep.sim.checkers import Weights
from everstep.sim.trainer import Trainer

if TYPE_CHECKING:
    from everstep.sim.teams import Team


class GroupRank(Trainer):
    """One rank of a team."""

    replica: Any

    def __init__(self, team: "Team", name: str, rank: int, initial: Weights) -> None:
        super().__init__(team.world, name, team.config.replica_id, initial)
        self.team = team
        self.rank = rank
        self.has_left = False
        self._inbox: deque[Callable[[], None]] = deque()
        self._issued_in: QuorumId | None = None  # the quorum of its newest collective, or recovery
        self._severed: QuorumId | None = None

    # ---- the group

    def deliver(self, call: Callable[[], None]) -> None:
        """In order, and not while it is stopped."""
        self._inbox.append(call)
        self._read_inbox()

    def _read_inbox(self) -> None:
        while self._inbox and self.is_alive:
            if self._world.now < self.frozen_until:
                self._world.at(self.frozen_until, self._read_inbox)
                return
            self._inbox.popleft()()

    @abc.abstractmethod
    def hear(self, message: Any) -> None: ...

    def lose(self, ended: "GroupRank") -> None:
        if not self.replica.has_everyone_left:
            self.team.fail(self, f"{ended.name} ended")

    def kill(self, *, is_noticed: bool = True) -> None:
        was_alive = self.is_alive
        super().kill(is_noticed=is_noticed)
        if was_alive:
            self.team.rank_ended(self, is_noticed=is_noticed)

    def leave(self) -> None:
        """The scripts of all ranks end at the same step."""
        self.team.ends_at = self.team.leader.replica.step + 2

    def report_spurious_error(self, peer: int | None) -> None:
        quorum = self.replica.quorum
        if quorum is not None:
            if self._waits_in is not None:
                self._busy = None
            self.feed(CollectiveFailed(quorum.id, peer, "spurious"))

    def _sever(self, up_to: QuorumId) -> None:
        self._world.leave_quorums(self, up_to)
        self._severed = up_to
        if self._waits_in is not None and self._waits_in <= up_to:
            self._busy = None

    @property
    def _waits_in(self) -> QuorumId | None:
        """The quorum of the collective that its training thread is in."""
        is_elsewhere = self._busy is None or self._busy[0] in ("compute", "stopped", "together", "apply")
        return None if is_elsewhere else self._issued_in

    def _say(self, event: ReplicaEvent) -> None:
        """From the training thread, in the middle of what it does."""
        self._perform(self.replica.receive(event, self._world.now))
        self._world.faults.reached(type(event).__name__, self)
