"""Agents in the virtual world: one for each place (a rank of a replica group), whatever process runs there.

A death is reported after a while of its own: before the link's end is noticed, or after. An agent vouches for what runs
at its place, ends it when it is told to, loses its link, and dies, and its process with it.
"""

import random
from typing import TYPE_CHECKING

from everstep.core.lighthouse import AgentLinkClosed, AgentMessage
from everstep.core.node import NodeMachine
from everstep.core.node_messages import Fence, FromAgent, FromNode, NodeSpec, ToNode, Vouched, VouchFor, WorkerEnded
from everstep.sim.network import Channel

if TYPE_CHECKING:
    from everstep.sim.party import Party
    from everstep.sim.world import World

REPORT_S = (0.0, 0.03)  # from a death to the report
RECONNECT_S = 0.02
RESTART_S = (0.0, 0.2)  # from the end that the lighthouse ordered to the next start


class Agent:
    """Of one place. Its processes report to it; it lives as long as the world, and forgets all when it dies."""

    def __init__(self, world: "World", name: str, rng: random.Random) -> None:
        self._world = world
        self._name = name
        self._rng = rng
        self._machine = self._new_machine()
        self._parties: dict[str, Party] = {}
        self._link: int | None = None
        self._up: Channel | None = None
        self._down: Channel | None = None
        self._is_connecting = False

    def _new_machine(self) -> NodeMachine:
        return NodeMachine("", NodeSpec(node_id=self._name, nonce=self._name))

    # ---- its link

    def connect(self) -> None:
        if self._link is not None:
            return
        if not self._world.lighthouse.is_up:
            if not self._is_connecting:
                self._is_connecting = True
                self._world.after(RECONNECT_S, self._try_again)
            return
        self._link = self._world.new_link()
        self._up, self._down = self._world.new_channel(), self._world.new_channel()
        self._world.lighthouse.agent_opened(self._link, self)
        self._say(self._machine.link_up())

    def _try_again(self) -> None:
        self._is_connecting = False
        self.connect()

    def link_lost(self, reconnect_after: float = RECONNECT_S) -> None:
        link, self._link = self._link, None
        if link is None or self._up is None or self._down is None:
            return
        self._up.is_open = self._down.is_open = False
        self._machine.link_down()
        self._world.after_delay("notice_of_death", lambda: self._world.lighthouse.agent(AgentLinkClosed(link)))
        self._world.after(reconnect_after, self.connect)

    def stall(self, seconds: float) -> None:
        """It answers too late, and reports late."""
        if self._up is not None:
            self._up.stalled_until = self._world.now + seconds

    def hear(self, link: int, message: ToNode) -> None:
        if link == self._link and self._down is not None:
            self._down.send(lambda: self._arrived(link, message))

    def _arrived(self, link: int, message: ToNode) -> None:
        if link != self._link:
            return
        match message:
            case VouchFor(worker):
                self._say([Vouched(worker, self._state_of(worker))])
            case Fence(worker):
                self._fence(worker)

    def _say(self, messages: list[FromNode]) -> None:
        for message in messages:
            link = self._link
            if isinstance(message, FromAgent) and link is not None and self._up is not None:
                self._world.count_message()
                said = AgentMessage(link, message)
                self._up.send(lambda said=said: self._world.lighthouse.agent(said))  # type: ignore[misc]

    # ---- its processes

    def started(self, party: "Party") -> None:
        self._parties[party.name] = party
        self._say(self._machine.worker_started(party.name))

    def ended(self, party: "Party", is_clean: bool) -> None:
        detail = "exit code 0" if is_clean else "SIGKILL"
        report = WorkerEnded(party.name, detail, is_clean)

        def reported() -> None:
            if self._parties.pop(party.name, None) is not None:
                self._say(self._machine.worker_ended(report))

        self._world.after(self._rng.uniform(*REPORT_S), reported)

    def _state_of(self, worker: str) -> str:
        party = self._parties.get(worker)
        if party is None:
            return ""
        if not party.is_alive:
            return "Z"
        is_stopped = self._world.now < party.frozen_until and self._world.now >= party.held_until
        return "T" if is_stopped else self._rng.choice("RSD")

    def _fence(self, worker: str) -> None:
        party = self._parties.get(worker)
        if party is not None and party.is_alive:
            self._world.faults.done.append(f"kill by fence {worker}")
            self._end(party)

    def _end(self, party: "Party") -> None:
        party.kill()
        self._world.after(self._rng.uniform(*RESTART_S), lambda: self._world.restart(party.replica_id))

    def die(self) -> None:
        """What it runs dies with it, unreported; what started it starts it again."""
        for party in list(self._parties.values()):
            if party.is_alive:
                self._end(party)
        self._parties.clear()
        self._machine = self._new_machine()
        self.link_lost(0.1)


class Agents:
    """All of them; none where the world has no agents."""

    def __init__(self, world: "World", *, are_there: bool) -> None:
        self._world = world
        self.are_there = are_there
        self._rng = random.Random(f"agents {world.seed}")
        self._at: dict[tuple[str, int], Agent] = {}

    def of(self, party: "Party") -> Agent:
        place = party.replica_id, party.rank
        if place not in self._at:
            agent = self._at[place] = Agent(self._world, f"{party.replica_id}/{party.rank}", self._rng)
            agent.connect()
        return self._at[place]

    def started(self, party: "Party") -> None:
        if self.are_there:
            self.of(party).started(party)

    def ended(self, party: "Party") -> None:
        if self.are_there:
            self.of(party).ended(party, bool(getattr(party, "has_left", party.replica.has_left)))
