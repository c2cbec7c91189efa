"""A stage for transcripts with agents: `agents a b` first, then what they know of the processes that run as a and b.

A worker is called `a/1`: the process of actor a, the first that was started.
"""

from everstep.core.agents import AgentLinkClosed, AgentMessage
from everstep.core.messages import Effect, SendToNodes
from everstep.core.node_messages import Fence, FromAgent, ToNode, Vouched, VouchFor, WorkerEnded, WorkersRunning
from tests.core.stage import Stage


class AgentStage(Stage):
    """Each actor that is named in `agents` has an agent of its own, with a link of its own."""

    def __init__(self) -> None:
        super().__init__()
        self._agents: dict[str, int] = {}  # links, 0: down
        self._runs: dict[str, str] = {}  # the newest worker of each
        self._states: dict[str, str] = {}

    def do_agents(self, *names: str) -> None:
        for name in names:
            self._agents.setdefault(name, 0)
            self.do_agent_up(name)

    def do_agent_up(self, name: str) -> None:
        self._links += 1
        self._agents[name] = self._links
        if name in self._runs:
            self._say(name, WorkersRunning((self._runs[name],)))

    def do_agent_down(self, name: str) -> None:
        link, self._agents[name] = self._agents[name], 0
        self._feed_lighthouse(AgentLinkClosed(link))

    def do_ended(self, worker: str, *detail: str) -> None:
        """Its agent reports it. `clean`: it exited with 0."""
        is_clean = detail == ("clean",)
        name = worker.partition("/")[0]
        if self._runs.get(name) == worker:
            del self._runs[name]
        self._say(name, WorkerEnded(worker, "exit code 0" if is_clean else " ".join(detail), is_clean))

    def do_state(self, name: str, state: str) -> None:
        """What its agent finds when it is asked: a letter, `gone`, or `unknown`, which is no answer."""
        self._states[name] = state

    def _workers_of(self, process: str) -> tuple[str, ...]:
        name = process.partition("/")[0]
        if name in self._agents:
            self._runs[name] = process
            if self._agents[name]:
                self._say(name, WorkersRunning((process,)))
        return (process,)

    def _lighthouse_did(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, SendToNodes):
                for name in [name for name, link in self._agents.items() if link in effect.links]:
                    self._write(f"    lighthouse -> agent of {name}: {_described(effect.message)}")
                    self._hear(name, effect.message)
            else:
                super()._lighthouse_did([effect])

    def _hear(self, name: str, message: ToNode) -> None:
        state = self._states.get(name, "S")
        if isinstance(message, VouchFor) and state != "unknown":
            self._say(name, Vouched(message.worker, "" if state == "gone" else state))

    def _say(self, name: str, message: FromAgent) -> None:
        self._write(f"agent of {name} -> {_described(message)}")
        self._feed_lighthouse(AgentMessage(self._agents[name], message))


def _described(message: object) -> str:
    kind = type(message).__name__
    match message:
        case WorkersRunning(workers):
            return f"{kind} {' '.join(workers)}"
        case WorkerEnded(worker, detail):
            return f"{kind} {worker}: {detail}"
        case Vouched(worker, state):
            return f"{kind} {worker}: {state or 'gone'}"
        case VouchFor(worker) | Fence(worker):
            return f"{kind} {worker}"
    return kind
