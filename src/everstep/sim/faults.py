"""Does to a world what its budget of faults and its triggers say."""

import dataclasses
import random
from collections.abc import Callable
from typing import TYPE_CHECKING

from everstep.core.types import natural_key
from everstep.sim.budgets import LOAN_POINTS, RANK_POINTS, Faults, Trigger

if TYPE_CHECKING:
    from everstep.sim.party import Party
    from everstep.sim.world import World

CRASH_LOOP_S = 3.0


class Injector:
    """Does to the world what the budget and the triggers say."""

    def __init__(self, world: "World", faults: Faults, triggers: tuple[Trigger, ...]) -> None:
        self._world = world
        self._rng = world.rng
        self._faults = faults
        more_points = (RANK_POINTS if world.ranks > 1 else ()) + (LOAN_POINTS * 3 if world.lends else ())
        drawn = [Trigger.drawn(self._rng, more_points) for _ in range(faults.at_points)]
        spare = random.Random(f"sending {world.seed}")  # older seeds still mean what they meant
        drawn += [Trigger.drawn_of_sends(spare) for _ in range(faults.lighthouse_sending)]
        self._waiting: list[tuple[Trigger, list[int]]] = [(t, [0]) for t in (*triggers, *drawn)]
        self._unstruck = len(triggers)  # of those that were asked for: the faulty part lasts until they struck
        self._vetoes = 0
        self._is_calm = False
        self.done: list[str] = []
        self.broken_paths_s: list[float] = []  # how long each was to last

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
                # A path stays broken for all of its time: what matters is what happens again and again meanwhile.
                lasts_s = self._rng.choice((0.3, 2.0, 8.0)) if kind == "broken_path" else None
                calm_at = max(calm_at, when + (CRASH_LOOP_S if kind == "crash_loop" else lasts_s or 0.0))
                world.at(when, lambda kind=kind, s=lasts_s: self._strike(kind, None, s))  # type: ignore[misc]
        return calm_at

    def end(self) -> None:
        self._is_calm = True
        self._world.collectives_of(0).mend_paths()
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
        elif kind == "switch":
            self.done.append("switch")
            lasting_s = self._or(seconds, (0.5, 2.5, 5.0))
            for process in self._living():
                process.stall_link(lasting_s)
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

    def _crash_loop(self, victim: "Party", seconds: float | None) -> None:
        self._crash_again(victim.replica_id, self._rng.choice((3, 5, 9)), seconds)

    def _crash_again(self, replica_id: str, deaths: int, seconds: float | None) -> None:
        victim = self._world.processes[replica_id]
        if deaths == 0 or self._is_calm or len(self._world.living()) < 2:
            return
        if victim.is_alive:
            victim.kill()
            self._world.after(0.01, lambda: self._world.restart(replica_id))
        after_s = self._or(seconds, (0.05, 0.2, 0.5))
        self._world.after(after_s, lambda: self._crash_again(replica_id, deaths - 1, seconds))

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

    def _hold(self, victim: "Party", seconds: float | None) -> None:
        victim.hold(self._or(seconds, (0.5, 3.0, 6.0)))

    def _agent_link(self, victim: "Party", seconds: float | None) -> None:
        self._world.agents.of(victim).link_lost(self._or(seconds, (0.005, 0.1, 1.0, 4.0)))

    def _agent_stall(self, victim: "Party", seconds: float | None) -> None:
        self._world.agents.of(victim).stall(self._or(seconds, (0.05, 0.5, 3.0)))

    def _kill_agent(self, victim: "Party", _seconds: float | None) -> None:
        if len(self._world.living()) < 2:
            self.done.pop()
            return
        self._world.agents.of(victim).die()

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

    def _broken_path(self, victim: "Party", seconds: float | None) -> None:
        others = [p for p in self._living() if p is not victim]
        if not others:
            self.done.pop()
            return
        other = self._rng.choice(others)
        lasts_s = self._or(seconds, (0.3, 2.0, 8.0))
        self._world.collectives_of(0).break_path(victim.replica_id, other.replica_id, self._world.now + lasts_s)
        self.broken_paths_s.append(lasts_s)
        self.done[-1] += f"-{other.name}"

    def _leave(self, victim: "Party", _seconds: float | None) -> None:
        if len(self._world.living()) < 2:
            self.done.pop()
            return
        victim.leave()

    def _or(self, seconds: float | None, choices: tuple[float, ...]) -> float:
        return seconds if seconds is not None else self._rng.choice(choices)
