"""Replica groups of several ranks in the virtual world: their channels, and how a group lives and dies as one.

One ordered channel leads from the leader to each follower and one back; it is never repaired. What started the group
(torchrun) sees a rank die after a while, ends the rest of it, and starts it anew.
"""

import random
from collections.abc import Callable
from typing import TYPE_CHECKING

from everstep.core.group import Batch, Beginning, FromRank, GroupEnds, Outcome
from everstep.core.moves import ReplicaConfig
from everstep.core.types import Lineage, RefusalCode, natural_key
from everstep.sim.checkers import Violation, Weights
from everstep.sim.group_rank import GroupRank
from everstep.sim.network import Channel
from everstep.sim.party import Party
from everstep.sim.ranks import RankParty

if TYPE_CHECKING:
    from everstep.sim.faults import Injector
    from everstep.sim.world import World

GROUP_ENDS_S = 2.0  # after the death of a rank, unless a rank is stopped or a channel stalls
AGENT_S = (0.1, 0.5, 3.0, 6.0)  # until torchrun has ended the rest of the group, and starts it again


class Team:
    """One start of a group."""

    def __init__(self, world: "World", name: str, config: ReplicaConfig, initial: Weights) -> None:
        self.world = world
        self.name = name
        self.config = config
        leader_type, follower_type = world.rank_types
        self.leader = leader_type(self, name, initial)
        self.followers = [follower_type(self, f"{name}/{rank}", rank, initial) for rank in range(1, world.ranks)]
        self.parties: list[RankParty] = [self.leader, *self.followers]
        self.ends_at: int | None = None  # the step at which the script's loop is done
        self._up = {party.rank: world.new_channel() for party in self.followers}
        self._down = {party.rank: world.new_channel() for party in self.followers}
        self._ended: dict[int, tuple[Batch, Outcome, Lineage | None]] = {}  # by the leader's script, by number
        self._begun: dict[int, Beginning] = {}  # by number
        self._together: dict[str, dict[int, tuple[object, Callable[[], None]]]] = {}
        self._has_failed = False
        self._has_silent_end = False  # of a rank, whose connections stay open

    def start(self) -> None:
        for party in self.parties:
            party.start()

    @property
    def is_alive(self) -> bool:
        return any(party.is_alive for party in self.parties)

    # ---- the channels

    def to_leader(self, rank: int, message: object) -> None:
        self.world.count_message()
        event = FromRank(rank, message)  # type: ignore[arg-type]
        self._up[rank].send(lambda: self.leader.deliver(lambda: self.leader.hear(event)))

    def to_followers(self, message: object) -> None:
        for party in self.followers:
            self.world.count_message()
            self._down[party.rank].send(lambda p=party: p.deliver(lambda: p.hear(message)))  # type: ignore[misc]

    def stall(self, rank: int, seconds: float, *, up: bool, down: bool) -> None:
        for channel, is_stalled in ((self._up[rank], up), (self._down[rank], down)):
            if is_stalled:
                channel.stalled_until = self.world.now + seconds

    # ---- its life

    def rank_ended(self, ended: GroupRank, *, is_noticed: bool) -> None:
        """The others see the connection close after what was sent on it, or instead of the last of it."""
        self._has_silent_end = self._has_silent_end or not is_noticed
        if not ended.has_left and not self._has_failed:
            self._has_failed = True
            self._check_that_it_ends(is_noticed)
            self.world.after(self.world.rng.choice(AGENT_S), self._agent_acts)
        if not is_noticed:
            return
        ways = [
            (peer, self._down[peer.rank] if ended is self.leader else self._up[ended.rank])
            for peer in (self.followers if ended is self.leader else [self.leader])
        ]
        for peer, channel in ways:
            self._close(channel, peer, ended)

    def _close(self, channel: Channel, peer: RankParty, ended: GroupRank) -> None:
        def closed() -> None:
            peer.deliver(lambda: peer.lose(ended))

        if self.world.rng.random() < 0.5 and not ended.has_left:
            channel.is_open = False
            self.world.after_delay("notice_of_death", closed)
        else:
            self.world.after_delay("notice_of_death", lambda: channel.send(closed))

    def fail(self, party: GroupRank, detail: str) -> None:
        """`party` saw another rank's end: it cuts everything and goes; a leader tells the others."""
        if party is self.leader:
            self.to_followers(GroupEnds(detail))
        party.kill()

    def give_up(self, party: RankParty) -> None:
        """The lighthouse turned the group away."""
        refusal = party.replica.refusal
        if refusal is None or refusal.code is not RefusalCode.STUCK:
            self._has_failed = True  # nobody starts it again
        party.kill()

    def _agent_acts(self) -> None:
        self.reap()
        if self.world.processes[self.config.replica_id] is self.leader:
            self.world.start_process(self.config.replica_id)

    def reap(self) -> None:
        for party in self.parties:
            party.kill(is_noticed=True)

    def _check_that_it_ends(self, is_noticed: bool) -> None:
        now = self.world.now
        channels = (*self._up.values(), *self._down.values())

        def check() -> None:
            is_hindered = (
                self._has_silent_end
                or any(p.frozen_until > now for p in self.parties)
                or any(c.stalled_until > now for c in channels)
            )
            if not is_hindered and self.is_alive:
                alive = [party.name for party in self.parties if party.is_alive]
                raise Violation(f"a rank of {self.name} died {GROUP_ENDS_S:g} s ago, and {alive} go on")

        if is_noticed:
            self.world.after(GROUP_ENDS_S, check)

    # ---- what the ranks' scripts do together

    def began(self, rank: str, number: int, begun: Beginning) -> None:
        """What a rank draws depends on who is in the quorum."""
        known = self._begun.setdefault(number, begun)
        if known != begun:
            raise Violation(f"{rank} begins batch {number} as {begun}, another rank of its group as {known}")

    def together(self, what: str, party: RankParty, value: object, then: Callable[[], None]) -> None:
        """The script's own collective among these ranks: each issues it, and it must be about the same thing."""
        arrived = self._together.setdefault(what, {})
        for other, _ in arrived.values():
            if other != value:
                raise Violation(f"the ranks of {self.name} prepare for {other} and {value}")
        arrived[party.rank] = (value, then)
        if len(arrived) == len(self.parties):
            for _, resume in self._together.pop(what).values():
                self.world.after_delay("collective", resume)

    def ended(self, party: RankParty, number: int, batch: Batch, outcome: Outcome) -> Lineage | None:
        """Every rank's batch of this number ended alike. Returns the lineage that it committed to."""
        if party is self.leader:
            self._ended[number] = (batch, outcome, self.leader.replica.lineage)
        if number not in self._ended:
            raise Violation(f"{party.name} ends batch {number} before its leader")
        if self._ended[number][:2] != (batch, outcome):
            raise Violation(f"{party.name} ends batch {number} as {batch}, {outcome}; its leader {self._ended[number]}")
        if not outcome.committed and party.replica.evictions == batch.evictions:
            self.world.aborted(party.name, batch.step)
        return self._ended[number][2]


class Script:
    """What the training script does in each step; the same on every rank but where it `divides`."""

    def __init__(self, seed: int, faults: "Injector", *, is_sharded: bool) -> None:
        self._rng = random.Random(f"script {seed}")
        self._faults = faults
        self.has_before_step = self._rng.random() < 0.5
        self.divides = self._rng.random() < 0.3
        self.is_sharded = is_sharded  # its forward pass has a collective among the ranks of its group

    def reductions_of(self, step: int) -> int:
        return 2 if step % 3 == 2 else 1

    def completes_first(self, step: int) -> bool:
        """Whether it waits for its reductions, and computes on, before it comes to the vote."""
        return step % 4 == 1

    def is_together(self) -> bool:
        """Whether this rank's step has its collective among the ranks: a GradScaler may skip it on one of them."""
        skips = self.divides and not self._faults.is_calm and self._rng.random() < 0.05
        return self.has_before_step and not skips


class Teams:
    """All groups of several ranks; none where every group is one process."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self._newest: dict[str, Team] = {}
        self._starts: dict[str, int] = {}

    def starts_of(self, replica_id: str) -> int:
        return self._starts.get(replica_id, 0)

    def start(self, name: str, config: ReplicaConfig, initial: Weights) -> Party:
        team = Team(self._world, name, config, initial)
        self._newest[config.replica_id] = team
        self._starts[config.replica_id] = self.starts_of(config.replica_id) + 1
        team.start()
        return team.leader

    def reap(self, replica_id: str) -> None:
        if replica_id in self._newest:
            self._newest[replica_id].reap()

    def everyone(self) -> list[RankParty]:
        return [party for team in self._newest.values() for party in team.parties if party.is_alive]

    def followers(self) -> list[RankParty]:
        """Alive, of groups whose leaders are."""
        alive = (p for team in self._newest.values() if team.leader.is_alive for p in team.followers if p.is_alive)
        return sorted(alive, key=lambda party: natural_key(party.name))

    def have_arrived(self, goal: int) -> bool:
        """Every rank of a living group is alive, at the step, and in its leader's quorum."""
        for team in self._newest.values():
            if not team.leader.is_alive:
                continue
            for party in team.followers:
                replica, leader = party.replica, team.leader.replica
                if not party.is_alive or replica.step < goal or replica.quorum is None or leader.quorum is None:
                    return False
                if replica.quorum.id != leader.quorum.id:
                    return False
        return True
