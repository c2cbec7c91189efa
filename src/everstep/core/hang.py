"""Which rank of a node hangs: judged from what its page (monitor/page.py) and /proc say of it.

The machine asks for a look only when something may have come due. `due(now)` names ranks to look at; `receive` takes
what was seen, judges it, and sets the next deadline:

- what is known to run against a limit comes due at that limit, and at a share of it (the soft deadline: suspect);
- what may have begun since the last look comes due no sooner than the shortest limit after it.

So a rank may open 100,000 sections a second, and costs one look per shortest limit. The rules:

 R1 From the spawn to the first sign (a beat, a section) the initial limit runs: imports, joining, loading.
 R2 Heartbeats, sections and time outside of sections are independent. Each runs once the rank has used it. A learned
    limit of heartbeats stands still in a section, which may be a first long validation, and begins anew after it.
 R3 Every open section of every thread counts, nested or not. Outside is where the training thread is in none.
 R4 A process stopped (T), or uninterruptible (D) without using CPU time, runs against limits of their own.
 R5 A rank that waits for others is not the one that hangs while another one of the node holds it up. Held up: the
    other is not waiting, and has passed no wait since. Then the other one is judged: by its own limits while it has
    some, else by the patience of whom it lets wait. When it is found to hang, who waited for it begins anew.
 R6 When the monitor itself was stopped or late, everybody gets that time on top.
 R7 A rank is found hung once. `forget` and `watch` begin anew.
"""

import dataclasses
import enum
import math
from collections.abc import Iterable, Mapping

from everstep.core.limits import HEARTBEAT, OUTSIDE, LimitPolicy, Limits, Observed

LOOK_MIN_S = 0.05  # between two looks, whatever the limits
LOOK_MAX_S = 10.0  # to learn
LOOK_SUSPECT = 0.1  # of the shortest limit, between looks at one that is suspect; of that of stopped ones, always
LOOK_AGAIN_S = 1.0  # a look that was asked for and did not come is asked for again
LATENESS_MIN_S = 0.05
PAUSES_MAX = 16
UNLIMITED_AFTER_S = 60.0


class Mechanism(enum.Enum):
    """What ran out."""

    INITIAL = "initial"  # no sign of life since the process was started
    HEARTBEAT = "heartbeat"  # no heartbeat since the last one
    SECTION = "section"  # a section is open for too long
    OUTSIDE = "out-of-section"  # the training thread is in no section for too long
    STOPPED = "stopped"  # by a signal
    UNINTERRUPTIBLE = "uninterruptible"  # in the kernel: a disk, a network file system, a driver


@dataclasses.dataclass(frozen=True)
class Section:
    """One that is open. `waits`: for other ranks; `is_mixed`: anything may happen in it; `is_cold`: it is one of the
    first of its process."""

    name: str
    since: float
    thread: int = 0
    waits: bool = False
    is_mixed: bool = False
    is_cold: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """A rank at one instant. `outside_since`: None inside of a section and where none was ever used."""

    heartbeat_at: float | None = None
    sections: tuple[Section, ...] = ()
    outside_since: float | None = None
    passed_at: float | None = None  # when it last came out of a section that waits for others
    observed: Mapping[str, Observed] = dataclasses.field(default_factory=dict)
    state: str = ""  # R S D T..., as in /proc
    cpu_s: float = 0.0
    is_over: bool = False  # the script has said that it wants to be watched no more

    @property
    def waits_since(self) -> float | None:
        return min((section.since for section in self.sections if section.waits), default=None)

    @property
    def has_given_sign(self) -> bool:
        return self.heartbeat_at is not None or bool(self.sections) or self.outside_since is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class HangPolicy:
    """Limits in seconds; None: none. Those of heartbeats and sections stand in `limits`."""

    initial_s: float | None = None
    limits: LimitPolicy = dataclasses.field(default_factory=LimitPolicy)
    stopped_s: float | None = 30.0
    uninterruptible_s: float | None = 600.0
    soft_share: float = 0.5  # of a limit, after which a rank is suspect


@dataclasses.dataclass(frozen=True)
class Clock:
    """One thing that runs against a limit."""

    mechanism: Mechanism
    since: float
    limit_s: float
    section: str = ""
    thread: int = 0

    def told(self, now: float) -> str:
        age = now - self.since
        what = {
            Mechanism.INITIAL: f"no heartbeat and no section in the {age:.1f} s since its start",
            Mechanism.HEARTBEAT: f"no heartbeat for {age:.1f} s",
            Mechanism.SECTION: f"section {self.section!r} open for {age:.1f} s",
            Mechanism.OUTSIDE: f"in no section for {age:.1f} s",
            Mechanism.STOPPED: f"stopped by a signal for {age:.1f} s",
            Mechanism.UNINTERRUPTIBLE: f"in the kernel, uninterruptible, for {age:.1f} s",
        }[self.mechanism]
        return f"{what} (limit {self.limit_s:.1f} s)"


@dataclasses.dataclass(frozen=True)
class Finding:
    rank: int
    detail: str


@dataclasses.dataclass(frozen=True)
class Suspected(Finding):
    """Past the soft deadline of `clock`."""

    clock: Clock


@dataclasses.dataclass(frozen=True)
class Cleared(Finding):
    """It was suspect, and moves on."""


@dataclasses.dataclass(frozen=True)
class Unlimited(Finding):
    """Nothing limits this rank: if it hangs nobody ends it. Once a rank."""


@dataclasses.dataclass(frozen=True)
class Hung(Finding):
    """Past the hard deadline of `clock`. `waiting`: the ranks that it holds up, and where they wait.

    `clock` is that of another rank, `blamed_by`, where this one has no limit of its own.
    """

    clock: Clock
    waiting: tuple[tuple[int, str], ...] = ()
    blamed_by: int | None = None


@dataclasses.dataclass
class _Rank:
    spawned_at: float
    view: View = dataclasses.field(default_factory=View)
    state_since: float = 0.0
    look_at: float = 0.0
    excused_at: float = -math.inf  # it waited for one that was found to hang: its time begins anew
    is_suspect: bool = False
    is_hung: bool = False
    was_told_unlimited: bool = False


class HangJudge:
    """Of one node. Ranks are local ranks, or whatever numbers the caller likes."""

    def __init__(self, policy: HangPolicy) -> None:
        self._policy = policy
        self.limits = Limits(policy.limits)
        self._ranks: dict[int, _Rank] = {}
        self._pauses: list[tuple[float, float]] = []  # (when it was over, how long)
        self._wake_at: float | None = None

    def watch(self, rank: int, spawned_at: float, now: float) -> None:
        """Begin with a new process."""
        self._ranks[rank] = _Rank(spawned_at, state_since=now, look_at=now + LOOK_MIN_S)

    def forget(self, rank: int, now: float) -> None:
        if self._ranks.pop(rank, None) is not None:
            self.limits.forget(rank, now)

    def set_timeouts(self, rank: int, timeouts: Mapping[str, float | None], now: float) -> None:
        """What this rank's client worked out."""
        self.limits.set_by(rank, timeouts)
        self._look_soon(now)

    def hear(self, observed: Mapping[str, Observed], now: float) -> None:
        """The longest intervals over all nodes."""
        shortest = self.limits.shortest()
        self.limits.hear(observed, now)
        if self.limits.shortest() != shortest:
            self._look_soon(now)

    def next_deadline(self) -> float | None:
        self._wake_at = min((one.look_at for one in self._ranks.values() if not one.is_hung), default=None)
        return self._wake_at

    def due(self, now: float) -> list[int]:
        """Whom to look at now; all, when one may hang: only then is it seen who waits for whom."""
        self._forgive_own_lateness(now)
        due = [rank for rank, one in self._ranks.items() if not one.is_hung and now >= one.look_at]
        if any(self._expired(self._ranks[rank], now) for rank in due):
            due = [rank for rank, one in self._ranks.items() if not one.is_hung]
        for rank in due:
            self._ranks[rank].look_at = now + LOOK_AGAIN_S
        return due

    def receive(self, views: Mapping[int, View], now: float) -> list[Finding]:
        """What a look at these ranks showed at `now`, taken before the first of them was read."""
        seen = {rank: self._ranks[rank] for rank in views if rank in self._ranks and not self._ranks[rank].is_hung}
        shortest = self.limits.shortest()
        for rank, one in seen.items():
            view = views[rank]
            if view.state != one.view.state or (view.state == "D" and view.cpu_s != one.view.cpu_s):
                one.state_since = now
            one.view = view
            self.limits.note(rank, view.observed, now)
        findings: list[Finding] = []
        for rank, one in seen.items():
            findings += self._suspect(rank, one, now)
        for rank, one in seen.items():
            if not one.is_hung and (clock := self._expired(one, now)) is not None:
                findings += self._convict(rank, clock, now)
        for one in seen.values():
            self._set_look(one, now)
        if self.limits.shortest() != shortest:
            self._look_soon(now)
        return findings

    def excuse(self, ranks: Iterable[int], now: float) -> None:
        """They waited for one that is being ended, as their stacks say: their time begins anew."""
        for rank in ranks:
            if rank in self._ranks:
                self._ranks[rank].excused_at = now

    def clocks(self, rank: int) -> list[Clock]:
        """All that runs against a limit, by the last look."""
        return self._clocks(self._ranks[rank])

    # ---- what runs

    def _clocks(self, one: _Rank) -> list[Clock]:
        view, policy = one.view, self._policy
        clocks: list[Clock] = []

        def add(mechanism: Mechanism, since: float, limit_s: float | None, section: str = "", thread: int = 0) -> None:
            if limit_s is not None:
                clocks.append(Clock(mechanism, since, limit_s, section, thread))

        if view.state == "T":
            add(Mechanism.STOPPED, one.state_since, policy.stopped_s)
        if view.state == "D":
            add(Mechanism.UNINTERRUPTIBLE, one.state_since, policy.uninterruptible_s)
        if view.is_over:
            return clocks
        if not view.has_given_sign:
            add(Mechanism.INITIAL, one.spawned_at, policy.initial_s)
        if view.heartbeat_at is not None and not (view.sections and self.limits.is_learned(HEARTBEAT)):
            is_learned = self.limits.is_learned(HEARTBEAT)
            since = max(view.heartbeat_at, view.outside_since or 0.0) if is_learned else view.heartbeat_at
            add(Mechanism.HEARTBEAT, since, self.limits.limit(HEARTBEAT))
        for section in view.sections:
            limit_s = self.limits.limit(section.name, section.is_mixed or section.is_cold)
            add(Mechanism.SECTION, section.since, limit_s, section.name, section.thread)
        if view.outside_since is not None:
            add(Mechanism.OUTSIDE, view.outside_since, self.limits.limit(OUTSIDE))
        return clocks

    def _deadline(self, one: _Rank, clock: Clock, share: float = 1.0) -> float:
        return max(clock.since, one.excused_at) + clock.limit_s * share + self._forgiven(clock.since)

    def _soft(self, one: _Rank, clock: Clock) -> float:
        return self._deadline(one, clock, self._policy.soft_share)

    def _expired(self, one: _Rank, now: float) -> Clock | None:
        expired = [clock for clock in self._clocks(one) if now >= self._deadline(one, clock)]
        return min(expired, key=lambda clock: self._deadline(one, clock), default=None)

    def _set_look(self, one: _Rank, now: float) -> None:
        """Exactly at the next hard deadline; else at the next soft one, or when something new may be at its own."""
        policy, clocks = self._policy, self._clocks(one)
        soft = [moment for clock in clocks if (moment := self._soft(one, clock)) > now]
        hard = [moment for clock in clocks if (moment := self._deadline(one, clock)) > now]
        share = LOOK_SUSPECT if one.is_suspect else policy.soft_share
        # When a process was stopped is only known by looking, so that a look may be late by what lies between two.
        intervals = [
            (self.limits.shortest(), share),
            (policy.stopped_s, LOOK_SUSPECT),
            (policy.uninterruptible_s, share),
        ]
        interval = min([LOOK_MAX_S, *(limit * part for limit, part in intervals if limit is not None)])
        next_soft = max(min([*soft, now + interval]), now + LOOK_MIN_S)
        one.look_at = min([*hard, next_soft, *self._unlimited_at(one, now)])

    def _unlimited_at(self, one: _Rank, now: float) -> list[float]:
        """When it is to be said that nothing limits it."""
        at = one.spawned_at + UNLIMITED_AFTER_S
        return [at] if not one.was_told_unlimited and at > now else []

    def _look_soon(self, now: float) -> None:
        """Limits have changed."""
        for one in self._ranks.values():
            one.look_at = min(one.look_at, now + LOOK_MIN_S)

    # ---- judgement

    def _suspect(self, rank: int, one: _Rank, now: float) -> list[Finding]:
        clocks = self._clocks(one)
        late = [clock for clock in clocks if now >= self._soft(one, clock)]
        if late and not one.is_suspect:
            one.is_suspect = True
            worst = min(late, key=lambda clock: self._deadline(one, clock))
            return [Suspected(rank, worst.told(now), worst)]
        if one.is_suspect and not late:
            one.is_suspect = False
            return [Cleared(rank, "it moves on")]
        is_silent = not clocks and not one.view.is_over and now >= one.spawned_at + UNLIMITED_AFTER_S
        if is_silent and not one.was_told_unlimited:
            one.was_told_unlimited = True
            return [Unlimited(rank, "nothing limits it yet: if it hangs, nobody ends it")]
        return []

    def _convict(self, rank: int, clock: Clock, now: float) -> list[Finding]:
        """R5. `rank` is over its limit."""
        holders = self._holders(rank, clock)
        if not holders:
            return [self._hang(rank, clock, now, None)]
        over = [(holder, expired) for holder in holders if (expired := self._expired(self._ranks[holder], now))]
        if over:
            return [self._hang(holder, expired, now, None) for holder, expired in over]
        blamed = [holder for holder in holders if not self._has_limit(holder)]
        return [self._hang(holder, clock, now, rank) for holder in blamed]

    def _holders(self, rank: int, clock: Clock) -> list[int]:
        """Who holds up `rank`, if it waits and did nothing else for too long."""
        waits_since = self._ranks[rank].view.waits_since
        if waits_since is None or clock.mechanism in (Mechanism.STOPPED, Mechanism.UNINTERRUPTIBLE):
            return []
        slack = clock.limit_s / 2  # their last waits ended at about one time
        return [other for other in self._ranks if other != rank and self._holds_up(other, waits_since + slack)]

    def _holds_up(self, other: int, until: float) -> bool:
        one = self._ranks[other]
        if one.is_hung or one.view.is_over or not one.view.has_given_sign:
            return False
        return one.view.waits_since is None and (one.view.passed_at is None or one.view.passed_at <= until)

    def _has_limit(self, rank: int) -> bool:
        """Of its own, or was given none on purpose."""
        one = self._ranks[rank]
        return bool(self._clocks(one)) or any(self.limits.is_unlimited_on_purpose(s.name) for s in one.view.sections)

    def _hang(self, rank: int, clock: Clock, now: float, blamed_by: int | None) -> Hung:
        one = self._ranks[rank]
        one.is_hung = True
        held = [other for other, it in self._ranks.items() if other != rank and self._is_held_by(it, one, clock)]
        for other in held:
            self._ranks[other].excused_at = now
        waiting = tuple((o, section.name) for o in held for section in self._ranks[o].view.sections if section.waits)
        detail = clock.told(now)
        if blamed_by is not None:
            detail = f"another rank waits for it: {detail}"
        return Hung(rank, detail, clock, waiting, blamed_by)

    def _is_held_by(self, waiter: _Rank, holder: _Rank, clock: Clock) -> bool:
        since = waiter.view.waits_since
        if since is None or holder.view.waits_since is not None:
            return False
        return holder.view.passed_at is None or holder.view.passed_at <= since + clock.limit_s / 2

    # ---- our own lateness

    def _forgive_own_lateness(self, now: float) -> None:
        if self._wake_at is not None and now - self._wake_at >= LATENESS_MIN_S:
            self._pauses = [*self._pauses, (now, now - self._wake_at)][-PAUSES_MAX:]
        self._wake_at = None

    def _forgiven(self, since: float) -> float:
        return sum(length for over_at, length in self._pauses if over_at > since)
