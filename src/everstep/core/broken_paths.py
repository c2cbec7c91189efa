"""Which members cannot reach each other though all reach the lighthouse, and whom to leave out for it.

Evidence is a collective's error that says that a peer's host does not answer. One that says that a peer closed its
connection is none: whoever is severed first closes, and the others only see him do it. A pair gets one round for
nothing, with new connections; in the second in a row one of the two is left out, and let in again after a pause that
doubles each time (docs/decisions/009).
"""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

from everstep.core.types import MemberId, natural_key

ROUNDS_FREE = 1  # of the same pair, before one of it is left out
STREAK_S = 60.0  # a round of the same pair later than this, with steps in between, is the first one again
PAUSE_MAX_S = 600.0
KEPT_MAX = 1000  # pairs, and pauses

Pair = tuple[str, str]
_Key = TypeVar("_Key")
_Kept = TypeVar("_Kept")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeftOut:
    """The verdict: `member` makes way for `other`."""

    member: MemberId
    other: MemberId
    pause_s: float
    detail: str


@dataclasses.dataclass
class _Streak:
    rounds: int
    last_at: float
    step: int


@dataclasses.dataclass
class Pause:
    """A replica_id that is not let in before `until`."""

    other: str
    until: float
    strikes: int
    pause_s: float
    is_over: bool = False

    @property
    def why(self) -> str:
        return (
            f"it and {self.other} could not reach each other, though both reach the lighthouse; it is let in again "
            f"{self.pause_s:g} s after it was left out (time {self.strikes}): check the network between them"
        )

    def is_on_probation(self, now: float) -> bool:
        """It has not shown for long enough since then that the path holds."""
        return now < self.until + max(STREAK_S, 2 * self.pause_s)


class BrokenPaths:
    """Of one job. Names pairs by replica_id: a path outlives the processes at its ends."""

    def __init__(self, pause_s: float) -> None:
        self._pause_s = pause_s
        self._complaints: dict[tuple[MemberId, MemberId], None] = {}  # (who, of whom), since the last Grant
        self._streaks: dict[Pair, _Streak] = {}
        self._cut_from: dict[str, dict[str, None]] = {}  # the others of each that is part of a streak
        self._pauses: dict[str, Pause] = {}

    def complain(self, reporter: MemberId, peer: MemberId) -> None:
        """`reporter` got no answer from `peer` in a collective of the current quorum."""
        if reporter.replica_id != peer.replica_id:
            self._complaints[reporter, peer] = None

    def judge(
        self, answered: Sequence[MemberId], step: int, now: float, comes_first: Callable[[MemberId], int]
    ) -> list[LeftOut]:
        """Once a round, when it is decided. `answered`: who lives; `comes_first`: whom to rather leave out.

        It must rank everybody without state above those with it: the last one that holds it must not make way.
        """
        complaints = [c for c in self._complaints if c[0] in answered and c[1] in answered]
        self._complaints.clear()
        self._note(complaints, step, now)
        pairs = [c for c in complaints if self._is_enough(*c, now)]
        out = []
        while pairs:
            # Whom most cannot reach: one that is cut off from all others must not cost them theirs.
            member = max(
                dict.fromkeys(m for pair in pairs for m in pair),
                key=lambda m: (
                    comes_first(m),
                    len(self._cut_from.get(m.replica_id, ())),
                    self._is_on_probation(m, now),
                    m.incarnation,
                ),
            )
            other = next(b if a == member else a for a, b in pairs if member in (a, b))
            out.append(self._leave_out(member, other, now))
            pairs = [pair for pair in pairs if member not in pair]
        return out

    def pause_of(self, replica_id: str) -> Pause | None:
        pause = self._pauses.get(replica_id)
        return pause if pause is not None and not pause.is_over else None

    def end_pauses(self, now: float) -> bool:
        """Whether somebody may be let in again."""
        ended = [p for p in self._pauses.values() if not p.is_over and now >= p.until]
        for pause in ended:
            pause.is_over = True
        return bool(ended)

    def next_deadline(self) -> float | None:
        if not self._pauses:
            return None
        return min((p.until for p in self._pauses.values() if not p.is_over), default=None)

    def _note(self, complaints: Collection[tuple[MemberId, MemberId]], step: int, now: float) -> None:
        for pair in dict.fromkeys(_pair(*c) for c in complaints):
            streak = self._streaks.pop(pair, None)
            # Nothing was committed since: it never worked in between. A step of that round itself may have been.
            goes_on = streak is not None and (now - streak.last_at <= STREAK_S or step <= streak.step + 1)
            rounds = streak.rounds if streak is not None and goes_on else 0
            self._streaks[pair] = _Streak(rounds + 1, now, step)
            _keep_newest(self._streaks)
        self._cut_from = {}
        for (a, b), streak in self._streaks.items():
            if now - streak.last_at <= STREAK_S:
                self._cut_from.setdefault(a, {})[b] = None
                self._cut_from.setdefault(b, {})[a] = None

    def _is_enough(self, a: MemberId, b: MemberId, now: float) -> bool:
        is_known = self._is_on_probation(a, now) or self._is_on_probation(b, now)
        return is_known or self._streaks[_pair(a, b)].rounds > ROUNDS_FREE

    def _is_on_probation(self, member: MemberId, now: float) -> bool:
        pause = self._pauses.get(member.replica_id)
        return pause is not None and pause.is_on_probation(now)

    def _leave_out(self, member: MemberId, other: MemberId, now: float) -> LeftOut:
        before = self._pauses.pop(member.replica_id, None)
        strikes = before.strikes + 1 if before is not None and before.is_on_probation(now) else 1
        pause_s = min(self._pause_s * 2.0 ** min(strikes - 1, 64), PAUSE_MAX_S)
        self._pauses[member.replica_id] = Pause(other.replica_id, now + pause_s, strikes, pause_s)
        _keep_newest(self._pauses)
        for pair in [pair for pair in self._streaks if member.replica_id in pair]:
            del self._streaks[pair]
        detail = f"{member} and {other} do not reach each other; {member} makes way, for {pause_s:g} s"
        return LeftOut(member=member, other=other, pause_s=pause_s, detail=detail)


def _pair(a: MemberId, b: MemberId) -> Pair:
    first, second = sorted((a.replica_id, b.replica_id), key=lambda name: (natural_key(name), name))
    return first, second


def _keep_newest(kept: dict[_Key, _Kept]) -> None:
    if len(kept) > KEPT_MAX:
        del kept[next(iter(kept))]
