"""The lighthouse's book of recoveries: what a person is told of them, made from the members' heartbeats.

How many events a recovery makes is bounded whatever its donors do: one at its start, one at its end, and of retries and
digest errors one each time that their count has doubled.
"""

import dataclasses

import msgspec

from everstep.core.events import EventKind, JobEvent
from everstep.core.messages import Effect, Log, Publish
from everstep.core.recovery_plan import DONORS_MAX
from everstep.core.recovery_report import DETAIL_CHARS_MAX, RecoveryOutcome, RecoveryReport
from everstep.core.types import MemberId

GROUPS_MAX = 10_000  # whose latest recovery is remembered; the one that began first goes first
COUNTS = (("retries", EventKind.RECOVERY_RETRIED), ("digest_errors", EventKind.RECOVERY_DIGEST_ERROR))


@dataclasses.dataclass
class _Entry:
    member: MemberId
    report: RecoveryReport
    is_over: bool = False
    said: dict[str, int] = dataclasses.field(default_factory=lambda: {name: 0 for name, _ in COUNTS})


class RecoveryBook:
    """The latest recovery of each group."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}

    def heard(self, member: MemberId, report: RecoveryReport | None) -> list[Effect]:
        """A heartbeat's. O(1), and nothing at all in a step that goes well."""
        entry = self._entries.get(member.replica_id)
        if report is None:
            return self.gone(member, "it says no more of it") if entry is not None else []
        if entry is not None and report.quorum_id < entry.report.quorum_id:
            return []
        out: list[Effect] = []
        if entry is None or report.quorum_id > entry.report.quorum_id:
            out += self.gone(entry.member, "it began another one") if entry is not None else []
            entry = self._begin(member, report)
            out += _told(EventKind.RECOVERY_STARTED, entry)
        if entry.is_over:
            return out
        entry.report = report
        for name, kind in COUNTS:
            count = getattr(report, name)
            if count.bit_length() > entry.said[name].bit_length():
                entry.said[name] = count
                out += _told(kind, entry)
        if report.outcome is not RecoveryOutcome.FETCHING:
            entry.is_over = True
            out += _told(EventKind.RECOVERY_ENDED, entry)
        return out

    def gone(self, member: MemberId, why: str) -> list[Effect]:
        """Nothing more will be heard of what it was fetching: without state it leaves its quorum with its link."""
        entry = self._entries.get(member.replica_id)
        if entry is None or entry.is_over or entry.member != member:
            return []
        entry.is_over = True
        entry.report = msgspec.structs.replace(entry.report, outcome=RecoveryOutcome.CUT_SHORT, detail=why)
        return _told(EventKind.RECOVERY_ENDED, entry)

    def status(self, member: MemberId) -> dict[str, object] | None:
        """Plain JSON values of the recovery that it is in, or was in last; None: it has had none that is known here."""
        entry = self._entries.get(member.replica_id)
        if entry is None or entry.member != member:
            return None
        report = entry.report
        fields = {name: getattr(report, name) for name in ("step", "done_bytes", "total_bytes", "bytes_per_s")}
        counts = {"retries": report.retries, "digest_errors": report.digest_errors, "transport": report.transport}
        seconds, donors = round(report.seconds, 3), list(report.donors[:DONORS_MAX])
        return {"outcome": report.outcome.word, **fields, "seconds": seconds, "donors": donors, **counts}

    def _begin(self, member: MemberId, report: RecoveryReport) -> _Entry:
        self._entries.pop(member.replica_id, None)
        if len(self._entries) >= GROUPS_MAX:
            del self._entries[next(iter(self._entries))]
        entry = self._entries[member.replica_id] = _Entry(member, report)
        return entry


def _told(kind: EventKind, entry: _Entry) -> list[Effect]:
    """One event, and the line of the lighthouse's log that says the same."""
    report, member = entry.report, entry.member
    donors, detail = report.donors[:DONORS_MAX], report.detail[:DETAIL_CHARS_MAX]
    is_end = kind is EventKind.RECOVERY_ENDED
    event = JobEvent(
        kind=kind,
        replica_id=member.replica_id,
        incarnation=member.incarnation,
        quorum_id=str(report.quorum_id),
        step=report.step,
        donors=donors,
        done_bytes=report.done_bytes,
        total_bytes=report.total_bytes,
        seconds=round(report.seconds, 3),
        retries=report.retries,
        digest_errors=report.digest_errors,
        transport=report.transport,
        outcome=report.outcome.word if is_end else "",
        evidence=detail if is_end else "",
    )
    fields: dict[str, object] = {"member": str(member), "step": report.step, "donors": ",".join(donors) or "none"}
    if kind is not EventKind.RECOVERY_STARTED:
        fields |= {"bytes": report.done_bytes, "of": report.total_bytes, "seconds": round(report.seconds, 3)}
        fields |= {"retries": report.retries, "digest_errors": report.digest_errors}
    if is_end:
        fields |= {"transport": report.transport or "none", "outcome": report.outcome.word}
        fields |= {"detail": detail} if detail else {}
    return [Log(kind.value.replace("-", " "), fields), Publish(event)]
