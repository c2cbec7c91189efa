"""What goes wrong in a schedule: budgets drawn from the seed, and triggers that strike at a named point."""

import dataclasses
import random
from collections.abc import Callable
from typing import TYPE_CHECKING

from everstep.core.types import natural_key
from everstep.sim.network import Delays

if TYPE_CHECKING:
    from everstep.sim.party import Party
    from everstep.sim.world import World

# Points a trigger may name. A member reaches one after it handled what the point is called after; the lighthouse
# before it handles a message, before it writes ("lighthouse:Persist") and before it sends what stands behind the
# record that is on disk now ("lighthouse:Persisted").
MEMBER_POINTS = (
    "Welcome",
    "Proposal",
    "Switch",
    "Notice",
    "Grant",
    "Refused",
    "Build",
    "Recover",
    "Reduce",
    "BarrierEnded",
    "StateRecovered",
    "GradientsReduced",
    "VoteCast",
    "VoteEnded",
    "CollectiveFailed",
)
LIGHTHOUSE_POINTS = (
    "lighthouse:Hello",
    "lighthouse:Ready",
    "lighthouse:Adopted",
    "lighthouse:Failed",
    "lighthouse:Persist",
    "lighthouse:Persisted",
)
# Reached in groups of several ranks as well: by a follower that heard its leader, or a leader that heard a follower.
RANK_POINTS = (
    "View",
    "Began",
    "Decided",
    "Deciding",
    "Prepare",
    "Prepared",
    "MoreReductions",
    "RankFroze",
    "RankSettled",
    "RankRecovered",
    "RankReduced",
    "RankReopened",
    "RankDecides",
    "Ballot",
    "RankFailed",
)
# After the message went to one link, before it goes to the next: only for "lighthouse_sending", which draws from these.
SENDING_POINTS = tuple(f"lighthouse:sent:{kind}" for kind in ("Grant", "Grant", "Notice", "Proposal", "Switch"))
FAULTS_AT_POINTS = ("kill", "kill", "kill_unnoticed", "link", "stall_up", "stall_down", "stop", "lighthouse", "error")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trigger:
    """Strike with `fault` when `by` (any member: None) reaches `point` for the nth time.

    `victim` is a replica_id, "follower of" one, "self" (who reached it) or "other". `seconds` is how long it lasts, or
    until the restart.
    """

    point: str
    fault: str
    nth: int = 1
    by: str | None = None
    victim: str = "self"
    after_s: float = 0.0
    seconds: float | None = None

    @staticmethod
    def drawn(rng: random.Random, more_points: tuple[str, ...] = ()) -> "Trigger":
        return Trigger(
            point=rng.choice(MEMBER_POINTS * 2 + LIGHTHOUSE_POINTS + more_points),
            fault=rng.choice(FAULTS_AT_POINTS),
            nth=rng.choice((1, 2, 3, 5, 8, 13, 21)),
            victim=rng.choice(("self", "self", "other")),
            after_s=rng.choice((0.0, 0.0, 0.0005, 0.002)),
        )

    @staticmethod
    def drawn_of_sends(rng: random.Random) -> "Trigger":
        nth = rng.choice((1, 2, 3, 4, 5, 8))
        return Trigger(point=rng.choice(SENDING_POINTS), fault="lighthouse_sending", nth=nth)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Faults:
    """How many of each fault a schedule has at most; the seed draws instants and victims."""

    kill: int = 0
    kill_twice: int = 0  # two groups within 2 ms
    kill_unnoticed: int = 0  # its socket stays open (a forked child holds it): only silence tells
    link: int = 0
    stall: int = 0  # a link delivers nothing for longer than the heartbeat timeout: false suspicion
    stall_up: int = 0  # the same towards the lighthouse only
    stall_down: int = 0
    stop: int = 0  # a process is stopped and continued
    lighthouse: int = 0
    lighthouse_stop: int = 0  # the lighthouse is stopped and continued
    veto: int = 0
    error: int = 0  # a collective fails though nobody died, and may name somebody who is well
    drain: int = 0
    leave: int = 0  # a process says Goodbye and exits; nobody starts it again
    join: int = 0
    at_points: int = 0  # triggers, drawn
    hang: int = 0  # a training thread stands still while its link lives
    drain_group: int = 0  # the operator asks a group to leave
    # Of followers, in groups of several ranks; the others strike leaders.
    rank_kill: int = 0
    rank_kill_unnoticed: int = 0
    rank_stop: int = 0
    rank_stall: int = 0  # its channel to the leader, and back, delivers nothing for a while
    rank_stall_up: int = 0
    rank_stall_down: int = 0
    rank_error: int = 0
    rank_drain: int = 0
    rank_hang: int = 0

    def with_those_of_ranks(self, rng: random.Random) -> "Faults":
        """`rng` is a stream of its own."""
        return dataclasses.replace(
            self,
            rank_kill=rng.choice((0, 1, 1, 2)),
            rank_kill_unnoticed=rng.choice((0, 0, 0, 1)),
            rank_stop=rng.choice((0, 0, 1, 2)),
            rank_stall=rng.choice((0, 0, 1)),
            rank_stall_up=rng.choice((0, 0, 0, 1)),
            rank_stall_down=rng.choice((0, 0, 0, 1)),
            rank_error=rng.choice((0, 0, 1, 2)),
            rank_drain=rng.choice((0, 0, 0, 0, 0, 1)),
            rank_hang=rng.choice((0, 0, 0, 0, 0, 1)),
        )

    lighthouse_sending: int = 0  # the lighthouse dies between two links of one message; what it sent arrives

    @staticmethod
    def drawn(rng: random.Random) -> "Faults":
        """The mix of everything that `--seed` runs."""
        spare = random.Random()
        spare.setstate(rng.getstate())  # so that older seeds still mean what they meant when they were found
        return Faults(
            kill=rng.choice((0, 1, 1, 2, 3)),
            kill_twice=rng.choice((0, 0, 1)),
            kill_unnoticed=rng.choice((0, 0, 0, 1)),
            link=rng.choice((0, 1, 2)),
            stall=rng.choice((0, 0, 1)),
            stall_up=rng.choice((0, 0, 1)),
            stall_down=rng.choice((0, 0, 0, 1)),
            stop=rng.choice((0, 0, 1)),
            lighthouse=rng.choice((0, 0, 1, 2)),
            lighthouse_stop=rng.choice((0, 0, 0, 1)),
            veto=rng.choice((0, 1, 2)),
            error=rng.choice((0, 1, 2)),
            drain=rng.choice((0, 0, 0, 1)),
            leave=rng.choice((0, 0, 0, 0, 0, 1)),
            join=rng.choice((0, 0, 1, 2)),
            at_points=rng.choice((0, 1, 2, 4)),
            hang=spare.choice((0, 0, 0, 0, 0, 1)),
            drain_group=spare.choice((0, 0, 0, 0, 0, 0, 1)),
            lighthouse_sending=spare.choice(
                (0, 0, 0, 0, 1, 0, 0, 0, 0)
            ),  # so ordered that no seed of seeds.txt draws it
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Climate:
    """How long things take and how patient the lighthouse is. Messages calm down when the faults end."""

    name: str
    delays: Delays = dataclasses.field(default_factory=Delays)
    heartbeat_timeout_s: float = 2.0
    link_grace_s: float = 0.02
    patience: float = 1.0  # scales the bound of I7


CLIMATES = (
    Climate(name="lan"),
    Climate(name="lan"),
    Climate(name="wan", delays=Delays(message=(0.0005, 0.3)), heartbeat_timeout_s=0.4),
    Climate(name="hasty", heartbeat_timeout_s=0.08, link_grace_s=0.0),
    Climate(name="sluggish", delays=Delays(wake=(0.0, 0.2), startup=(0.0, 3.0))),
    Climate(name="heavy", delays=Delays(compute=(1.0, 20.0), transfer=(0.5, 30.0)), patience=20.0),
)


class Injector:
    """Does to the world what the budget and the triggers say."""

    def __init__(self, world: "World", faults: Faults, triggers: tuple[Trigger, ...]) -> None:
        self._world = world
        self._rng = world.rng
        self._faults = faults
        more_points = RANK_POINTS if world.ranks > 1 else ()
        drawn = [Trigger.drawn(self._rng, more_points) for _ in range(faults.at_points)]
        spare = random.Random(f"sending {world.seed}")  # older seeds still mean what they meant
        drawn += [Trigger.drawn_of_sends(spare) for _ in range(faults.lighthouse_sending)]
        self._waiting: list[tuple[Trigger, list[int]]] = [(t, [0]) for t in (*triggers, *drawn)]
        self._unstruck = len(triggers)  # of those that were asked for: the faulty part lasts until they struck
        self._vetoes = 0
        self._is_calm = False
        self.done: list[str] = []

    @property
    def is_calm(self) -> bool:
        return self._is_calm

    @property
    def is_spent(self) -> bool:
        return self._unstruck <= 0

    def schedule(self, window: float) -> float:
        """Draw when each fault happens; returns when the last one has."""
        world, calm_at = self._world, self._world.now + (window if self._waiting else 0.0)
        self._vetoes = self._faults.veto
        for kind in (f.name for f in dataclasses.fields(self._faults)):
            if kind in ("veto", "at_points", "lighthouse_sending"):
                continue
            for _ in range(getattr(self._faults, kind)):
                when = world.now + self._rng.uniform(0, window)
                calm_at = max(calm_at, when)
                world.at(when, lambda kind=kind: self._strike(kind, None, None))  # type: ignore[misc]
        return calm_at

    def end(self) -> None:
        self._is_calm = True
        self._vetoes = 0
        self._waiting.clear()

    def wants_veto(self) -> bool:
        if self._vetoes > 0 and self._rng.random() < 0.1:
            self._vetoes -= 1
            self.done.append("veto")
            return True
        return False

    def reached(self, point: str, process: "Party | None") -> None:
        """`process` (None: the lighthouse) is at `point`."""
        for trigger, count in list(self._waiting):
            if trigger.point != point:
                continue
            if trigger.by is not None and (process is None or process.replica_id != trigger.by):
                continue
            count[0] += 1
            if count[0] == trigger.nth:
                self._waiting = [pair for pair in self._waiting if pair[0] is not trigger]
                self._pull(trigger, process)

    def _pull(self, trigger: Trigger, process: "Party | None") -> None:
        def strike() -> None:
            self._unstruck -= 1
            if not self._is_calm:
                victim = self._victim_of(trigger, process)
                self._strike(trigger.fault, victim, trigger.seconds)

        if trigger.fault.startswith("lighthouse") and trigger.after_s == 0 and process is None:
            strike()  # in the middle of what it does, not after it
        else:
            self._world.after(trigger.after_s, strike)

    def _victim_of(self, trigger: Trigger, process: "Party | None") -> "Party | None":
        if trigger.victim == "self":
            return process
        if trigger.victim == "other":
            others = [p for p in self._living() if p is not process]
            return self._rng.choice(others) if others else None
        if trigger.victim.startswith("follower of "):
            replica_id = trigger.victim.removeprefix("follower of ")
            return next((p for p in self._world.teams.followers() if p.replica_id == replica_id), None)
        return self._world.processes.get(trigger.victim)

    def _living(self) -> "list[Party]":
        return sorted(self._world.living(), key=lambda p: natural_key(p.name))

    # ---- the faults

    def _strike(self, kind: str, victim: "Party | None", seconds: float | None) -> None:
        if kind in ("lighthouse", "lighthouse_sending"):
            self._lighthouse(seconds, arrives=kind == "lighthouse_sending")
        elif kind == "lighthouse_stop":
            self.done.append("lighthouse_stop")
            self._world.lighthouse.stop(self._or(seconds, (0.1, 1.0, 5.0)))
        elif kind == "join":
            self.done.append("join")
            self._world.start_process(f"g{self._world.groups + len(self.done)}")
        elif kind == "kill_twice":
            self._strike("kill", None, None)
            self._world.after(self._rng.uniform(0, 0.002), lambda: self._strike("kill", None, None))
        else:
            is_of_rank = kind.startswith("rank_")
            living = self._world.teams.followers() if is_of_rank else self._living()
            if victim is None and living:
                victim = self._rng.choice(living)
            if victim is None or not victim.is_alive:
                return
            act: Callable[[Party, float | None], None] = getattr(self, f"_{kind.removeprefix('rank_')}")
            self.done.append(f"{kind} {victim.name}")
            act(victim, seconds)

    def _lighthouse(self, seconds: float | None, *, arrives: bool) -> None:
        if self._world.lighthouse.is_up:
            self.done.append("lighthouse_sending" if arrives else "lighthouse")
            self._world.lighthouse.crash(arrives=arrives)
            self._world.after(self._or(seconds, (0.01, 0.5, 3.0)), self._world.lighthouse.start)

    def _kill(self, victim: "Party", seconds: float | None, is_noticed: bool = True) -> None:
        if len(self._world.living()) < 2:
            self.done.pop()
            return
        victim.kill(is_noticed=is_noticed)
        delay = self._or(seconds, (0.0, 0.01, 0.2, 1.0, 3.0))
        self._world.after(delay, lambda: self._world.restart(victim.replica_id))

    def _kill_unnoticed(self, victim: "Party", seconds: float | None) -> None:
        self._kill(victim, seconds, is_noticed=False)

    def _link(self, victim: "Party", seconds: float | None) -> None:
        victim.link_lost("lost", self._or(seconds, (0.005, 0.1, 1.0, 4.0)))

    def _stall(self, victim: "Party", seconds: float | None) -> None:
        victim.stall_link(self._or(seconds, (0.05, 0.5, 3.0)))

    def _stall_up(self, victim: "Party", seconds: float | None) -> None:
        victim.stall_link(self._or(seconds, (0.05, 0.5, 3.0)), down=False)

    def _stall_down(self, victim: "Party", seconds: float | None) -> None:
        victim.stall_link(self._or(seconds, (0.05, 0.5, 3.0)), up=False)

    def _stop(self, victim: "Party", seconds: float | None) -> None:
        victim.stop(self._or(seconds, (0.05, 0.5, 3.0, 6.0)))

    def _error(self, victim: "Party", _seconds: float | None) -> None:
        victim.report_spurious_error(self._rng.choice((None, None, 0, 1, 2)))

    def _drain(self, victim: "Party", _seconds: float | None) -> None:
        if len(self._world.living()) < 2:
            self.done.pop()
            return
        victim.drain()

    def _hang(self, victim: "Party", _seconds: float | None) -> None:
        victim.hang()

    def _drain_group(self, victim: "Party", _seconds: float | None) -> None:
        if len(self._world.living()) < 2:
            self.done.pop()
            return
        self._world.lighthouse.drain(victim.replica_id)

    def _leave(self, victim: "Party", _seconds: float | None) -> None:
        if len(self._world.living()) < 2:
            self.done.pop()
            return
        victim.leave()

    def _or(self, seconds: float | None, choices: tuple[float, ...]) -> float:
        return seconds if seconds is not None else self._rng.choice(choices)
