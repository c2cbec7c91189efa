"""The lighthouse's process in the virtual world, and its disk."""

from typing import TYPE_CHECKING

from everstep.core.events import EventLog
from everstep.core.lighthouse import (
    AgentLinkClosed,
    AgentMessage,
    DrainGroup,
    Event,
    JobConfig,
    LighthouseMachine,
    LinkClosed,
    LinkMessage,
    LinkOpened,
)
from everstep.core.messages import Close, Effect, JournalRecord, Log, Persist, Publish, Send, SendToNodes, ToLighthouse
from everstep.sim.checkers import Violation

if TYPE_CHECKING:
    from everstep.sim.agents import Agent
    from everstep.sim.party import Party
    from everstep.sim.world import World


class LighthouseNode:
    """One lighthouse process after another on one disk. Effects are performed in order; a crash may come in between."""

    def __init__(self, world: "World", config: JobConfig) -> None:
        self._world = world
        self.config = config
        self.disk: JournalRecord | None = None
        self.machine: LighthouseMachine | None = None
        self._stopped_until = 0.0
        self._lives = 0
        self._queue: list[Effect] = []
        self._writing = False
        self._links: dict[int, Party] = {}
        self._agent_links: dict[int, Agent] = {}
        self._tick_at: float | None = None
        self.logs: list[Log] = []
        self.events = EventLog("sim", "sim", 1000)

    @property
    def is_up(self) -> bool:
        return self.machine is not None

    def rounds_opened(self) -> list[Log]:
        """In all of its lives."""
        return [log for log in self.logs if log.event == "round opened"]

    def start(self) -> None:
        self._lives += 1
        self.machine = self._world.lighthouse_type(self.config, self.disk)
        self._perform(self.machine.start(self._world.now))

    def crash(self, *, arrives: bool = False) -> None:
        """`arrives`: what it sent before its death still does, as bytes do that the kernel has taken."""
        self.machine = None
        self._stopped_until = 0.0
        self._queue.clear()
        self._writing = False
        self._tick_at = None
        for link, process in list(self._links.items()):
            if arrives:
                process.link_ends(link, "the lighthouse died")
            else:
                process.link_lost("the lighthouse died")
        self._links.clear()
        agents = list(self._agent_links.values())
        self._agent_links.clear()
        for agent in agents:
            agent.link_lost()

    def stop(self, seconds: float) -> None:
        """The process is stopped and continued: it notices nothing, its clock goes on."""
        self._stopped_until = max(self._stopped_until, self._world.now + seconds)

    def opened(self, link: int, process: "Party") -> None:
        self._links[link] = process
        self._feed(LinkOpened(link))

    def closed(self, link: int, detail: str) -> None:
        if self._links.pop(link, None) is not None:
            self._feed(LinkClosed(link, detail))

    def agent_opened(self, link: int, agent: "Agent") -> None:
        self._agent_links[link] = agent

    def agent(self, event: AgentMessage | AgentLinkClosed) -> None:
        """What an agent says, or its link's end."""
        if event.link in self._agent_links:
            if isinstance(event, AgentLinkClosed):
                del self._agent_links[event.link]
            self._feed(event)

    def drain(self, replica_id: str) -> None:
        """The operator's request."""
        self._feed(DrainGroup(replica_id))

    def message(self, link: int, message: ToLighthouse) -> None:
        if link in self._links:
            self._world.faults.reached(f"lighthouse:{type(message).__name__}", None)
        if link in self._links:
            self._feed(LinkMessage(link, message))

    def _feed(self, event: Event) -> None:
        if self.machine is None:
            return
        if self._world.now < self._stopped_until:
            life = self._lives
            self._world.at(self._stopped_until, lambda: self._feed(event) if life == self._lives else None)
            return
        self._perform(self.machine.receive(event, self._world.now))

    def _perform(self, effects: list[Effect]) -> None:
        self._queue += effects
        self._drain_queue()
        self._arm()

    def _drain_queue(self) -> None:
        while self._queue and not self._writing:
            effect = self._queue.pop(0)
            match effect:
                case Send(message, links):
                    for link in links:
                        process = self._links.get(link)
                        if process is not None:
                            self._world.count_message()
                            process.from_lighthouse(link, message)  # type: ignore[arg-type]
                            self._world.faults.reached(f"lighthouse:sent:{type(message).__name__}", None)
                case SendToNodes(to_agent, links):
                    for link in links:
                        agent = self._agent_links.get(link)
                        if agent is not None:
                            self._world.count_message()
                            agent.hear(link, to_agent)
                case Persist(record):
                    self._write(record)
                    self._world.faults.reached("lighthouse:Persist", None)
                case Close(link, reason):
                    process = self._links.pop(link, None)
                    if process is not None:
                        process.link_ends(link, reason)
                        self._feed(LinkClosed(link, reason))
                case Publish(event):
                    self.events.append(event, self._world.now)
                case Log():
                    self.logs.append(effect)
                    self._world.log("lighthouse", effect)

    def _write(self, record: JournalRecord) -> None:
        self._writing = True
        life = self._lives

        def written() -> None:
            if self.machine is None or life != self._lives:
                return
            self.disk = record
            self._world.faults.reached("lighthouse:Persisted", None)
            if life == self._lives and self.machine is not None:
                self._writing = False
                self._drain_queue()

        self._world.after_delay("fsync", written)

    def _arm(self) -> None:
        if self.machine is None:
            return
        deadline = self.machine.next_deadline()
        if deadline is None or (self._tick_at is not None and self._world.now < self._tick_at <= deadline):
            return
        at = self._tick_at = max(deadline, self._world.now)
        life = self._lives

        def tick() -> None:
            if self.machine is None or life != self._lives or self._tick_at != at:
                return  # another life, or one that was armed since takes its place
            if self._world.now < self._stopped_until:
                self._world.at(self._stopped_until, tick)
                return
            self._tick_at = None
            due = self.machine.next_deadline()
            if due is not None and self._world.now >= due:
                effects = self.machine.tick(self._world.now)
                after = self.machine.next_deadline()
                if after is not None and after <= self._world.now:
                    raise Violation(f"after a tick at {self._world.now} the lighthouse's next deadline is {after}")
                self._perform(effects)
            else:
                self._arm()

        self._world.at(at, tick)
