"""A stage for recorded transcripts of one node's restarts: its groups, its workers, and a prompter. See stage.py.

> node POLICY groups=a,b workers=2 max=3        POLICY as --restart-policy; groups=- where there are none
> joined GROUP [restarts=N] [size=N]            its round is complete; where there are no groups, GROUP is -
> ends GROUP RANK 0|CODE|sigNUMBER [steps=N]    a worker of the attempt that runs now; RANK * for all that live
> dissolved GROUP WHY… | closed GROUP REASON… | evicted GROUP | waiting GROUP | link GROUP up|down
> refused GROUP CODE | drain | wait SECONDS
"""

from everstep.core.policies import RestartPolicyName
from everstep.core.restart_budget import BudgetPolicy
from everstep.core.restart_events import (
    Closed,
    CloseGroup,
    DrainAsked,
    Evicted,
    Exit,
    GroupEnded,
    Joined,
    JoinFailed,
    JoinNext,
    LinkChanged,
    NodesWait,
    Report,
    RestartAction,
    RestartEvent,
    RoundOver,
    StartWorkers,
    StopWorkers,
    TellHealth,
    WorkerGone,
)
from everstep.core.restart_policy import RestartConfig, RestartMachine


class RestartStage:
    """`run` performs one command and returns what was written down. Keeps who is alive, and asserts what must hold."""

    def __init__(self) -> None:
        self.now = 0.0
        self._machine: RestartMachine | None = None
        self._workers = 1
        self._attempt: dict[str, int] = {}
        self.alive: dict[str, dict[int, None]] = {}
        self._lines: list[str] = []

    def run(self, command: str) -> str:
        verb, *words = command.split()
        getattr(self, f"_{verb}")(*words)
        lines, self._lines = self._lines, []
        return "\n".join(lines)

    # ---- commands

    def _node(self, policy: str, *more: str) -> None:
        settings = dict(word.split("=") for word in more)
        groups = tuple(_name(name) for name in settings.get("groups", "-").split(","))
        self._workers = int(settings.get("workers", "1"))
        self._attempt, self.alive = {}, {}
        config = RestartConfig(
            groups=groups,
            workers=self._workers,
            policy=RestartPolicyName(policy),
            budget=BudgetPolicy(max_restarts=int(settings.get("max", "0"))),
        )
        self._machine = RestartMachine(config)
        self._perform(self._machine.start(self.now))

    def _joined(self, group: str, *more: str) -> None:
        settings = dict(word.split("=") for word in more)
        self._tell(Joined(_name(group), int(settings.get("restarts", "0")), int(settings.get("size", "1"))))

    def _ends(self, group: str, rank: str, how: str, *more: str) -> None:
        name = _name(group)
        steps = int(dict(word.split("=") for word in more).get("steps", "0"))
        for local_rank in list(self.alive[name]) if rank == "*" else [int(rank)]:
            del self.alive[name][local_rank]
            signal = int(how[3:]) if how.startswith("sig") else None
            code = None if signal is not None else int(how)
            self._tell(
                WorkerGone(
                    group=name,
                    attempt=self._attempt[name],
                    local_rank=local_rank,
                    code=code,
                    signal=signal,
                    steps=steps,
                )
            )

    def _dissolved(self, group: str, *why: str) -> None:
        self._tell(RoundOver(_name(group), " ".join(why)))

    def _closed(self, group: str, *reason: str) -> None:
        is_spare = reason[:1] == ("spare",)
        self._tell(Closed(_name(group), " ".join(reason[is_spare:]), is_spare))

    def _evicted(self, group: str) -> None:
        self._tell(Evicted(_name(group), "nothing heard"))

    def _waiting(self, group: str) -> None:
        self._tell(NodesWait(_name(group)))

    def _link(self, group: str, state: str) -> None:
        self._tell(LinkChanged(_name(group), state == "up"))

    def _refused(self, group: str, code: str) -> None:
        self._tell(JoinFailed(_name(group), int(code), "too few nodes came"))

    def _drain(self) -> None:
        self._tell(DrainAsked("SIGTERM"))

    def _wait(self, seconds: str) -> None:
        assert self._machine is not None
        until = self.now + float(seconds)
        while True:
            deadline = self._machine.next_deadline()
            if deadline is None or deadline > until:
                break
            self.now = max(self.now, deadline)
            self._perform(self._machine.tick(self.now))
            later = self._machine.next_deadline()
            assert later is None or later > self.now, "a deadline that does not go away"
        self.now = until

    # ---- the machine

    def _tell(self, event: RestartEvent) -> None:
        assert self._machine is not None
        self._perform(self._machine.receive(event, self.now))

    def _perform(self, actions: list[RestartAction]) -> None:
        for action in actions:
            self._write(_said(action))
            if isinstance(action, StartWorkers):
                assert not self.alive.get(action.group), "two attempts at once"
                assert action.attempt == self._attempt.get(action.group, 0) + 1
                self._attempt[action.group] = action.attempt
                self.alive[action.group] = dict.fromkeys(range(self._workers))

    def _write(self, line: str) -> None:
        self._lines.append(f"{self.now:7.3f} {line}")


def _name(word: str) -> str:
    return "" if word == "-" else word


def _said(action: RestartAction) -> str:
    match action:
        case JoinNext(group, restarts):
            return f"{group or '-'}: join the next round, after {restarts} restarts"
        case StartWorkers(group, attempt, restarts):
            return f"{group or '-'}: start the workers of attempt {attempt}, after {restarts} restarts"
        case StopWorkers(group, attempt, how):
            return f"{group or '-'}: stop attempt {attempt}: {how.value}"
        case TellHealth(group, health):
            return f"{group or '-'}: this node is {health.value}"
        case CloseGroup(group, reason):
            return f"{group or '-'}: close for all: {reason}"
        case GroupEnded(group, code, why):
            return f"{group or '-'}: ended with {code}{': ' if why else ''}{why}"
        case Exit(code):
            return f"exit {code}"
        case Report(event, fields):
            return f"  says {event}: " + " ".join(f"{key}={value}" for key, value in fields.items() if value != "")
