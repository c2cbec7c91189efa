"""A stand-in for the launcher's agent: starts ranks, and listens to what the monitor says of them."""

import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from everstep.core.hang import HangPolicy
from everstep.core.limits import LimitPolicy
from everstep.monitor.events import MonitorFailed, RankEvent
from everstep.monitor.reader import Monitor, MonitorSettings
from tests.support.processes import Spawned, Spawner

DEADLINE_S = 20.0
E = TypeVar("E", bound=RankEvent)


class Rank:
    """A spawned process as the monitor wants it."""

    def __init__(self, spawned: Spawned, started_at: float) -> None:
        self.spawned = spawned
        self.pid = spawned.pid
        self.started_at = started_at
        self.signalled: list[tuple[int, float]] = []

    def signal_group(self, number: int) -> None:
        self.signalled.append((number, time.monotonic()))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)


class Agent:
    """A context manager around one Monitor."""

    def __init__(self, spawner: Spawner, settings: MonitorSettings) -> None:
        self._spawner = spawner
        self.monitor = Monitor(settings, self._note)
        self.ranks: dict[int, Rank] = {}
        self._events: list[tuple[float, RankEvent]] = []
        self._changed = threading.Condition()

    def start(self, rank: int, source: str, log: Path | None = None) -> Spawned:
        """Run `source` as this rank."""
        env = {**self.monitor.environment(rank), "PYTHONFAULTHANDLER": None}
        at = time.monotonic()
        spawned = self._spawner(["-c", source], env=env)
        self.ranks[rank] = Rank(spawned, at)
        log_fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if log is not None else None
        self.monitor.add_rank(rank, self.ranks[rank], log_fd)
        return spawned

    def expect(self, kind: type[E], fits: Callable[[E], object] = lambda _: True, deadline_s: float = DEADLINE_S) -> E:
        """The first event like this; it stays."""
        deadline = time.monotonic() + deadline_s
        with self._changed:
            while True:
                for _, event in self._events:
                    if isinstance(event, kind) and fits(event):
                        return event
                if not self._changed.wait(deadline - time.monotonic()):
                    raise AssertionError(f"no {kind.__name__} within {deadline_s:g} s, but {self.events}")

    @property
    def events(self) -> list[RankEvent]:
        with self._changed:
            return [event for _, event in self._events]

    def _note(self, event: RankEvent) -> None:
        with self._changed:
            self._events.append((time.monotonic(), event))
            self._changed.notify_all()

    def __enter__(self) -> "Agent":
        self.monitor.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.monitor.close()
        failed = [event for event in self.events if isinstance(event, MonitorFailed)]
        assert not failed, failed


def limits(**given: float | None) -> MonitorSettings:
    """Limits of `heartbeat`, `outside`, `initial`, `stopped` and, by other names, of sections; nothing is learned."""
    keys = {"heartbeat": "<heartbeat>", "outside": "<outside>"}
    initial, stopped = given.pop("initial", None), given.pop("stopped", 30.0)
    policy = LimitPolicy(given={keys.get(name, name): limit for name, limit in given.items()}, learns=False)
    return MonitorSettings(hang=HangPolicy(initial_s=initial, stopped_s=stopped, limits=policy))
