"""Ties the rank monitor to an agent: its workers, their logs, and what their scripts ask for."""

import contextlib
import itertools
import logging
import os
import stat
import threading
from collections.abc import Callable
from types import TracebackType

from everstep.core.learned import KINDS_MAX, as_observed
from everstep.core.node_messages import RankNews, RankReport, SeenInterval
from everstep.core.rank_news import STACKS_CHARS_MAX, WAITING_MAX
from everstep.core.stacks import cut
from everstep.launcher.starting import WorkerProcess
from everstep.monitor.control import WorkloadAction
from everstep.monitor.events import (
    ControlRequested,
    IntervalsNews,
    MonitorFailed,
    RankCleared,
    RankEvent,
    RankHung,
    RankSuspected,
    RankUnlimited,
)
from everstep.monitor.reader import Monitor
from everstep.monitor.settings import MonitorSettings

__all__ = ["RankMonitor", "Ward"]

STDERR = 2
KNOWN_MAX = 2048

log = logging.getLogger("everstep.monitor")
Ask = Callable[[WorkloadAction, str], None]
Tell = Callable[[RankReport], None]
Share = Callable[[tuple[SeenInterval, ...]], None]


class Ward:
    """One start of one worker. Without a monitor (no memfd) it is unwatched, and all of this does nothing."""

    def __init__(self, monitor: "RankMonitor", number: int, environment: dict[str, str]) -> None:
        self._monitor = monitor
        self._number = number
        self.environment = environment  # what it needs in the worker's

    def watch(self, process: WorkerProcess, name: str, stderr: int | None, tell: Tell) -> None:
        """It runs. Its stacks go where `stderr` leads, which may be closed after this; what becomes of it to `tell`."""
        if self.environment:
            self._monitor.watch(self._number, process, name, STDERR if stderr is None else stderr, tell)

    def let_go(self) -> None:
        """It has ended, or never began. More than once: nothing."""
        if self.environment:
            self._monitor.let_go(self._number)


class RankMonitor:
    """A context manager. `ask`, `share`, and each rank's `tell` are called on the monitor's thread: be quick."""

    def __init__(self, settings: MonitorSettings, ask: Ask, share: Share) -> None:
        self._monitor = Monitor(settings, self._on_event)
        self._ask = ask
        self._share = share
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._known: dict[int, tuple[str, Tell]] = {}  # and some that have ended: the news of it may come after that
        self._logs: dict[int, int] = {}
        log.setLevel(settings.log_level)

    def __enter__(self) -> "RankMonitor":
        self._monitor.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._monitor.close()
        for number in [*self._logs]:
            self.let_go(number)

    def prepare(self) -> Ward:
        """Before a worker is started."""
        number = next(self._numbers)
        try:
            return Ward(self, number, self._monitor.environment(number))
        except (OSError, AttributeError) as error:  # an old kernel, a sandbox, no descriptor left
            log.warning("a worker is not watched for hangs: %s", error)
            return Ward(self, number, {})

    def watch(self, number: int, process: WorkerProcess, name: str, stderr: int, tell: Tell) -> None:
        log_fd = _writer_to(stderr)
        with self._lock:
            self._known[number] = name, tell
            if len(self._known) > KNOWN_MAX:
                del self._known[next(iter(self._known))]
            if log_fd is not None:
                self._logs[number] = log_fd
        self._monitor.add_rank(number, process, log_fd, name)

    def let_go(self, number: int) -> None:
        self._monitor.remove_rank(number)
        with self._lock:
            log_fd = self._logs.pop(number, None)
        if log_fd is not None:
            os.close(log_fd)

    def hear(self, intervals: tuple[SeenInterval, ...]) -> None:
        """The longest over all nodes of the job."""
        self._monitor.hear(as_observed((one.key, one.longest_s) for one in intervals))

    def _on_event(self, event: RankEvent) -> None:
        if isinstance(event, IntervalsNews):
            self._share(tuple(SeenInterval(*one) for one in [*event.longest.items()][:KINDS_MAX]))
            return
        with self._lock:
            name, tell = self._known.get(event.rank, (f"worker {event.rank}", None))
        report = _report(event, name)
        if tell is not None and report is not None:
            tell(report)
        match event:
            case RankHung(culprit=culprit):
                why = f" (the others wait for {event.names[culprit]})" if culprit is not None else ""
                log.error("%s hangs, and is ended by signal %d: %s%s", name, event.signal, event.detail, why)
            case ControlRequested(_, reason, action):
                log.warning("%s asks for %s: %s", name, action.name, reason)
                self._ask(action, f"{name} asks for {action.name}: {reason}")
            case RankSuspected():
                log.warning("%s may hang: %s", name, event.detail)
            case MonitorFailed():
                log.critical("the rank monitor has failed, nothing is watched any more: %s", event.detail)
            case RankUnlimited():
                log.warning(
                    "%s: %s; a section, a heartbeat or --ft-initial-rank-heartbeat-timeout would", name, event.detail
                )
            case _:
                log.info("%s: %s", name, event.detail)


def _report(event: RankEvent, name: str) -> RankReport | None:
    """For the lighthouse; None: that is of no interest there."""
    match event:
        case RankSuspected():
            return RankReport(
                news=RankNews.SUSPECTED, rank=name, detail=event.detail, section=event.section, age_s=event.age_s
            )
        case RankCleared():
            return RankReport(news=RankNews.CLEARED, rank=name, detail=event.detail)
        case RankHung():
            return RankReport(
                news=RankNews.HUNG,
                rank=name,
                detail=event.detail,
                section=event.section,
                age_s=event.age_s,
                culprit=event.names[event.culprit] if event.culprit is not None else "",
                waiting=tuple(event.names[rank] for rank, _ in event.waiting[:WAITING_MAX]),
                stacks=cut(event.stacks.get(event.rank, ""), STACKS_CHARS_MAX),
            )
    return None


def _writer_to(fd: int) -> int | None:
    """A descriptor of our own; to a pipe an open file of our own, that never blocks while the worker's does."""
    with contextlib.suppress(OSError):
        if stat.S_ISFIFO(os.fstat(fd).st_mode):
            return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        return os.dup(fd)
    return None
