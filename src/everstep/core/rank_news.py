"""What a node's monitor says of its ranks, as events of the job. Bounded: in length, and in number a second."""

import math

from everstep.core.events import EventKind, JobEvent
from everstep.core.messages import Publish
from everstep.core.node_messages import RankNews, RankReport

BURST = 256  # reports of one node at once
INTERVAL_S = 0.5  # on average, beyond that
NAME_CHARS_MAX = 200
DETAIL_CHARS_MAX = 1000
WAITING_MAX = 16  # ranks that are named
STACKS_CHARS_MAX = 4000

_KINDS = {
    RankNews.SUSPECTED: EventKind.RANK_SUSPECTED,
    RankNews.CLEARED: EventKind.RANK_CLEARED,
    RankNews.HUNG: EventKind.RANK_HUNG,
}


class Allowance:
    """Of one node; what is beyond it is dropped, so that a rank that flickers leaves room for other events."""

    def __init__(self) -> None:
        self._owed_until = -math.inf

    def take(self, now: float) -> bool:
        owed = max(self._owed_until, now) + INTERVAL_S
        if owed - now > BURST * INTERVAL_S:
            return False
        self._owed_until = owed
        return True


def event_of(report: RankReport, node_id: str, group: str) -> Publish:
    """Cut to the bounds, whatever the node has sent."""
    return Publish(
        JobEvent(
            kind=_KINDS[report.news],
            group=group,
            node=node_id,
            rank=report.rank[:NAME_CHARS_MAX],
            section=report.section[:NAME_CHARS_MAX],
            age_s=round(report.age_s, 3),
            culprit=report.culprit[:NAME_CHARS_MAX],
            waiting=tuple(name[:NAME_CHARS_MAX] for name in report.waiting[:WAITING_MAX]),
            stacks=report.stacks[:STACKS_CHARS_MAX],
            evidence=report.detail[:DETAIL_CHARS_MAX],
        )
    )
