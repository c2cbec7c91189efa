"""A stage for recorded transcripts of a rendezvous: one lighthouse, some nodes, and a prompter. See stage.py.

> nodes MIN MAX [ranks=POLICY] [healthy=N]     what the nodes that start from now on want
> start a b …                      each connects and joins; NAME/TEXT starts a second process, NAME=3 has number 3
> restart a                        its workers failed: it wants the next round, knowing of one more restart
> stand a finished|unhealthy|healthy
> join a … | leave a | close a round|job | kill a | cut a | connect a | stop a | resume a
> hold a … | release a …           what a hears waits / arrives
> hosting no|yes                   whether nodes open the store they are asked for, at once
> report a suspected|cleared|hung [CULPRIT]     the monitor of a's agent says so of its rank 3
> saw a step=2.5 …                 so long were ranks of a in these sections
> exclude a | admit a              a script on a asks for it / the operator lets a in again
> wait SECONDS | lighthouse restart | store a OP KEY [VALUE]
"""

import dataclasses

from everstep.core.events import JobEvent
from everstep.core.messages import Close, Effect, Log, Publish, SendToNodes
from everstep.core.node import NodeMachine
from everstep.core.node_messages import (
    CloseScope,
    FromNode,
    NodeHealth,
    NodeHeartbeat,
    NodeSpec,
    RankNews,
    RankReport,
    SeenInterval,
    StoreCall,
    StoreOp,
    StoreReply,
    ToNode,
)
from everstep.core.ranks import RankPolicy
from everstep.core.rendezvous import AdmitNode, NodeLinkClosed, NodeMessage, RendezvousConfig, RendezvousMachine


@dataclasses.dataclass
class NodeActor:
    name: str
    machine: NodeMachine
    link: int = 0
    is_stopped: bool = False
    is_held: bool = False
    inbox: list[ToNode] = dataclasses.field(default_factory=list)


class RendezvousStage:
    """`run` performs one command and returns what was written down."""

    def __init__(self) -> None:
        self.now = 0.0
        self.actors: dict[str, NodeActor] = {}
        self._lives = 0
        self._links = 0
        self._calls = 0
        self._lines: list[str] = []
        self._hosts = True
        self._wants = NodeSpec(node_id="", nonce="", join_timeout_s=30.0, last_call_s=5.0)
        self._machine = self._new_machine(is_return=False)

    def run(self, command: str) -> str:
        verb, *words = command.split()
        getattr(self, f"_{verb}")(*words)
        self._settle()
        lines, self._lines = self._lines, []
        return "\n".join(lines)

    # ---- commands

    def _nodes(self, least: str, most: str, *more: str) -> None:
        settings = dict(word.split("=") for word in more)
        self._wants = NodeSpec(
            node_id="",
            nonce="",
            min_nodes=int(least),
            max_nodes=int(most),
            join_timeout_s=30.0,
            last_call_s=5.0,
            ranks=RankPolicy(settings.get("ranks", "previous")),
            min_healthy=int(settings.get("healthy", "0")),
        )

    def _start(self, *names: str) -> None:
        for word in names:
            name, _, number = word.partition("=")
            spec = NodeSpec(
                node_id=name.partition("/")[0],
                nonce=f"process of {name}",
                min_nodes=self._wants.min_nodes,
                max_nodes=self._wants.max_nodes,
                join_timeout_s=self._wants.join_timeout_s,
                last_call_s=self._wants.last_call_s,
                ranks=self._wants.ranks,
                min_healthy=self._wants.min_healthy,
                infrastructure_rank=int(number) if number else None,
            )
            actor = self.actors[name] = NodeActor(name, NodeMachine("", spec))
            actor.machine.join()
            self._connect(name)
            self._settle()

    def _connect(self, *names: str) -> None:
        for name in names:
            actor = self.actors[name]
            self._links += 1
            actor.link = self._links
            self._say(actor, actor.machine.link_up())

    def _join(self, *names: str) -> None:
        for name in names:
            actor = self.actors[name]
            self._told(actor)
            self._say(actor, actor.machine.join())
            self._settle()

    def _restart(self, name: str) -> None:
        machine = self.actors[name].machine
        self._say(self.actors[name], machine.join(machine.restarts + 1))

    def _stand(self, name: str, health: str) -> None:
        self._say(self.actors[name], self.actors[name].machine.stand(NodeHealth(health)))

    def _report(self, name: str, news: str, culprit: str = "") -> None:
        actor = self.actors[name]
        is_hung = news == "hung"
        report = RankReport(
            news=RankNews(news),
            rank="rank 3",
            detail="it moves on" if news == "cleared" else "section 'step' open",
            section="" if news == "cleared" else "step",
            age_s=0.0 if news == "cleared" else 30.0 if is_hung else 15.0,
            culprit=culprit,
            stacks="stacks" if is_hung else "",
        )
        self._say(actor, actor.machine.report_rank(report))

    def _saw(self, name: str, *words: str) -> None:
        pairs = [word.split("=") for word in words]
        intervals = tuple(SeenInterval(key, float(seconds)) for key, seconds in pairs)
        self._say(self.actors[name], self.actors[name].machine.saw(intervals))

    def _exclude(self, name: str) -> None:
        self._say(self.actors[name], self.actors[name].machine.exclude("a broken GPU"))

    def _admit(self, node_id: str) -> None:
        self._perform(self._machine.receive(AdmitNode(node_id), self.now))

    def _leave(self, name: str) -> None:
        self._say(self.actors[name], self.actors[name].machine.leave("asked to"))

    def _close(self, name: str, scope: str) -> None:
        self._say(self.actors[name], self.actors[name].machine.close(CloseScope(scope), "asked to"))

    def _kill(self, *names: str) -> None:
        self._cut(*names)
        for name in names:
            del self.actors[name]

    def _cut(self, *names: str) -> None:
        for name in names:
            actor = self.actors[name]
            link, actor.link, actor.inbox = actor.link, 0, []
            actor.machine.link_down()
            self._perform(self._machine.receive(NodeLinkClosed(link, "closed"), self.now))

    def _stop(self, name: str) -> None:
        self.actors[name].is_stopped = True

    def _resume(self, name: str) -> None:
        self.actors[name].is_stopped = False

    def _hold(self, *names: str) -> None:
        for name in names:
            self.actors[name].is_held = True

    def _release(self, *names: str) -> None:
        for name in names:
            self.actors[name].is_held = False

    def _hosting(self, answer: str) -> None:
        self._hosts = answer == "yes"

    def _store(self, name: str, op: str, *words: str) -> None:
        actor = self.actors[name]
        assert actor.machine.last is not None
        self._calls += 1
        keys, values = words[:1], tuple(word.encode() for word in words[1:])
        self._say(actor, [StoreCall(self._calls, actor.machine.last.round, StoreOp(op), keys, values)])

    def _lighthouse(self, _restart: str) -> None:
        for actor in self.actors.values():
            actor.link, actor.inbox = 0, []
            actor.machine.link_down()
        self._machine = self._new_machine(is_return=True)

    def _wait(self, seconds: str) -> None:
        """With a heartbeat of everybody that is not stopped each second."""
        until = self.now + float(seconds)
        while self.now < until:
            deadline = self._machine.next_deadline()
            beat = float(int(self.now) + 1)
            self.now = min(until, beat, deadline if deadline is not None else until)
            self._perform(self._machine.tick(self.now))
            for actor in self.actors.values():
                if actor.link and not actor.is_stopped and self.now == beat:
                    self._perform(self._machine.receive(NodeMessage(actor.link, NodeHeartbeat()), self.now))
            self._settle()

    # ---- the lighthouse

    def _new_machine(self, is_return: bool) -> RendezvousMachine:
        self._lives += 1
        life = f"life{self._lives}"
        machine = RendezvousMachine(RendezvousConfig(job_id="job", group="", life=life, is_return=is_return))
        self._perform(machine.start(self.now))
        return machine

    def _perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case SendToNodes(message, links):
                    to = [actor for link in links for actor in self.actors.values() if actor.link == link]
                    if to and not isinstance(message, StoreReply):
                        self._write(f"lighthouse -> {','.join(a.name for a in to)}: {_said(message)}")
                    for actor in to:
                        actor.inbox.append(message)
                case Close(link, reason):
                    for actor in self.actors.values():
                        if actor.link == link:
                            self._write(f"lighthouse closes the link of {actor.name}: {reason}")
                            self._cut(actor.name)
                case Log(event, fields):
                    words = " ".join(f"{key}={value}" for key, value in fields.items() if value != "")
                    self._write(f"    logs {event}: {words}")
                case Publish(event):
                    self._write(f"    publishes {event.kind.value}{_of_rank(event)}")

    def _settle(self) -> None:
        """Messages travel until nothing moves."""
        while True:
            ready = [a for a in self.actors.values() if a.inbox and not a.is_stopped and not a.is_held]
            if not ready:
                return
            actor = ready[0]
            message = actor.inbox.pop(0)
            if isinstance(message, StoreReply):
                self._write(f"{actor.name} gets {_said(message)}")
            self._say(actor, actor.machine.receive(message))
            self._told(actor)
            if actor.machine.host is not None and self._hosts:
                round_ = actor.machine.host
                self._say(actor, actor.machine.hosted(round_, f"{actor.name}:{29500 + round_.n}"))

    def _told(self, actor: NodeActor) -> None:
        refusal = actor.machine.take_refusal()
        if refusal is not None:
            self._write(f"{actor.name} raises {refusal.code.value}: {refusal.detail}")

    def _say(self, actor: NodeActor, messages: list[FromNode]) -> None:
        for message in messages:
            if actor.link:
                self._write(f"{actor.name} -> {_said(message)}")
                self._perform(self._machine.receive(NodeMessage(actor.link, message), self.now))

    def _write(self, line: str) -> None:
        self._lines.append(line if line.startswith(" ") else f"{self.now:7.3f} {line}")


def _of_rank(event: JobEvent) -> str:
    if not event.rank:
        return ""
    culprit = f", waits for {event.culprit}" if event.culprit else ""
    return f": {event.rank} of node {event.node}, {event.evidence}, {event.age_s:g} s{culprit}; stacks {event.stacks!r}"


def _said(message: object) -> str:
    """The name and what is not at its default, in few words."""
    words = []
    for name in message.__struct_fields__:  # type: ignore[attr-defined]
        value = getattr(message, name)
        if name in ("node", "heartbeat_interval_s", "heartbeat_timeout_s", "group", "nonce") or value in (
            "",
            None,
            False,
            0,
            (),
        ):
            continue
        if name == "intervals":
            value = " ".join(f"{one.key}={one.longest_s:g}" for one in value)
        if name in ("info", "last"):
            again = f" restarts {value.restarts}" if value.restarts else ""
            value = f"{value.round} rank {value.rank} of {value.size} store {value.store}{again}"
        words.append(f"{name}={value.value if hasattr(value, 'value') else value}")
    return f"{type(message).__name__} {' '.join(words)}".strip()
