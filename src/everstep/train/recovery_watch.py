"""Looks at a fetch while it runs, and tells: the lighthouse by way of the heartbeats, and the log of a long one.

A thread of its own looks a few times a second, whatever the transport: nothing is asked of the fetch's threads.
"""

import collections
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType

import msgspec

from everstep.core.recovery_report import DETAIL_CHARS_MAX, RecoveryOutcome, RecoveryReport
from everstep.errors import StepInterrupted
from everstep.recovery import FetchReport

LOOK_S = 0.25
PACE_S = 2.0  # the rate is that of so long
LINE_S = 5.0  # between two lines of the log at least
LINE_AFTER_S = 60.0  # a line, though nothing much has changed
LINE_SHARE = 0.1  # of the state, that is worth a line


class Pace:
    """How fast something grows, lately."""

    def __init__(self, now: float) -> None:
        self._looks = collections.deque([(now, 0)])

    def look(self, done: int, now: float) -> int:
        """Per second."""
        self._looks.append((now, done))
        while len(self._looks) > 2 and self._looks[1][0] <= now - PACE_S:
            self._looks.popleft()
        began_at, before = self._looks[0]
        return round((done - before) / (now - began_at)) if now > began_at else 0


class Lines:
    """When a long transfer is worth another line: few seconds apart at the closest, and not for every little bit."""

    def __init__(self, now: float) -> None:
        self._said = (now, 0.0)

    def is_due(self, share: float, now: float) -> bool:
        said_at, said_share = self._said
        if now < said_at + LINE_S or (share < said_share + LINE_SHARE and now < said_at + LINE_AFTER_S):
            return False
        self._said = (now, share)
        return True


Show = Callable[[RecoveryReport, bool], object]


class RecoveryWatch:
    """Context manager around a fetch: `first` says which. `names`: its donors, by what `fetch` has for them.

    `show(report, is_line)` is called at the start, a few times a second, and at the end; `is_line`: it is worth a line
    of the log. On the thread that enters and leaves, or the watch's own, one at a time.
    """

    def __init__(
        self, *, first: RecoveryReport, names: Mapping[str, str], transport: str, fetch: FetchReport, show: Show
    ) -> None:
        self._first = msgspec.structs.replace(first, donors=tuple(names.values()))
        self._names = names
        self._transport = transport
        self._fetch = fetch
        self._show = show
        self._began_at = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="everstep-fetch-watch", daemon=True)

    def __enter__(self) -> None:
        self._began_at = time.monotonic()
        self._show(self._first, False)
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        report = self._look(time.monotonic())
        rate = round(report.done_bytes / report.seconds) if report.seconds > 0 else 0
        report = msgspec.structs.replace(report, outcome=RecoveryOutcome.DONE, bytes_per_s=rate)
        if error is not None:
            outcome = RecoveryOutcome.CUT_SHORT if isinstance(error, StepInterrupted) else RecoveryOutcome.FAILED
            detail = str(error).partition("\n")[0][:DETAIL_CHARS_MAX]
            report = msgspec.structs.replace(report, outcome=outcome, detail=detail)
        self._show(report, False)

    def _watch(self) -> None:
        pace, lines = Pace(self._began_at), Lines(self._began_at)
        while not self._over.wait(LOOK_S):
            now = time.monotonic()
            report = self._look(now)
            report = msgspec.structs.replace(report, bytes_per_s=pace.look(report.done_bytes, now))
            share = report.done_bytes / report.total_bytes if report.total_bytes else 0.0
            self._show(report, lines.is_due(share, now))

    def _look(self, now: float) -> RecoveryReport:
        fetch = self._fetch
        senders, lost = list(fetch.bytes_from), dict(fetch.lost)
        return msgspec.structs.replace(
            self._first,
            done_bytes=fetch.done_bytes,
            total_bytes=fetch.total_bytes,
            seconds=now - self._began_at,
            donors=tuple(name for url, name in self._names.items() if url not in lost),
            retries=fetch.retries,
            digest_errors=fetch.digest_errors,
            transport="+".join(sorted({fetch.transport.get(url, self._transport) for url in senders})),
        )
