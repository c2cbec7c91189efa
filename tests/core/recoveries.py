"""What members of a stage tell of their recoveries, as a transcript's words say it goes."""

import msgspec

from everstep.core.lighthouse import LighthouseMachine
from everstep.core.recovery_report import RecoveryOutcome, RecoveryReport
from everstep.core.replica_state import ReplicaState
from tests.core.described import fields


class Recoveries:
    """The latest report of each, by name."""

    def __init__(self) -> None:
        self._reports: dict[str, tuple[float, RecoveryReport]] = {}

    def fetch(self, name: str, replica: ReplicaState, now: float, words: tuple[str, ...]) -> RecoveryReport:
        """It has so many bytes of so many; further words are counts: `retries=2`."""
        done, total, *counts = words
        news = {key: int(value) for key, _, value in (word.partition("=") for word in counts)}
        return self._report(name, replica, now, done_bytes=int(done), total_bytes=int(total), **news)

    def fetched(self, name: str, replica: ReplicaState, now: float, words: tuple[str, ...]) -> RecoveryReport:
        """It has ended, well or as the first word says; the others say why."""
        outcome, *why = words or ("done",)
        kind = RecoveryOutcome[outcome.upper().replace("-", "_")]
        return self._report(name, replica, now, outcome=kind, detail=" ".join(why))

    def _report(self, name: str, replica: ReplicaState, now: float, **news: object) -> RecoveryReport:
        quorum, plan = replica.quorum, replica.plan
        began_at, report = self._reports.get(name, (now, None))
        if quorum is not None and plan is not None and (report is None or report.quorum_id != quorum.id):
            assert replica.rank is not None
            donors = tuple(str(quorum.members[rank].id) for rank in plan.donors_of(replica.rank))
            began_at, report = now, RecoveryReport(quorum_id=quorum.id, step=plan.lineage.step, donors=donors)
        assert report is not None
        report = msgspec.structs.replace(report, seconds=now - began_at, transport="http", **news)
        self._reports[name] = (began_at, report)
        return report


def shown(lighthouse: LighthouseMachine, now: float) -> list[str]:
    """What a person is told of everybody's."""
    rows = lighthouse.status(now)["members"]
    assert isinstance(rows, list)
    return [f"{row['replica_id']}#{row['incarnation']}: {fields(row['recovery'] or {}) or 'none'}" for row in rows]
