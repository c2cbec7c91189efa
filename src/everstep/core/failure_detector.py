"""Who is alive, suspect or overdue, from what is heard and when. The lighthouse's only use of time for judging others.

Ideas from memberlist: suspicion before death, and an observer that notices its own lateness (it was stopped, or its
loop was blocked) widens every deadline by it before it accuses anybody.
"""

import dataclasses
import heapq

from everstep.core.messages import Cause
from everstep.core.types import MemberId

LATENESS_MIN_S = 0.05  # a tick this much later than asked for is our own fault


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectorPolicy:
    heartbeat_timeout_s: float
    link_grace_s: float  # a closed link may come back within it
    ask_before_s: float = 0.0  # before silence counts as death: time for a Doubt to be settled by asking; 0: no doubts


@dataclasses.dataclass(frozen=True)
class Doubt:
    """It is about to be suspected of silence; `heard` clears it."""

    member: MemberId


@dataclasses.dataclass(frozen=True)
class Suspicion:
    member: MemberId
    cause: Cause
    detail: str


class FailureDetector:
    """Keeps one deadline a member. `heard` is O(1); expired deadlines are found through a lazily updated heap."""

    def __init__(self, policy: DetectorPolicy) -> None:
        self._policy = policy
        self._deadline: dict[MemberId, float] = {}
        self._closed: dict[MemberId, str] = {}
        self._doubted: dict[MemberId, None] = {}
        self._heap: list[tuple[float, int, MemberId]] = []
        self._pushed = 0
        self._wake_at: float | None = None

    def watch(self, member: MemberId, now: float) -> None:
        """Begin (again) to expect to hear from `member`; its link is open."""
        self._closed.pop(member, None)
        self._doubted.pop(member, None)
        self._set(member, now + self._silence_s)

    def heard(self, member: MemberId, now: float) -> None:
        """A word on its open link. One that had been given up for silent is watched again: it may fall silent anew."""
        if member not in self._deadline:
            self.watch(member, now)
        elif member not in self._closed:
            self._deadline[member] = now + self._silence_s
            if self._doubted:
                self._doubted.pop(member, None)

    @property
    def _silence_s(self) -> float:
        return self._policy.heartbeat_timeout_s - self._policy.ask_before_s

    def is_doubted(self, member: MemberId) -> bool:
        return member in self._doubted

    def link_closed(self, member: MemberId, detail: str, now: float) -> None:
        if member in self._deadline:
            self._closed[member] = detail
            self._set(member, now + self._policy.link_grace_s)

    def confirm(self, member: MemberId, now: float) -> None:
        """Somebody else saw `member` fail as well: if its link is closed it gets no more grace."""
        if member in self._closed:
            self._set(member, now)

    def forget(self, member: MemberId) -> None:
        self._deadline.pop(member, None)
        self._closed.pop(member, None)
        self._doubted.pop(member, None)

    def is_watched(self, member: MemberId) -> bool:
        return member in self._deadline

    def expire(self, now: float) -> list[Doubt | Suspicion]:
        """Members whose deadline has passed, once each; those that are suspected are not watched any more."""
        self._forgive_own_lateness(now)
        expired: list[Doubt | Suspicion] = []
        while self._heap and self._heap[0][0] <= now:
            _, _, member = heapq.heappop(self._heap)
            deadline = self._deadline.get(member)
            if deadline is None:
                continue
            is_quiet = member not in self._closed and member not in self._doubted
            if now >= deadline and is_quiet and self._policy.ask_before_s:
                expired.append(Doubt(member))
                self._doubted[member] = None
                self._set(member, now + self._policy.ask_before_s)  # all of it, however late this is: answers need it
            elif now >= deadline:
                expired.append(self._suspicion(member))
                self.forget(member)
            else:
                self._push(member, deadline)
        return expired

    def next_deadline(self) -> float | None:
        while self._heap and self._deadline.get(self._heap[0][2]) is None:
            heapq.heappop(self._heap)
        self._wake_at = self._heap[0][0] if self._heap else None
        return self._wake_at

    def _suspicion(self, member: MemberId) -> Suspicion:
        if member in self._closed:
            return Suspicion(member, Cause.LINK_CLOSED, self._closed[member])
        return Suspicion(member, Cause.SILENT, f"nothing heard for {self._policy.heartbeat_timeout_s:g} s")

    def _forgive_own_lateness(self, now: float) -> None:
        if self._wake_at is None or now - self._wake_at < LATENESS_MIN_S:
            return
        # And a moment more, to read what has arrived meanwhile: the earliest deadline plus the lateness is now.
        lateness = now - self._wake_at + LATENESS_MIN_S
        self._wake_at = None
        for member in self._deadline:
            self._set(member, self._deadline[member] + lateness)

    def _set(self, member: MemberId, deadline: float) -> None:
        self._deadline[member] = deadline
        self._push(member, deadline)

    def _push(self, member: MemberId, deadline: float) -> None:
        self._pushed += 1
        heapq.heappush(self._heap, (deadline, self._pushed, member))
