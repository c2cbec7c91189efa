"""Schedules of a rendezvous: the real machines of nodes and lighthouse, faults from a seed, then peace.

Nodes do as agents do: they join, host a store when they are asked to, and come back whenever a round is over or others
wait. After the faults, everybody who is alive must stand in one round, or beside it as a spare.
"""

import dataclasses
import random
from collections.abc import Callable

from everstep.core.messages import Close, Effect, Log, SendToNodes
from everstep.core.node import NodeStage
from everstep.core.node_messages import CloseScope, FromNode, NodeSpec, ToNode
from everstep.core.rendezvous import NodeLinkClosed, NodeMessage, RendezvousConfig, RendezvousMachine
from everstep.sim.checkers import Violation
from everstep.sim.network import Channel, Clock
from everstep.sim.rendezvous_node import BEAT_S, SILENT_S, RoundChecker, SimNode

HEAL_LIMIT_S = 60.0
EVENTS_MAX = 200_000
DELAY_S = (0.0001, 0.002)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RendezvousOutcome:
    """What a schedule came to."""

    verdict: str
    seed: int
    virtual_s: float
    rounds: int
    messages: int
    faults: tuple[str, ...]

    @property
    def is_ok(self) -> bool:
        return self.verdict == "ok"

    def __str__(self) -> str:
        return (
            f"rendezvous seed {self.seed}: {self.verdict}; {self.rounds} rounds, {self.virtual_s:.1f} s virtual, "
            f"{self.messages} messages, faults: {','.join(self.faults) or 'none'}"
        )


class RendezvousWorld:
    """Everything that one seed determines."""

    def __init__(
        self,
        seed: int,
        *,
        nodes: int = 4,
        faults: int = 6,
        machine_type: type[RendezvousMachine] = RendezvousMachine,
    ) -> None:
        self.seed = seed
        self.rng = random.Random(f"rendezvous {seed}")
        self.clock = Clock()
        self.checker = RoundChecker()
        self.machine_type = machine_type
        self.nodes: dict[str, SimNode] = {}  # by name of the process
        self.messages = 0
        self.trace: Callable[[str], None] | None = None
        self.is_lighthouse_up = False
        self.done: list[str] = []
        self._count = nodes
        self._faults = faults
        self._spares = self.rng.choice((0, 0, 1, 2))
        self._max = max(1, nodes - self._spares)
        self._min = self.rng.randint(1, self._max)
        self._lives = 0
        self._links = 0
        self._starts = 0
        self._by_link: dict[int, tuple[SimNode, Channel]] = {}
        self._machine: RendezvousMachine | None = None
        self._alarm: float | None = None
        self._is_peaceful = False

    def spec_of(self, node_id: str, name: str) -> NodeSpec:
        return NodeSpec(
            node_id=node_id,
            nonce=name,
            min_nodes=self._min,
            max_nodes=self._max,
            join_timeout_s=20.0,
            last_call_s=1.0,
        )

    # ---- the lighthouse

    def start_lighthouse(self) -> None:
        self._lives += 1
        config = RendezvousConfig(
            job_id="sim",
            group="",
            life=f"life{self._lives}",
            is_return=self._lives > 1,
            heartbeat_interval_s=BEAT_S,
            heartbeat_timeout_s=SILENT_S,
        )
        self.is_lighthouse_up = True
        self._machine = self.machine_type(config)
        self._perform(self._machine.start(self.clock.now))

    def kill_lighthouse(self) -> None:
        self.is_lighthouse_up, self._machine = False, None
        for link in list(self._by_link):
            self.cut(link)

    def connect(self, node: SimNode) -> tuple[int, Channel]:
        self._links += 1
        self._by_link[self._links] = (node, self._channel())
        return self._links, self._channel()

    def _channel(self) -> Channel:
        return Channel(self.clock, lambda: self.rng.uniform(*DELAY_S))

    def cut(self, link: int) -> None:
        """Both ends see their link close, each in its own time."""
        node, down = self._by_link.pop(link, (None, None))
        if node is None or down is None:
            return
        down.is_open = False
        self.clock.after(self.rng.uniform(*DELAY_S), lambda: node.run(lambda: node.lost(link)))
        life = self._lives

        def closed() -> None:
            if self._machine is not None and self._lives == life:
                self._perform(self._machine.receive(NodeLinkClosed(link, "cut"), self.clock.now))

        self.clock.after(self.rng.uniform(*DELAY_S), closed)

    def to_lighthouse(self, link: int, message: FromNode) -> None:
        if self._machine is not None and link in self._by_link:
            self._perform(self._machine.receive(NodeMessage(link, message), self.clock.now))

    def _perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case SendToNodes(message, links):
                    for link in links:
                        self._to_node(link, message)
                case Close(link, _):
                    self.cut(link)
                case Log(event, fields) if self.trace is not None:
                    words = " ".join(f"{k}={v}" for k, v in fields.items())
                    self.trace(f"{self.clock.now:9.4f} {event}: {words}")
                case _:
                    pass
        self._arm()

    def _to_node(self, link: int, message: ToNode) -> None:
        node, down = self._by_link.get(link, (None, None))
        if node is not None and down is not None:
            self.messages += 1
            down.send(lambda: node.run(lambda: node.heard(link, message)))

    def _arm(self) -> None:
        deadline = self._machine.next_deadline() if self._machine is not None else None
        if deadline is None or (self._alarm is not None and self._alarm <= deadline):
            return
        self._alarm = deadline
        life = self._lives

        def ring() -> None:
            self._alarm = None
            if self._machine is None or self._lives != life:
                self._arm()
                return
            self._perform(self._machine.tick(self.clock.now))
            again = self._machine.next_deadline()
            if again is not None and again <= self.clock.now:
                raise Violation(f"after a tick at {self.clock.now} the next deadline is {again}")

        self.clock.at(deadline, ring)

    # ---- the schedule

    def start_node(self, node_id: str) -> None:
        self._starts += 1
        name = f"{node_id}@{self._starts}"
        self.nodes[name] = SimNode(self, node_id, name)
        self.nodes[name].start()

    def living(self) -> list[SimNode]:
        return [node for node in self.nodes.values() if node.is_alive]

    def strikes(self, fault: str) -> bool:
        if self._is_peaceful or self.rng.random() > 0.1:
            return False
        self.done.append(fault)
        return True

    def run(self) -> RendezvousOutcome:
        verdict = "ok"
        try:
            self._run_schedule()
        # Boundary of a schedule: whatever a machine or a checker raises is the finding of this seed.
        except Exception as error:
            verdict = f"VIOLATION {type(error).__name__}: {error}"
        return RendezvousOutcome(
            verdict=verdict,
            seed=self.seed,
            virtual_s=self.clock.now,
            rounds=len(self.checker.rounds),
            messages=self.messages,
            faults=tuple(self.done),
        )

    def _run_schedule(self) -> None:
        self.start_lighthouse()
        for i in range(self._count):
            self.clock.after(self.rng.uniform(0, 0.5), lambda i=i: self.start_node(f"node{i}"))  # type: ignore[misc]
        for _ in range(self._faults):
            self._until(self.clock.now + self.rng.choice((0.0, 0.003, 0.05, 0.3, 1.5, 4.0)) * self.rng.random())
            self._strike()
        self._until(self.clock.now + 0.5)
        self._heal()
        self._until(self.clock.now + HEAL_LIMIT_S, self._all_arrived)
        if not self._all_arrived():
            raise Violation("I7 after the faults: " + "; ".join(map(_described, self.living())))
        self._until(self.clock.now + 2 * SILENT_S)
        if not self._all_arrived():
            raise Violation("it did not last: " + "; ".join(map(_described, self.living())))

    def _strike(self) -> None:
        kinds = ("kill", "kill", "stop", "cut", "lighthouse", "twin", "leave", "rejoin", "newcomer", "close")
        fault = self.rng.choices(kinds, (3, 3, 2, 2, 2, 1, 1, 2, 1, 0.3))[0]
        running = [node for node in self.living() if not node.is_stopped]
        self.done.append(fault)
        node = self.rng.choice(running) if running else None
        if fault == "lighthouse" and self.is_lighthouse_up:
            self.kill_lighthouse()
            self.clock.after(self.rng.uniform(0.05, 4.0), self._lighthouse_again)
        elif fault == "newcomer":
            self.start_node(f"node{self._count + self._starts}")
        elif node is None:
            return
        elif fault == "kill":
            node.kill()
            if self.rng.random() < 0.5:
                self.clock.after(self.rng.uniform(0.0, 3.0), lambda: self._again(node.node_id))
        elif fault == "stop":
            node.stop()
            self.clock.after(self.rng.choice((0.2, 5.0, 22.0)), node.resume)
        elif fault == "cut":
            self.cut(node.link)
        elif fault == "twin":
            self.start_node(node.node_id)
        elif fault == "leave":
            node.leave()
        elif fault == "rejoin":
            node.send(node.machine.join())
        elif fault == "close":
            node.send(node.machine.close(self.rng.choice(tuple(CloseScope)), "sim"))

    def _lighthouse_again(self) -> None:
        if not self.is_lighthouse_up:
            self.start_lighthouse()

    def _again(self, node_id: str) -> None:
        if not any(node.node_id == node_id for node in self.living()):
            self.start_node(node_id)

    def _heal(self) -> None:
        self._is_peaceful = True
        self._lighthouse_again()
        self._until(self.clock.now + 23.0)  # everybody that was stopped runs again
        while len({node.node_id for node in self.living()}) < self._min and not self._is_closed():
            self.start_node(f"late{self._starts}")

    def _is_closed(self) -> bool:
        return any(n.machine.closed is not None and n.machine.closed.scope is CloseScope.JOB for n in self.living())

    def _until(self, when: float, is_reached: Callable[[], bool] = lambda: False) -> None:
        while not is_reached():
            if self.clock.events > EVENTS_MAX:
                raise Violation(f"I7 livelock: {EVENTS_MAX} events by {self.clock.now:.3f} s")
            if not self.clock.step(when):
                return
            members = [n for n in self.living() if n.machine.stage is NodeStage.MEMBER]
            self.checker.standing(members, self.clock.now)

    def _all_arrived(self) -> bool:
        living = self.living()
        if self._is_closed():
            return all(n.machine.closed is not None and n.machine.stage is not NodeStage.JOINING for n in living)
        members = [n for n in living if n.machine.stage is NodeStage.MEMBER]
        waiting = [n for n in living if n.machine.stage is NodeStage.JOINING]
        if len({n.machine.last.round for n in members if n.machine.last}) != 1:
            return False
        last = members[0].machine.last
        assert last is not None
        is_full = len(members) == last.size == min(self._max, len(living))
        return is_full and len(members) + len(waiting) == len(living)


def _described(node: SimNode) -> str:
    machine = node.machine
    last = f"{machine.last.round} rank {machine.last.rank}/{machine.last.size}" if machine.last else "none"
    return f"{node.name} {machine.stage.value} link {node.link} last {last} closed {machine.closed is not None}"
