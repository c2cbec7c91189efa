"""What the restart machine hears, and what it wants done. `group` names a replica group of this node; "" where the
job has none. `attempt` numbers the starts of a group's workers on this node: what is said of an older one is ignored.
"""

import dataclasses
import enum

from everstep.core.node_messages import NodeHealth


class Stop(enum.Enum):
    """How workers are told to end."""

    ASK = "ask"  # SIGTERM, and SIGCONT for those that are stopped
    KILL = "kill"  # SIGKILL, to their whole process groups


# ---- events


@dataclasses.dataclass(frozen=True)
class Joined:
    """The group's round is complete. `restarts`: the most that any of its nodes knows of; `size`: its nodes."""

    group: str
    restarts: int = 0
    size: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerGone:
    """A worker is gone, with all that it started; or it never came to be (`detail` says why)."""

    group: str
    attempt: int
    local_rank: int
    code: int | None = None
    signal: int | None = None
    steps: int = 0  # that it had committed
    reached: int = 0  # the number of the last of them; 0: not known
    detail: str = ""

    @property
    def is_clean(self) -> bool:
        return self.code == 0


@dataclasses.dataclass(frozen=True)
class RoundOver:
    """A node of the round died, left, or asks for the next one."""

    group: str
    why: str


@dataclasses.dataclass(frozen=True)
class NodesWait:
    """There is room for nodes that wait."""

    group: str


@dataclasses.dataclass(frozen=True)
class Closed:
    """The group's rendezvous is closed for all nodes. `reason` as CloseRound gave it, or an operator's."""

    group: str
    reason: str
    was_spare: bool = False


@dataclasses.dataclass(frozen=True)
class Evicted:
    """This node was silent for so long that its round went on without it."""

    group: str
    why: str


@dataclasses.dataclass(frozen=True)
class JoinFailed:
    """No round will come of it. `code` is what to exit with."""

    group: str
    code: int
    why: str


@dataclasses.dataclass(frozen=True)
class LinkChanged:
    """The lighthouse can be reached, or cannot."""

    group: str
    is_open: bool


@dataclasses.dataclass(frozen=True)
class DrainAsked:
    """Somebody wants this node to end: a signal. Asked a second time, the workers are killed."""

    why: str


RestartEvent = Joined | WorkerGone | RoundOver | NodesWait | Closed | Evicted | JoinFailed | LinkChanged | DrainAsked


# ---- actions


@dataclasses.dataclass(frozen=True)
class JoinNext:
    """Leave the round, if in one, and ask for the next."""

    group: str
    restarts: int


@dataclasses.dataclass(frozen=True)
class StartWorkers:
    """All workers of the group on this node. Each is answered by one WorkerGone, some day."""

    group: str
    attempt: int
    restarts: int


@dataclasses.dataclass(frozen=True)
class StopWorkers:
    """Those that still run."""

    group: str
    attempt: int
    how: Stop


@dataclasses.dataclass(frozen=True)
class TellHealth:
    """Let the lighthouse know how this node stands in its round."""

    group: str
    health: NodeHealth


@dataclasses.dataclass(frozen=True)
class CloseGroup:
    """Close the group's rendezvous for all its nodes."""

    group: str
    reason: str


@dataclasses.dataclass(frozen=True)
class GroupEnded:
    """Nothing more will happen in this group here: leave its rendezvous. `why` is "" where all went well."""

    group: str
    code: int
    why: str


@dataclasses.dataclass(frozen=True)
class Exit:
    """Every group has ended."""

    code: int


@dataclasses.dataclass(frozen=True)
class Report:
    """One line for people."""

    event: str
    fields: dict[str, object]


RestartAction = JoinNext | StartWorkers | StopWorkers | TellHealth | CloseGroup | GroupEnded | Exit | Report
