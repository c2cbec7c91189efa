"""When the workers of a node start, stop, and start again: one node's view of its groups' attempts.

    JOINING    asked for the next round; no worker runs
    RUNNING    the workers of this attempt were started; some may have ended cleanly
    STOPPING   they were told to end; what comes then is known already
    PAUSING    none runs; the next round is asked for when the pause is over
    FINISHED   all of this node's workers ended cleanly; the others' are still at work
    ENDED      for good, with an exit code

A worker's failure restarts: with ANY_FAILED every group of this node, with GROUP its own group, on all nodes of their
rounds; with MIN_HEALTHY nothing, until the lighthouse says that the round is over because too few nodes are healthy.
Only failures use up the budget: a round that others dissolve, nodes that come, an eviction do not. A worker that exits
with one of NEVER_AGAIN ends its group, everywhere. A group's end by failure is told to its other nodes as the reason
for which the rendezvous is closed, and they exit with the same code.
"""

import dataclasses
import enum
import re
from collections.abc import Callable

from everstep.core.node_messages import NodeHealth
from everstep.core.policies import RestartPolicyName
from everstep.core.restart_budget import BudgetPolicy, Exhausted, RestartBudget
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
    Stop,
    StopWorkers,
    TellHealth,
    WorkerGone,
)
from everstep.core.types import LocalProtocolError

CODE_OK = 0
CODE_FAILED = 1
CODE_DRAINED = 92
ALL_FINISHED = "its only node has finished"
CODE_CONFIGURATION = 90
CODE_UNREACHABLE = 91
CODE_DO_NOT_RESTART = 93
NEVER_AGAIN = (CODE_CONFIGURATION, CODE_DO_NOT_RESTART)  # what a worker exits with that would fail again


class AttemptStage(enum.Enum):
    """Of one group on this node."""

    JOINING = "joining"
    RUNNING = "running"
    STOPPING = "stopping"
    PAUSING = "pausing"
    FINISHED = "finished"
    ENDED = "ended"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RestartConfig:
    """`workers`: of each group on this node. Seconds."""

    groups: tuple[str, ...]
    workers: int
    policy: RestartPolicyName
    budget: BudgetPolicy
    shutdown_timeout_s: float = 30.0  # from Stop.ASK to Stop.KILL
    drain_timeout_s: float | None = None  # the same where the node goes by itself; None: no other
    abandon_s: float = 30.0  # from Stop.KILL until workers that do not end are given up, and their group with them
    alone_s: float = 60.0  # without a lighthouse, after its own workers finished, until a node goes


@dataclasses.dataclass
class _Group:
    name: str
    stage: AttemptStage = AttemptStage.JOINING
    attempt: int = 0
    size: int = 1  # nodes in its round
    alive: dict[int, None] = dataclasses.field(default_factory=dict)
    failures: int = 0  # workers that failed in this attempt, and were not told to end
    started_at: float = 0.0
    steps: int = 0  # the most that a worker of this attempt committed
    reached: int = 0  # the furthest step of one
    kill_at: float | None = None
    abandon_at: float | None = None
    resume_at: float = 0.0  # when it may ask for the next round
    code: int | None = None  # to end with once its workers are gone; None: it goes on
    why: str = ""
    is_killed: bool = False
    link_lost_at: float | None = None
    is_closed: bool = False  # its rendezvous: there is no next round


class RestartMachine:
    """Events in, actions out, in order. After `Exit` nothing comes any more."""

    def __init__(self, config: RestartConfig) -> None:
        if not config.groups or config.workers < 1:
            raise LocalProtocolError("a node without groups or workers")
        self._config = config
        self._budget = RestartBudget(config.budget)
        self._groups = {name: _Group(name) for name in config.groups}
        self._is_draining = False
        self._is_over = False

    # ---- the machine contract

    def start(self, now: float) -> list[RestartAction]:
        del now
        return [JoinNext(name, 0) for name in self._groups]

    def receive(self, event: RestartEvent, now: float) -> list[RestartAction]:
        if self._is_over:
            return []
        if isinstance(event, DrainAsked):
            return self._drain(event, now) + self.tick(now)
        group = self._groups.get(event.group)
        if group is None:
            raise LocalProtocolError(f"no group {event.group!r} here")
        return self._about(group, event, now) + self.tick(now)

    def tick(self, now: float) -> list[RestartAction]:
        out: list[RestartAction] = []
        for group in self._groups.values():
            out += self._tick(group, now)
        return out + self._exit_if_over()

    def next_deadline(self) -> float | None:
        deadlines = [self._deadline(group) for group in self._groups.values()]
        return min((d for d in deadlines if d is not None), default=None)

    # ---- for people and tests

    def stage(self, group: str) -> AttemptStage:
        return self._groups[group].stage

    @property
    def restarts_used(self) -> int:
        return self._budget.used

    # ---- events

    def _about(self, group: _Group, event: RestartEvent, now: float) -> list[RestartAction]:
        match event:
            case Joined():
                return self._joined(group, event, now)
            case WorkerGone():
                return self._gone(group, event, now)
            case RoundOver(_, why):
                return self._round_over(group, why, now)
            case NodesWait():
                if group.stage is AttemptStage.RUNNING and self._config.policy is not RestartPolicyName.MIN_HEALTHY:
                    return self._restart(group, "nodes wait for which there is room", now)
            case Closed(_, reason, was_spare):
                return self._closed(group, reason, was_spare, now)
            case Evicted(_, why):
                return self._round_over(group, f"this node was evicted: {why}", now)
            case JoinFailed(_, code, why):
                if group.stage is AttemptStage.JOINING:
                    return self._end(group, code, why)
            case LinkChanged(_, is_open):
                group.link_lost_at = None if is_open else now
        return []

    def _joined(self, group: _Group, joined: Joined, now: float) -> list[RestartAction]:
        if group.stage is not AttemptStage.JOINING:
            return []
        self._budget.agreed(group.name, joined.restarts)
        group.size = joined.size
        group.stage, group.attempt, group.started_at = AttemptStage.RUNNING, group.attempt + 1, now
        group.alive = dict.fromkeys(range(self._config.workers))
        group.failures, group.steps, group.reached, group.is_killed = 0, 0, 0, False
        group.kill_at = group.abandon_at = None
        return [StartWorkers(group.name, group.attempt, self._budget.restarts(group.name))]

    def _gone(self, group: _Group, gone: WorkerGone, now: float) -> list[RestartAction]:
        if gone.attempt != group.attempt or gone.local_rank not in group.alive:
            return []
        del group.alive[gone.local_rank]
        group.steps, group.reached = max(group.steps, gone.steps), max(group.reached, gone.reached)
        match group.stage:
            case AttemptStage.STOPPING:
                if gone.code in NEVER_AGAIN and group.code in (None, CODE_DRAINED):
                    group.code, group.why = gone.code, _how(gone)
                return self._stopped(group, now) if not group.alive else []
            case AttemptStage.RUNNING:
                return self._finished(group) if gone.is_clean else self._failed(group, gone, now)
        return []

    def _finished(self, group: _Group) -> list[RestartAction]:
        if group.alive or group.failures:
            return []
        if group.is_closed:
            return self._end(group, CODE_OK, "")
        if group.size == 1:
            group.is_closed = True
            return [CloseGroup(group.name, ALL_FINISHED), *self._end(group, CODE_OK, "")]
        group.stage = AttemptStage.FINISHED
        return [TellHealth(group.name, NodeHealth.FINISHED)]

    def _failed(self, group: _Group, gone: WorkerGone, now: float) -> list[RestartAction]:
        group.failures += 1
        why = _how(gone)
        if gone.code in NEVER_AGAIN:
            assert gone.code is not None
            return self._give_up(group, gone.code, why, now)
        if self._config.policy is RestartPolicyName.MIN_HEALTHY and not group.is_closed:
            return [TellHealth(group.name, NodeHealth.UNHEALTHY)] if group.failures == 1 else []
        return self._ask_budget(group, why, now)

    def _ask_budget(self, group: _Group, why: str, now: float) -> list[RestartAction]:
        if group.is_closed:
            return self._give_up(group, CODE_FAILED, f"{why}; its rendezvous is closed", now)
        answer = self._budget.ask(group.name, now - group.started_at, group.steps, group.reached)
        if isinstance(answer, Exhausted):
            code = CODE_DO_NOT_RESTART if answer.was_given else CODE_FAILED  # as torchrun's, where none was asked for
            return self._give_up(group, code, f"{why}; {answer.why}", now)
        out: list[RestartAction] = []
        for other in self._reached(group):
            if other is group or other.stage in (AttemptStage.RUNNING, AttemptStage.FINISHED):
                other.resume_at = now + answer.pause_s
                out += self._restart(other, why, now)
        return out

    def _reached(self, group: _Group) -> list[_Group]:
        """Whom a failure of this group concerns."""
        return list(self._groups.values()) if self._config.policy is RestartPolicyName.ANY_FAILED else [group]

    def _round_over(self, group: _Group, why: str, now: float) -> list[RestartAction]:
        if group.stage is AttemptStage.RUNNING and group.failures:
            return self._ask_budget(group, why, now)  # MIN_HEALTHY: what failed here is now to start again
        if group.stage in (AttemptStage.RUNNING, AttemptStage.FINISHED):
            return self._restart(group, why, now)
        if group.stage is AttemptStage.JOINING:
            return [JoinNext(group.name, self._budget.restarts(group.name))]
        return []

    def _closed(self, group: _Group, reason: str, was_spare: bool, now: float) -> list[RestartAction]:
        group.is_closed = True
        code = code_in(reason)
        match group.stage:
            case AttemptStage.RUNNING if code is not None:
                return self._stop(group, code, f"closed by {reason}", now)
            case AttemptStage.RUNNING if group.failures and not group.alive:
                return self._end(group, CODE_OK, "")  # MIN_HEALTHY: the others have done its work
            case AttemptStage.STOPPING if group.code is None:
                group.code, group.why = code if code is not None else CODE_FAILED, f"closed by {reason}"
            case AttemptStage.FINISHED:
                return self._end(group, code or CODE_OK, f"closed by {reason}" if code else "")
            case AttemptStage.JOINING | AttemptStage.PAUSING:
                # A spare was not needed. Else this node came too late, or was to start again.
                fallback = CODE_OK if was_spare else CODE_FAILED
                return self._end(group, code if code is not None else fallback, f"closed by {reason}")
        return []

    def _drain(self, event: DrainAsked, now: float) -> list[RestartAction]:
        out: list[RestartAction] = [Report("drain", {"why": event.why, "again": self._is_draining})]
        for group in self._groups.values():
            match group.stage:
                case AttemptStage.RUNNING:
                    out += self._stop(group, CODE_DRAINED, event.why, now)
                case AttemptStage.STOPPING:
                    group.code = CODE_DRAINED if group.code is None else group.code
                    if self._is_draining:
                        out += self._kill(group, now)
                case AttemptStage.FINISHED:
                    out += self._end(group, CODE_OK, "")
                case AttemptStage.JOINING | AttemptStage.PAUSING:
                    out += self._end(group, CODE_DRAINED, event.why)
        self._is_draining = True
        return out

    # ---- moves

    def _restart(self, group: _Group, why: str, now: float) -> list[RestartAction]:
        pause_s = max(0.0, group.resume_at - now)
        count = self._budget.restarts(group.name)
        fields: dict[str, object] = {"group": group.name, "why": why, "restarts": count, "pause_s": round(pause_s, 1)}
        out: list[RestartAction] = [Report("restart", fields)]
        if group.stage is AttemptStage.RUNNING and group.alive:
            return out + self._begin_stop(group, now)
        return out + self._stopped(group, now)

    def _give_up(self, group: _Group, code: int, why: str, now: float) -> list[RestartAction]:
        out: list[RestartAction] = []
        for other in self._reached(group):
            if other.stage is AttemptStage.ENDED:
                continue
            if not other.is_closed:
                out.append(CloseGroup(other.name, closing_reason(code, why)))
                other.is_closed = True
            out += self._stop(other, code, why, now)
        return out

    def _stop(self, group: _Group, code: int, why: str, now: float) -> list[RestartAction]:
        """End it with this code, once its workers are gone."""
        group.code, group.why = code, why
        if group.stage is AttemptStage.RUNNING and group.alive:
            return self._begin_stop(group, now)
        return [] if group.stage is AttemptStage.STOPPING else self._end(group, code, why)

    def _begin_stop(self, group: _Group, now: float) -> list[RestartAction]:
        drain_s, timeout_s = self._config.drain_timeout_s, self._config.shutdown_timeout_s
        timeout_s = drain_s if group.code == CODE_DRAINED and drain_s is not None else timeout_s
        group.stage, group.kill_at = AttemptStage.STOPPING, now + timeout_s
        return [StopWorkers(group.name, group.attempt, Stop.ASK)] if timeout_s > 0 else []

    def _kill(self, group: _Group, now: float) -> list[RestartAction]:
        if group.is_killed:
            return []
        group.is_killed, group.kill_at, group.abandon_at = True, None, now + self._config.abandon_s
        return [StopWorkers(group.name, group.attempt, Stop.KILL)]

    def _stopped(self, group: _Group, now: float) -> list[RestartAction]:
        """None of its workers runs."""
        group.kill_at = group.abandon_at = None
        if group.code is not None:
            return self._end(group, group.code, group.why)
        if now < group.resume_at:
            group.stage = AttemptStage.PAUSING
            return []
        group.stage = AttemptStage.JOINING
        return [JoinNext(group.name, self._budget.restarts(group.name))]

    def _end(self, group: _Group, code: int, why: str) -> list[RestartAction]:
        group.stage, group.code, group.kill_at, group.abandon_at = AttemptStage.ENDED, code, None, None
        return [GroupEnded(group.name, code, why)]

    def _exit_if_over(self) -> list[RestartAction]:
        if self._is_over or any(group.stage is not AttemptStage.ENDED for group in self._groups.values()):
            return []
        self._is_over = True
        codes = [group.code or CODE_OK for group in self._groups.values()]
        # What went wrong says more than that somebody asked for the end.
        return [Exit(next((c for c in codes if c not in (CODE_OK, CODE_DRAINED)), max(codes)))]

    # ---- time

    def _tick(self, group: _Group, now: float) -> list[RestartAction]:
        if group.kill_at is not None and now >= group.kill_at:
            return self._kill(group, now)
        if group.abandon_at is not None and now >= group.abandon_at:
            left: dict[str, object] = {"group": group.name, "workers": sorted(group.alive)}
            why = "workers did not end after SIGKILL: what they hold cannot be had again without a restart of the host"
            return [Report("workers abandoned", left), *self._end(group, group.code or CODE_FAILED, why)]
        if group.stage is AttemptStage.PAUSING and now >= group.resume_at:
            return self._stopped(group, now)
        alone_until = self._alone_until(group)
        if alone_until is not None and now >= alone_until:
            if group.stage is AttemptStage.FINISHED:
                return self._end(group, CODE_OK, "")
            return self._end(group, CODE_FAILED, "its workers failed, and there is no lighthouse to ask")
        return []

    def _deadline(self, group: _Group) -> float | None:
        match group.stage:
            case AttemptStage.STOPPING:
                return group.kill_at if group.kill_at is not None else group.abandon_at
            case AttemptStage.PAUSING:
                return group.resume_at
        return self._alone_until(group)

    def _alone_until(self, group: _Group) -> float | None:
        """Nothing runs here, and without a lighthouse nobody can say what the others do."""
        is_idle = group.stage is AttemptStage.FINISHED or (group.stage is AttemptStage.RUNNING and not group.alive)
        return group.link_lost_at + self._config.alone_s if is_idle and group.link_lost_at is not None else None


def _how(gone: WorkerGone) -> str:
    signal = f"signal {gone.signal}" if gone.signal is not None else ""
    code = f"exit code {gone.code}" if gone.code is not None else ""
    return f"local rank {gone.local_rank}: {gone.detail or signal or code or 'it ended'}"


def closing_reason(code: int, why: str) -> str:
    """What the other nodes read when a group gives up."""
    return f"exit code {code}: {why}"


_find_code: Callable[[str], "re.Match[str] | None"] = re.compile(r"(?:^|: )exit code (\d{1,3}): ").search


def code_in(reason: str) -> int | None:
    """The code in a closing reason of another node; None where it was closed for another reason."""
    found = _find_code(reason)
    return int(found[1]) if found is not None else None
