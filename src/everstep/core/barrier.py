"""The barrier before a round: who has come, who of the last round is still to come, and whether that is enough.

max_nodes are here, nobody of the last round is awaited      complete at once
min_nodes are here, all living nodes of the last round too   complete at once
min_nodes are here                                           complete when the last call ends
fewer                                                        fail at the deadline
"""

import dataclasses
import enum


class Verdict(enum.Enum):
    """What the barrier says now."""

    WAIT = enum.auto()
    COMPLETE = enum.auto()
    FAIL = enum.auto()


@dataclasses.dataclass(frozen=True, kw_only=True)
class BarrierPolicy:
    """As the nodes want it; all of them want the same."""

    min_nodes: int
    max_nodes: int
    join_timeout_s: float
    last_call_s: float


class Barrier:
    """Instants are the lighthouse's. Nodes that come while a round is complete are here as well: they wait."""

    def __init__(self) -> None:
        self.here: dict[str, None] = {}  # in the order in which they came
        self.previous: dict[str, int] = {}  # ranks of the last round's nodes, while they are alive
        self.absent: dict[str, None] = {}  # those of them that have not come back
        self.fail_at: float | None = None
        self.last_call_at: float | None = None

    def come(self, node_id: str) -> None:
        self.here[node_id] = None
        self.absent.pop(node_id, None)

    def go(self, node_id: str) -> None:
        """It is dead, or has left, or was turned away."""
        self.here.pop(node_id, None)
        self.absent.pop(node_id, None)
        self.previous.pop(node_id, None)

    def reopen(self, previous: dict[str, int]) -> None:
        """A round is over; `previous` names its living nodes and their ranks."""
        self.previous = dict(previous)
        self.absent = {node_id: None for node_id in previous if node_id not in self.here}
        self.fail_at = self.last_call_at = None

    def rest(self) -> None:
        """A round stands."""
        self.absent.clear()
        self.fail_at = self.last_call_at = None

    def clear(self) -> tuple[str, ...]:
        """Everybody here goes with empty hands; returns who."""
        gone = tuple(self.here)
        self.here.clear()
        self.fail_at = self.last_call_at = None
        return gone

    def verdict(self, policy: BarrierPolicy, now: float) -> Verdict:
        count = len(self.here)
        if not count:
            self.fail_at = self.last_call_at = None
            return Verdict.WAIT
        if self.fail_at is None:
            self.fail_at = now + policy.join_timeout_s
        if count < policy.min_nodes:
            self.last_call_at = None
            return Verdict.FAIL if now >= self.fail_at else Verdict.WAIT
        if not self.absent and (count >= policy.max_nodes or self.previous):
            return Verdict.COMPLETE
        if self.last_call_at is None:
            self.last_call_at = now + policy.last_call_s
        return Verdict.COMPLETE if now >= self.last_call_at else Verdict.WAIT

    def next_deadline(self) -> float | None:
        """Of the last verdict."""
        return self.last_call_at if self.last_call_at is not None else self.fail_at
