"""What a group's leader says only while it can speak for every rank of the group.

A rank that is stopped or unreachable must not hide behind a healthy leader: the group then looks silent to the
lighthouse, as one process would. So the leader keeps back Ready until every rank has severed its collectives, and
heartbeats and Hello while a rank is not heard.
"""

from collections.abc import Iterable

import msgspec

from everstep.core.group import RankBeat
from everstep.core.messages import Activity, Heartbeat, Hello, Ready, Send
from everstep.core.recovery_report import merged
from everstep.core.types import NO_ROUND, FailureRound, MemberId

SILENT_AFTER_S = 0.5  # before Welcome has told the interval


class Vouching:
    """Of the leader, for the `ranks` that follow it."""

    def __init__(self, ranks: Iterable[int], now: float) -> None:
        self.interval_s = 0.0  # in which every rank must be heard
        self._heard_at = dict.fromkeys(ranks, now)
        self._beats: dict[int, RankBeat] = {}
        self._froze: dict[int, FailureRound] = dict.fromkeys(self._heard_at, NO_ROUND)
        self._held: Send | None = None  # a Ready
        self._owes_hello = False

    def heard(self, rank: int, now: float) -> None:
        self._heard_at[rank] = now

    def beat(self, rank: int, beat: RankBeat) -> None:
        self._beats[rank] = beat

    def heartbeat(self, own: Heartbeat) -> Heartbeat:
        """The group's: it waits for other groups once all of its ranks do; until then, what keeps it."""
        beats = self._beats.values()
        doings = [(own.activity, own.activity_s, own.section), *((b.activity, b.activity_s, b.section) for b in beats)]
        busy = [doing for doing in doings if doing[0] is not Activity.WAITING] or doings
        activity, activity_s, section = max(busy, key=lambda doing: (bool(doing[2]), doing[1]))
        longest_s = max([own.longest_s, *(beat.longest_s for beat in beats)])
        recovery = merged([own.recovery, *(beat.recovery for beat in beats)], ranks=1 + len(self._heard_at))
        doing = {"activity": activity, "activity_s": activity_s, "section": section}
        return msgspec.structs.replace(own, **doing, longest_s=longest_s, recovery=recovery)

    def froze(self, rank: int, round_: FailureRound) -> None:
        self._froze[rank] = max(round_, self._froze[rank])

    def may_send(self, effect: Send, now: float) -> bool:
        """Now; else it is kept, or left out if it is a heartbeat."""
        match effect.message:
            case Ready(round_):
                self._held = None if self._have_all_frozen(round_) else effect
                return self._held is None
            case Heartbeat():
                return not self._is_anyone_silent(now)
            case Hello():
                self._owes_hello = self._is_anyone_silent(now)
                return not self._owes_hello
        return True

    def due_ready(self, round_: FailureRound, member: MemberId) -> list[Send]:
        """The Ready that was kept, when all have frozen; it is dropped when the round or the incarnation has passed."""
        held = self._held
        if held is None or not isinstance(held.message, Ready):
            return []
        if held.message.round != round_ or held.message.report.member != member:
            self._held = None
            return []
        if not self._have_all_frozen(round_):
            return []
        self._held = None
        return [held]

    def takes_hello(self, now: float) -> bool:
        """Whether one was kept and may go now; it is to be made afresh."""
        if not self._owes_hello or self._is_anyone_silent(now):
            return False
        self._owes_hello = False
        return True

    def _have_all_frozen(self, round_: FailureRound) -> bool:
        return all(froze >= round_ for froze in self._froze.values())

    def _is_anyone_silent(self, now: float) -> bool:
        limit = self.interval_s or SILENT_AFTER_S
        return any(now - heard_at > limit for heard_at in self._heard_at.values())
