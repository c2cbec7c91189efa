"""The agent's side: reads the pages of a node's ranks when a deadline may have come, and ends a rank that hangs.

One thread for all ranks. It sleeps until the earliest deadline of core/hang.py, or until a script has a request.
"""

import contextlib
import dataclasses
import os
import select
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Protocol

from everstep.core import hang
from everstep.core.hang import HangJudge, View
from everstep.core.limits import Observed
from everstep.monitor import page
from everstep.monitor.ending import Ending
from everstep.monitor.events import (
    IntervalsNews,
    MonitorFailed,
    RankCleared,
    RankEvent,
    RankSuspected,
    RankUnlimited,
)
from everstep.monitor.letters import Letters
from everstep.monitor.processes import process
from everstep.monitor.settings import MonitorSettings
from everstep.monitor.stacks import StackSource
from everstep.monitor.view import PageReader

__all__ = ["Monitor", "MonitorSettings", "Watched"]

VARIABLE = "EVERSTEP_MONITOR"
JOIN_S = 5.0


class Watched(Protocol):
    """A rank's process, as launcher/starting.py has it."""

    @property
    def pid(self) -> int: ...

    @property
    def started_at(self) -> float: ...

    def signal_group(self, number: int) -> None: ...


@dataclasses.dataclass
class WatchedRank:
    """`log_fd`: where this rank's stacks are written, too; `name`: what reports call it."""

    process: Watched
    fd: int
    reader: PageReader
    letters: Letters
    log_fd: int | None = None
    name: str = ""

    @property
    def source(self) -> StackSource:
        return StackSource(self.process.pid, self.fd)

    def view(self) -> View:
        seen = process(self.process.pid)
        return self.reader.read(seen.state, seen.cpu_s)


class Monitor:
    """A context manager. `on_event` is called on its thread, without a lock, and must not block for long."""

    def __init__(self, settings: MonitorSettings, on_event: Callable[[RankEvent], None]) -> None:
        self._settings = settings
        self._on_event = on_event
        self._lock = threading.Lock()
        self._judge = HangJudge(settings.hang)
        self._pages: dict[int, tuple[int, page.Words]] = {}
        self._ranks: dict[int, WatchedRank] = {}
        self._ending = Ending(settings.termination_signal, settings.kill_after_s)
        self._wake_read = -1
        self._wake_write = -1
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="rank monitor", daemon=True)

    # ---- any thread

    def start(self) -> None:
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._thread.start()

    def close(self) -> None:
        """Watch nobody any more. Processes live on."""
        self._is_closed = True
        self._wake()
        self._thread.join(JOIN_S)
        for rank in [*self._pages]:
            self.remove_rank(rank)
        for fd in (self._wake_read, self._wake_write):
            os.close(fd)

    def __enter__(self) -> "Monitor":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def environment(self, rank: int) -> dict[str, str]:
        """For a process that is about to be started as `rank`: a page. `add_rank` follows, or `remove_rank`."""
        self.remove_rank(rank)
        fd, words = page.new_page(self._settings.hang.limits.safety_factor)
        with self._lock:
            self._pages[rank] = fd, words
        folder = f"/proc/{os.getpid()}/fd"
        return {VARIABLE: f"{folder}/{fd},{folder}/{self._wake_write}"}

    def add_rank(self, rank: int, process: Watched, log_fd: int | None = None, name: str = "") -> None:
        """It runs since `process.started_at`. `log_fd` is the caller's, and open until `remove_rank`."""
        with self._lock:
            fd, words = self._pages[rank]
            self._ranks[rank] = WatchedRank(
                process, fd, PageReader(words), Letters(words), log_fd, name or f"rank {rank}"
            )
            self._judge.watch(rank, process.started_at, time.monotonic())
        self._wake()

    def remove_rank(self, rank: int) -> None:
        """It has ended, or is about to be. No event of it after this returns, but for one that is on its way."""
        with self._lock:
            self._judge.forget(rank, time.monotonic())
            self._ranks.pop(rank, None)
            self._ending.forget(rank)
            fd, words = self._pages.pop(rank, (-1, None))
            if words is not None:
                page.close_map(words)
                os.close(fd)

    def view(self, rank: int) -> View | None:
        """What this rank is doing now: for the status."""
        with self._lock:
            watched = self._ranks.get(rank)
            return watched.view() if watched is not None else None

    def hear(self, observed: Mapping[str, Observed]) -> None:
        """The longest intervals over all nodes."""
        with self._lock:
            self._judge.hear(observed, time.monotonic())
        self._wake()

    # ---- its own thread

    def _run(self) -> None:
        try:
            poll = select.poll()
            poll.register(self._wake_read, select.POLLIN)
            while not self._is_closed:
                poll.poll(self._timeout_ms())
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake_read, 4096)
                for event in self._turn():
                    self._on_event(event)
                self._ending.write_reports()
        except Exception as error:  # thread boundary: the agent must hear that nothing is watched any more
            self._on_event(MonitorFailed(-1, f"{type(error).__name__}: {error}"))
            raise

    def _timeout_ms(self) -> int | None:
        with self._lock:
            moments = [m for m in (self._judge.next_deadline(), self._ending.next_deadline()) if m is not None]
        if not moments:
            return None
        return max(0, int((min(moments) - time.monotonic()) * 1000) + 1)

    def _turn(self) -> list[RankEvent]:
        events: list[RankEvent] = []
        with self._lock:
            now = time.monotonic()
            for rank, watched in self._ranks.items():
                events += watched.letters.read(rank, self._judge, now)
            self._ending.tick(now)
            due = self._judge.due(now)
            findings = self._judge.receive({rank: self._ranks[rank].view() for rank in due}, now)
            for finding in findings:
                match finding:
                    case hang.Hung():
                        hung = self._ending.end(finding, self._ranks, now)
                        events.append(hung)
                        if hung.culprit == hung.rank:
                            self._judge.excuse([rank for rank, _ in hung.waiting], now)
                    case hang.Suspected(rank, detail, clock):
                        events.append(RankSuspected(rank, detail, clock.section, now - clock.since))
                    case hang.Cleared(rank, detail):
                        events.append(RankCleared(rank, detail))
                    case hang.Unlimited(rank, detail):
                        events.append(RankUnlimited(rank, detail))
            news = self._judge.limits.news(now)
            if news is not None:
                events.append(IntervalsNews(-1, "", news))
        return events

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):
            os.write(self._wake_write, b"\0")
