"""Beats and sections of this process, written into the page: `heartbeat()` and `section(name)`.

Made of closures, because a cell is the cheapest thing that Python can change, and of one word per event, because a word
needs no lock. A signal handler runs, in CPython, where a call returns: each function calls only the clock, first, and
changes the page and its cells after that.

Without an agent all goes to a page that nobody reads; in a forked child (a DataLoader worker) too, so that a child's
life is never taken for its parent's.
"""

import dataclasses
import os
import threading
from _thread import _local, get_ident
from collections.abc import Callable, Collection
from time import monotonic_ns as clock
from types import TracebackType
from typing import Any, Protocol

from everstep.core.limits import HEARTBEAT, OUTSIDE, Observed, merge
from everstep.errors import ConfigError
from everstep.monitor import page
from everstep.monitor.page import NAME_BYTES_MAX, ROW_WORDS, ROWS, ROWS_MAX, Words
from everstep.monitor.track import Track


class SectionHandle(Protocol):
    """What `section` returns: the same object each time for one name on one thread."""

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...


@dataclasses.dataclass(frozen=True)
class Row:
    """One name on one thread."""

    name: str
    thread: int
    ident: int
    handle: SectionHandle
    enter: Callable[[], None]
    leave: Callable[[], bool | None]
    is_open: Callable[[], bool]
    track: Track


class _Here(_local):
    """Of each thread: its sections by name. Ends with the thread."""

    sections: dict[str, SectionHandle]
    enters: dict[str, Callable[[], None]]
    leaves: dict[str, Callable[[], bool | None]]
    thread: int
    state: "_ThreadState"
    alive: "_Thread"


class _Thread:
    """Held by a thread's locals alone: when the thread ends, its rows are given back."""

    def __init__(self, release: Callable[[], None]) -> None:
        self._release = release

    def __del__(self) -> None:
        self._release()


class Beats:
    """Of one process. `on_first_use` is called once, before the first beat or section counts."""

    def __init__(self, on_first_use: Callable[[], None] = lambda: None) -> None:
        self._words = page.blank()
        self._on_first_use: Callable[[], None] | None = on_first_use
        self._lock = threading.Lock()
        self._rows: list[Row | None] = []
        self._names: list[str] = []
        self._flags: dict[str, int] = {}
        self._threads = 0
        self._here = _Here()
        self._is_full = False
        self.beats = Track(self._publisher(page.W_BEAT_COUNT))
        self.outside = Track(self._publisher(page.W_OUT_COUNT))
        self._rebinders: list[Callable[[Words], None]] = []
        self.heartbeat, rebind = _make_heartbeat(self._words, self._note_beat)
        self._rebinders.append(rebind)
        os.register_at_fork(after_in_child=self._in_child)

    # ---- what scripts call

    def section(self, name: str) -> SectionHandle:
        """`with section("step"):`, on the thread that calls this."""
        try:
            return self._here.sections[name]
        except (AttributeError, KeyError):
            return self._new(name)

    def start(self, name: str) -> None:
        try:
            enter = self._here.enters[name]
        except (AttributeError, KeyError):
            self._new(name)
            enter = self._here.enters[name]
        enter()

    def end(self, name: str) -> None:
        """The one that this thread opened, else that of another thread."""
        try:
            if self._here.leaves[name]() is None:
                return
        except (AttributeError, KeyError):
            pass
        row = self._open_row(name)
        if row is None:
            raise ConfigError(f"section {name!r} is not open")
        row.leave()

    def end_all(self) -> None:
        """Every open section, of every thread."""
        for row in list(self._rows):
            if row is not None and row.is_open():
                row.leave()

    def describe(self, name: str, *, waits: bool = False, is_mixed: bool = False) -> None:
        """Before its first use: the section is one of waiting for other ranks; anything may happen in it."""
        self._flags[name] = (page.FLAG_WAITS if waits else 0) | (page.FLAG_MIXED if is_mixed else 0)

    def put_away(self, names: Collection[str]) -> None:
        """As if these sections had never been used, until they are used again: the time outside runs without them."""
        for number, row in enumerate(list(self._rows)):
            if row is not None and row.name in names and not row.is_open():
                self._words[ROWS + number * ROW_WORDS + page.R_SECTION] = 0

    def open_sections(self) -> list[str]:
        return [row.name for row in list(self._rows) if row is not None and row.is_open()]

    # ---- the page

    @property
    def words(self) -> Words:
        return self._words

    def rebind(self, words: Words) -> None:
        """From now on this page; it takes over what stands in the last one."""
        with self._lock:
            factor = words[page.W_FACTOR]
            words[page.W_PID + 1 :] = self._words[page.W_PID + 1 :]
            words[page.W_FACTOR] = factor
            self._point_at(words)

    @property
    def safety_factor(self) -> float | None:
        """Of the agent's settings; None without an agent."""
        return self._words[page.W_FACTOR] / page.FACTOR_UNIT or None

    def say_over(self, is_over: bool) -> None:
        self._words[page.W_FLAGS] = page.FLAG_OVER if is_over else 0

    def _point_at(self, words: Words) -> None:
        self._words = words
        for rebind in self._rebinders:
            rebind(words)

    def _in_child(self) -> None:
        """Only the forking thread lives on, so nobody holds the lock; a copy of it might look held."""
        self._lock = threading.Lock()
        self._on_first_use = None
        self._point_at(page.blank())

    # ---- learned

    def observed(self) -> dict[str, Observed]:
        """Intervals of this process, by key."""
        every: dict[str, Observed] = {}
        pairs = [(HEARTBEAT, self.beats), (OUTSIDE, self.outside)]
        pairs += [(row.name, row.track) for row in list(self._rows) if row is not None]
        merge(every, [(key, seen) for key, track in pairs if (seen := track.observed()) is not None])
        return every

    def seed(self, observed: dict[str, Observed]) -> None:
        """What an earlier process saw counts as if this one had."""
        for key, one in observed.items():
            if key == HEARTBEAT:
                self.beats.seed(one)
            elif key == OUTSIDE:
                self.outside.seed(one)
            else:
                self.section(key)
                row = next((r for r in list(self._rows) if r is not None and r.name == key), None)
                if row is not None:
                    row.track.seed(one)

    # ---- slow paths

    def _publisher(self, word: int, flags: int | None = None) -> Callable[[int, int, bool], None]:
        def publish(count: int, longest_ns: int, is_warm: bool) -> None:
            words = self._words
            words[word], words[word + 1] = max(count, 0), longest_ns
            if is_warm and flags is not None:
                words[flags] |= page.FLAG_WARM

        return publish

    def _note_beat(self, number: int, interval_ns: int, now: int) -> tuple[int, int]:
        if number == 0:  # the first beat ends no interval
            self._begin()
            self._words[page.W_BEAT] = now
            return -1, 0
        return self.beats.note(number, interval_ns, now)

    def _begin(self) -> None:
        call, self._on_first_use = self._on_first_use, None
        if call is not None:
            call()

    def _new(self, name: str) -> SectionHandle:
        self._begin()
        if not name or name.startswith("<") or len(name.encode()) > NAME_BYTES_MAX:
            raise ConfigError(f"a section's name has 1 to {NAME_BYTES_MAX} bytes, and no < first; not {name!r}")
        here = self._here
        with self._lock:
            if not hasattr(here, "sections"):
                self._new_thread()
            row = self._make(name)
        here.enters[name] = row.enter
        here.leaves[name] = row.leave
        here.sections[name] = row.handle
        return row.handle

    def _new_thread(self) -> None:
        ident, here = get_ident(), self._here
        is_main = threading.current_thread() is threading.main_thread()
        if not is_main:
            self._threads += 1
        here.thread = 0 if is_main else self._threads
        here.alive = _Thread(lambda: self._release(ident))
        here.state = _ThreadState(self.outside)
        here.enters = {}
        here.leaves = {}
        here.sections = {}

    def _make(self, name: str) -> Row:
        number = self._free_row(name)
        at = ROWS + number * ROW_WORDS if number is not None else page.LETTER - ROW_WORDS  # a row that is not counted
        here = self._here
        track = Track(self._publisher(at + page.R_COUNT, at + page.R_FLAGS))
        handle, enter, leave, is_open, rebind = _make_section(self._words, _Place(name, at, track, here.state))
        row = Row(name, here.thread, get_ident(), handle, enter, leave, is_open, track)
        self._rebinders.append(rebind)
        if number is None:
            return row
        words = self._words
        words[at + page.R_SECTION] = 0
        words[at + page.R_THREAD] = here.thread
        words[at + page.R_FLAGS] = self._flags.get(name, 0) | words[at + page.R_FLAGS] & page.FLAG_WARM
        page.write_name(words, number, name)
        if number == len(self._rows):
            self._rows.append(row)
            self._names.append(name)
            words[page.W_ROWS] = len(self._rows)
        else:
            self._rows[number] = row
        return row

    def _free_row(self, name: str) -> int | None:
        """That of an ended thread for the same name, else a new one; None when the page is full."""
        for number, row in enumerate(self._rows):
            if row is None and self._names[number] == name:
                return number
        if len(self._rows) < ROWS_MAX - 1:
            return len(self._rows)
        if not self._is_full:
            self._is_full = True
            from everstep.monitor.attach import say

            say(f"section {name!r} and those after it are not watched: there are {ROWS_MAX - 1} already")
        return None

    def _release(self, ident: int) -> None:
        """Its thread has ended: what it left open is closed."""
        for number, row in enumerate(self._rows):
            if row is not None and row.ident == ident:
                self._words[ROWS + number * ROW_WORDS + page.R_SECTION] = 0
                self._rows[number] = None

    def _open_row(self, name: str) -> Row | None:
        rows = [row for row in list(self._rows) if row is not None and row.name == name and row.is_open()]
        return rows[0] if rows else None


# ---- the fast paths


def _make_heartbeat(
    words: Words, note: Callable[[int, int, int], tuple[int, int]]
) -> tuple[Callable[[], None], Callable[[Words], None]]:
    last = 0
    beats = -1
    ceiling = -1
    due = 0

    def heartbeat() -> None:
        """This rank is alive. Any thread; 0.3 us, no system call, never blocks."""
        nonlocal last, beats, ceiling, due
        now = clock()
        words[4] = now  # page.W_BEAT
        beats += 1
        if now - last > ceiling or now > due:
            ceiling, due = note(beats, now - last, now)
        last = now

    def rebind(new: Words) -> None:
        nonlocal words
        words = new

    return heartbeat, rebind


class _ThreadState:
    """What the sections of one thread share: whether one is open, and since when none is."""

    __slots__ = ("_number", "_track", "ceiling", "closed_at", "depth", "due")

    def __init__(self, track: Track) -> None:
        self._track = track
        self._number = -1
        self.depth = 0
        self.closed_at = 0
        self.ceiling = -1
        self.due = 0

    def note(self, now: int) -> None:
        """The thread was in no section until now."""
        self._number += 1
        if self.closed_at:
            self.ceiling, self.due = self._track.note(self._number, now - self.closed_at, now)


@dataclasses.dataclass(frozen=True)
class _Place:
    name: str
    at: int
    track: Track
    thread: _ThreadState


def _make_section(words: Words, place: _Place) -> Any:
    """Returns (the object for `with`, enter, leave, is_open, rebind)."""
    name, at, note, thread = place.name, place.at, place.track.note, place.thread
    opened = 0
    number = 0
    ceiling = -1
    due = 0

    def enter() -> None:
        nonlocal opened
        if opened:
            raise ConfigError(f"section {name!r} is open already: close it first, or give this one another name")
        now = clock()
        if not thread.depth and (now - thread.closed_at > thread.ceiling or now > thread.due):
            thread.note(now)
        thread.depth += 1
        opened = now
        words[at] = now << 1 | 1

    def leave(_kind: object = None, _error: object = None, _trace: object = None) -> bool | None:
        """False: it was not open (any more)."""
        nonlocal opened, number, ceiling, due
        now = clock()
        if not opened:
            return False
        lasted = now - opened
        words[at] = now << 1
        opened = 0
        thread.depth -= 1
        thread.closed_at = now
        number += 1
        if lasted > ceiling or now > due:
            ceiling, due = note(number, lasted, now)  # a call: whatever strikes in it, the section is closed
        return None

    def is_open() -> bool:
        return opened != 0

    def rebind(new: Words) -> None:
        nonlocal words
        words = new

    kind = type("Section", (), {"__slots__": (), "__enter__": staticmethod(enter), "__exit__": staticmethod(leave)})
    return kind(), enter, leave, is_open, rebind
