"""Nodes of one job that are to stay out of every rendezvous of it until an operator admits them. Bounded.

Nothing is journalled (docs/decisions/010): the nodes are told the list, and say it to a lighthouse that starts again.
"""

from collections.abc import Iterable

from everstep.core.node_messages import ExcludedNode
from everstep.core.types import REPLICA_ID_CHARS_MAX

EXCLUDED_MAX = 256  # beyond that the newest is not remembered, and its log line says so
REASON_CHARS_MAX = 200


class Exclusions:
    """Shared by the machines of a job's groups. `version` grows with every change."""

    def __init__(self) -> None:
        self._reasons: dict[str, str] = {}
        self.version = 0

    def add(self, name: str, reason: str) -> bool:
        """Whether that is news, and remembered."""
        if name in self._reasons or len(self._reasons) >= EXCLUDED_MAX:
            return False
        if not 0 < len(name) <= REPLICA_ID_CHARS_MAX:
            return False
        self._reasons[name] = reason[:REASON_CHARS_MAX]
        self.version += 1
        return True

    def recall(self, nodes: Iterable[ExcludedNode]) -> None:
        """What a node knows from an earlier life of the lighthouse."""
        for node in nodes:
            self.add(node.machine, node.reason)

    def admit(self, name: str) -> bool:
        if self._reasons.pop(name, None) is None:
            return False
        self.version += 1
        return True

    def reason(self, name: str) -> str | None:
        return self._reasons.get(name)

    @property
    def nodes(self) -> tuple[ExcludedNode, ...]:
        return tuple(ExcludedNode(name, reason) for name, reason in self._reasons.items())
