"""Ends a rank that hangs: stacks first, then who is to blame, then the signals."""

import contextlib
import os
import signal
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from everstep.core.hang import Hung
from everstep.core.stacks import waits_for_others
from everstep.monitor.events import RankHung
from everstep.monitor.stacks import dump, dump_all

if TYPE_CHECKING:
    from everstep.monitor.reader import WatchedRank

DUMP_S = 0.2  # of the rank that hangs; usual: a few ms; longer where it gets no processor (stacks.STARVED_S)
DUMP_OTHERS_S = 0.02
OTHERS_MAX = 16


class Ending:
    """Under the monitor's lock, but for `write_reports`."""

    def __init__(self, termination_signal: int, kill_after_s: float) -> None:
        self._reports: list[tuple[int, str]] = []  # not written yet, and where
        self._signal = termination_signal
        self._kill_after_s = kill_after_s
        self._kills: dict[int, tuple[float, WatchedRank]] = {}

    def forget(self, rank: int) -> None:
        self._kills.pop(rank, None)

    def next_deadline(self) -> float | None:
        return min((at for at, _ in self._kills.values()), default=None)

    def tick(self, now: float) -> None:
        """Whom the termination signal did not end."""
        for rank, (at, watched) in list(self._kills.items()):
            if now >= at:
                del self._kills[rank]
                _signal(watched, signal.SIGKILL)

    def end(self, hung: Hung, ranks: Mapping[int, "WatchedRank"], now: float) -> RankHung:
        rank, watched = hung.rank, ranks[hung.rank]
        begun = time.monotonic()
        stacks = {rank: dump(watched.source, begun + DUMP_S)}
        others = [other for other in ranks if other != rank][:OTHERS_MAX]
        deadline = time.monotonic() + DUMP_OTHERS_S
        stacks |= dict(zip(others, dump_all([ranks[other].source for other in others], deadline), strict=True))
        culprit, waiting = _blame(hung, stacks)
        event = RankHung(
            rank,
            hung.detail,
            mechanism=hung.clock.mechanism.value,
            section=hung.clock.section,
            age_s=now - hung.clock.since,
            limit_s=hung.clock.limit_s,
            culprit=culprit,
            waiting=waiting,
            stacks=stacks,
            signal=self._signal,
            names={number: one.name for number, one in ranks.items()},
        )
        if watched.log_fd is not None:
            with contextlib.suppress(OSError):
                self._reports.append((os.dup(watched.log_fd), event.report()))
        _signal(watched, self._signal)
        _signal(watched, signal.SIGCONT)
        if self._signal != signal.SIGKILL:
            self._kills[rank] = time.monotonic() + self._kill_after_s, watched
        return event

    def write_reports(self) -> None:
        """Without the lock, and after the signals: a log on a file system that hangs holds up nobody else."""
        while self._reports:
            fd, text = self._reports.pop(0)
            try:
                with contextlib.suppress(OSError):  # a full disk, a reader that has gone
                    os.write(fd, text.encode())
            finally:
                os.close(fd)


def _blame(hung: Hung, stacks: Mapping[int, str]) -> tuple[int | None, tuple[tuple[int, str], ...]]:
    """The rank that the others wait for: as the pages say, else as the stacks say; None when neither does."""
    if hung.waiting or hung.blamed_by is not None:
        return hung.rank, hung.waiting
    verdicts = {rank: waits_for_others(text) for rank, text in stacks.items()}
    waiting = tuple((rank, "a collective") for rank, waits in verdicts.items() if waits and rank != hung.rank)
    working = [rank for rank, waits in verdicts.items() if waits is False]
    if not waiting and not verdicts[hung.rank]:
        return (hung.rank if len(stacks) > 1 and None not in verdicts.values() else None), ()
    if hung.rank in working or (verdicts[hung.rank] is None and not working):
        return hung.rank, waiting
    return (working[0] if len(working) == 1 else None), waiting


def _signal(watched: "WatchedRank", number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        watched.process.signal_group(number)
