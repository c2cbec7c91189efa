"""A simulated agent: a node's real machine, the little that an agent does with it, and what is checked of it."""

import math
import random
from collections.abc import Callable
from typing import Protocol

from everstep.core.node import NodeMachine, NodeStage
from everstep.core.node_messages import CloseScope, FromNode, NodeHeartbeat, NodeRefusal, NodeSpec, RoundInfo, ToNode
from everstep.core.types import RendezvousRound
from everstep.sim.checkers import Violation
from everstep.sim.network import Channel, Clock

BEAT_S = 1.5
SILENT_S = 6.0  # of a node, until it is taken for dead
RETRY_S = (0.01, 2.0)  # of a node, until it dials the lighthouse again
LAG_MAX_S = 0.5  # by which every message has arrived for certain


class RoundChecker:
    """What all nodes are told of rounds, and when."""

    def __init__(self) -> None:
        self.rounds: dict[RendezvousRound, RoundInfo] = {}
        self.ranks: dict[RendezvousRound, dict[int, str]] = {}
        self.stores: dict[str, RendezvousRound] = {}
        self.completed_at: dict[RendezvousRound, float] = {}

    def complete(self, name: str, info: RoundInfo, now: float) -> None:
        """A process holds itself to be in this round."""
        first = self.rounds.setdefault(info.round, info)
        self.completed_at.setdefault(info.round, now)
        if (first.size, first.store) != (info.size, info.store):
            raise Violation(f"round {info.round}: {name} was told {info}, another {first}")
        if self.stores.setdefault(info.store, info.round) != info.round:
            raise Violation(f"round {info.round} has the store of round {self.stores[info.store]}, {info.store}")
        ranks = self.ranks.setdefault(info.round, {})
        if not 0 <= info.rank < info.size or ranks.setdefault(info.rank, name) != name:
            raise Violation(f"round {info.round}: rank {info.rank} of {info.size} for {name} and {ranks}")

    def standing(self, members: "list[SimNode]", now: float) -> None:
        """Of those that must have heard by now, all are in one round. Which is newest their numbers do not say: a
        lighthouse that was started again learns the numbers of before only from nodes that come back."""
        heard = [m for m in members if now > m.must_have_heard_at()]
        rounds = {m.machine.last.round: m for m in heard if m.machine.last is not None}
        if len(rounds) > 1 and now > max(self.completed_at[r] for r in rounds) + LAG_MAX_S:
            raise Violation("two rounds stand: " + ", ".join(f"{m.name} in {r}" for r, m in rounds.items()))


class Surroundings(Protocol):
    """What a node needs of its world."""

    rng: random.Random
    clock: Clock
    checker: RoundChecker
    messages: int
    is_lighthouse_up: bool

    def spec_of(self, node_id: str, name: str) -> NodeSpec: ...
    def connect(self, node: "SimNode", /) -> tuple[int, Channel]: ...
    def cut(self, link: int) -> None: ...
    def to_lighthouse(self, link: int, message: FromNode) -> None: ...
    def strikes(self, fault: str) -> bool: ...


class SimNode:
    """An agent's process."""

    def __init__(self, world: Surroundings, node_id: str, name: str) -> None:
        self.world = world
        self.node_id, self.name = node_id, name
        self.machine = NodeMachine("", world.spec_of(node_id, name))
        self.is_alive, self.is_stopped, self.is_ended = True, False, False
        self.link = 0
        self.up_since: float | None = None
        self.welcomed_at = 0.0  # on this link
        self.resumed_at = 0.0
        self.refused: NodeRefusal | None = None
        self._up: Channel | None = None
        self._held: list[Callable[[], None]] = []  # while it is stopped

    def start(self) -> None:
        self.world.clock.after(0, self._dial)
        self._act_later()

    def kill(self) -> None:
        """Its kernel closes its socket, a little later."""
        self.is_alive = False
        link = self.link
        self.world.clock.after(self.world.rng.uniform(0.001, 0.05), lambda: self.world.cut(link))

    def stop(self) -> None:
        self.is_stopped = True

    def resume(self) -> None:
        self.is_stopped = False
        self.resumed_at = self.world.clock.now
        held, self._held = self._held, []
        for call in held:
            self.run(call)

    def must_have_heard_at(self) -> float:
        """From then on it knows which round stands: a lighthouse tells it with the welcome, and lets it wait for that
        only while another process holds its id and is silent."""
        if self.is_stopped or self.up_since is None:
            return math.inf
        if self.machine.is_registered:
            return max(self.welcomed_at, self.resumed_at) + LAG_MAX_S
        return max(self.up_since, self.resumed_at) + SILENT_S + LAG_MAX_S

    def run(self, call: Callable[[], None]) -> None:
        if not self.is_alive:
            return
        if self.is_stopped:
            self._held.append(call)
        else:
            call()

    # ---- link

    def _dial(self) -> None:
        if not self.is_alive or self.is_ended:
            return
        if not self.world.is_lighthouse_up or self.is_stopped:
            self.world.clock.after(self.world.rng.uniform(*RETRY_S), self._dial)
            return
        self.link, self._up = self.world.connect(self)
        self.up_since = self.world.clock.now
        self.send(self.machine.link_up())
        self._beat(self.link)

    def lost(self, link: int) -> None:
        if link == self.link and not self.is_ended:
            self.link, self.up_since = 0, None
            self.machine.link_down()
            self.world.clock.after(self.world.rng.uniform(*RETRY_S), self._dial)

    def _beat(self, link: int) -> None:
        if link == self.link and self.is_alive:
            if not self.is_stopped:
                self.send([NodeHeartbeat()])
            self.world.clock.after(BEAT_S, lambda: self._beat(link))

    def send(self, messages: list[FromNode]) -> None:
        link, up = self.link, self._up
        if not link or up is None:
            return
        for message in messages:
            self.world.messages += 1
            up.send(lambda message=message: self.world.to_lighthouse(link, message))  # type: ignore[misc]

    def heard(self, link: int, message: ToNode) -> None:
        if link != self.link:
            return
        was, was_registered = self.machine.stage, self.machine.is_registered
        self.send(self.machine.receive(message))
        if self.machine.is_registered and not was_registered:
            self.welcomed_at = self.world.clock.now
        if self.machine.stage is NodeStage.MEMBER and was is not NodeStage.MEMBER and self.machine.last is not None:
            self.world.checker.complete(self.name, self.machine.last, self.world.clock.now)
        self._act_later()

    # ---- as an agent does

    def _act_later(self) -> None:
        self.world.clock.after(self.world.rng.uniform(0.0, 0.02), lambda: self.run(self._act))

    def _act(self) -> None:
        machine = self.machine
        refusal = machine.take_refusal()
        if refusal is not None:
            self.refused = refusal.code
            if refusal.code in (NodeRefusal.NODE_ID_TAKEN, NodeRefusal.BAD_CONFIG):
                self.end()
                return
        if machine.closed is not None and machine.closed.scope is CloseScope.JOB:
            return
        if machine.host is not None:
            if self.world.strikes("kill-host"):
                self.kill()
                return
            round_ = machine.host
            self.send(machine.hosted(round_, f"{self.name}/{round_}"))
        if machine.stage is NodeStage.IDLE or machine.needs_new_round:
            self.send(machine.join())

    def end(self) -> None:
        """It exits."""
        self.is_ended, self.is_alive = True, False
        self.world.cut(self.link)

    def leave(self) -> None:
        self.send(self.machine.leave("asked to"))
        self.is_alive = False
        link = self.link
        self.world.clock.after(0.01, lambda: self.world.cut(link))
