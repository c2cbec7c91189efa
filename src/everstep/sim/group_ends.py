"""The two ends of a group's channels in the virtual world: its leader and its followers."""

from typing import TYPE_CHECKING

from everstep.core.follower import Follower
from everstep.core.group import Beginning, FromRank, GroupEnds, Outcome, RankBeat
from everstep.core.leader import Leader
from everstep.core.moves import AskToLeave
from everstep.sim.checkers import Weights
from everstep.sim.ranks import RankParty

if TYPE_CHECKING:
    from everstep.sim.teams import Team


class LeaderParty(RankParty):
    """Rank 0, with the link."""

    replica: Leader

    def __init__(self, team: "Team", name: str, initial: Weights) -> None:
        super().__init__(team, name, 0, initial)
        self.replica = team.world.leader_type(team.config, team.world.ranks, team.world.now)
        self.replica.ledger.begin(team.world.now)

    def hear(self, message: FromRank) -> None:
        if isinstance(message.message, RankBeat):
            self._perform(self.replica.receive(message, self._world.now))
            return
        self.feed(message)  # type: ignore[arg-type]
        self._world.faults.reached(type(message.message).__name__, self)

    def _tell(self, message: object) -> None:
        if self.is_alive:
            self.team.to_followers(message)

    def _begin_batch(self) -> Beginning:
        self._perform(self.replica.begin_batch())
        return self.replica.beginning()

    def _end_batch(self, outcome: Outcome) -> None:
        self._perform(self.replica.end_batch(outcome))
        self._finish(outcome)


class FollowerParty(RankParty):
    """Another rank, with a channel to the leader."""

    replica: Follower

    def __init__(self, team: "Team", name: str, rank: int, initial: Weights) -> None:
        super().__init__(team, name, rank, initial)
        self.replica = team.world.follower_type(team.config)
        self.replica.ledger.begin(team.world.now)
        self._wants_to_leave = False

    def start(self) -> None:
        super().start()
        self._beat()

    def connect(self) -> None:
        """It has no link."""

    def stall_link(self, seconds: float, *, up: bool = True, down: bool = True) -> None:
        self.team.stall(self.rank, seconds, up=up, down=down)

    def drain(self) -> None:
        self._wants_to_leave = True

    def hear(self, message: object) -> None:
        if isinstance(message, GroupEnds):
            if not self.replica.has_everyone_left:
                self.team.fail(self, message.detail)
            return
        self.feed(message)  # type: ignore[arg-type]

    def _tell(self, message: object) -> None:
        if self.is_alive:
            self.team.to_leader(self.rank, message)

    def _beat(self) -> None:
        if not self.is_alive:
            return
        if self._world.now < self.frozen_until:
            self._world.at(self.frozen_until, self._beat)
            return
        if self._wants_to_leave:
            self._wants_to_leave = False
            self.feed(AskToLeave())
        self._tell(self.replica.beat(self._world.now))
        self._world.after(self.replica.beat_after_s, self._beat)

    def _begin_batch(self) -> Beginning:
        return self.replica.begin_batch()

    def _end_batch(self, outcome: Outcome) -> None:  # noqa: ARG002 - the leader's counts
        self._is_agreeing = True

    def _agree(self) -> bool:
        outcome = self.replica.end_batch()
        if outcome is None:
            return False
        self._is_agreeing = False
        self._finish(outcome)
        return True
