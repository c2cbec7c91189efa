"""How a member's recovery goes, as its heartbeats tell it: one report, replaced as it comes further.

A recovery is named by its quorum: a member fetches once in each. No message is sent for it but one heartbeat when it
begins and one when it ends; what happens between them shows in the counts of the next.
"""

import enum
from collections.abc import Iterable

import msgspec

from everstep.core.types import QuorumId

SHOWN_S = 5.0  # after its end: a link that broke meanwhile is open again
DETAIL_CHARS_MAX = 200


class RecoveryOutcome(enum.IntEnum):
    """What has become of it."""

    FETCHING = 0
    DONE = 1
    FAILED = 2  # no donor could serve it; the next quorum tries again
    CUT_SHORT = 3  # a failure round ended its quorum

    @property
    def word(self) -> str:
        return self.name.lower().replace("_", "-")


class RecoveryReport(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """One member's recovery so far. `total_bytes` is 0 until the first donor has said how much there is."""

    quorum_id: QuorumId
    step: int  # of the state that it fetches
    outcome: RecoveryOutcome = RecoveryOutcome.FETCHING
    done_bytes: int = 0
    total_bytes: int = 0
    bytes_per_s: int = 0  # lately; of an ended one: all along
    seconds: float = 0.0
    donors: tuple[str, ...] = ()  # members that serve it, as `replica_id#incarnation`; lost ones are left out
    retries: int = 0  # connections that failed and were made again
    digest_errors: int = 0  # what arrived damaged, and was fetched again
    transport: str = ""  # how the bytes come, once some have: "http", "memory", "process_group"; several with + between
    detail: str = ""  # why it ended early


def merged(reports: Iterable[RecoveryReport | None], ranks: int) -> RecoveryReport | None:
    """A group's, of its ranks': what they fetch for the newest quorum, added up. It ends with the last of them."""
    known = [report for report in reports if report is not None]
    newest = max((report.quorum_id for report in known), default=None)
    parts = [report for report in known if report.quorum_id == newest]
    if not parts:
        return None
    outcomes = {part.outcome for part in parts} | ({RecoveryOutcome.FETCHING} if len(parts) < ranks else set())
    order = (RecoveryOutcome.FAILED, RecoveryOutcome.CUT_SHORT, RecoveryOutcome.FETCHING)
    return msgspec.structs.replace(
        parts[0],
        outcome=next((outcome for outcome in order if outcome in outcomes), RecoveryOutcome.DONE),
        done_bytes=sum(part.done_bytes for part in parts),
        total_bytes=sum(part.total_bytes for part in parts),
        bytes_per_s=sum(part.bytes_per_s for part in parts),
        seconds=max(part.seconds for part in parts),
        donors=tuple(dict.fromkeys(donor for part in parts for donor in part.donors)),
        retries=sum(part.retries for part in parts),
        digest_errors=sum(part.digest_errors for part in parts),
        transport="+".join(sorted({word for part in parts for word in part.transport.split("+") if word})),
        detail=next((part.detail for part in parts if part.detail), ""),
    )
