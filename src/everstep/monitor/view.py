"""A page as the agent reads it: into the terms of core/hang.py."""

from everstep.core.hang import Section, View
from everstep.core.limits import HEARTBEAT, OUTSIDE, Observed
from everstep.monitor import page
from everstep.monitor.page import ROW_WORDS, ROWS, ROWS_MAX, Words


class PageReader:
    """Of one rank. Take `now` before `read`: what it returns was true then or became so since."""

    def __init__(self, words: Words) -> None:
        self._words = words
        self._names: list[str] = []  # a row's name never changes

    def read(self, state: str = "", cpu_s: float = 0.0) -> View:
        words = self._words
        count = min(words[page.W_ROWS], ROWS_MAX)
        while len(self._names) < count:
            self._names.append(page.read_name(words, len(self._names)))
        rows = words[ROWS : ROWS + count * ROW_WORDS].tolist()
        beat, beats, beat_longest = words[page.W_BEAT : page.W_BEAT_LONGEST + 1].tolist()
        observed = _observed(HEARTBEAT, beats, beat_longest)
        observed |= _observed(OUTSIDE, *words[page.W_OUT_COUNT : page.W_OUT_LONGEST + 1].tolist())
        sections: list[Section] = []
        closed: dict[int, int] = {}  # by thread, the last end of a section
        passed = 0
        for name, at in zip(self._names, range(0, len(rows), ROW_WORDS), strict=True):
            word, thread, flags, intervals, longest = rows[at : at + page.R_LONGEST + 1]
            if intervals:
                before = observed.get(name, Observed(0, 0.0))
                observed[name] = Observed(max(intervals, before.count), max(longest / 1e9, before.longest_s))
            if not word:
                continue
            closed.setdefault(thread, 0)
            waits = bool(flags & page.FLAG_WAITS)
            if word & 1:
                is_mixed, is_cold = bool(flags & page.FLAG_MIXED), not flags & page.FLAG_WARM
                sections.append(Section(name, (word >> 1) / 1e9, thread, waits, is_mixed, is_cold))
            else:
                closed[thread] = max(closed[thread], word >> 1)
                passed = max(passed, word >> 1) if waits else passed
        return View(
            heartbeat_at=beat / 1e9 if beat else None,
            sections=tuple(sections),
            outside_since=_outside_since(sections, closed),
            passed_at=passed / 1e9 if passed else None,
            observed=observed,
            state=state,
            cpu_s=cpu_s,
            is_over=bool(words[page.W_FLAGS] & page.FLAG_OVER),
        )


def _observed(key: str, count: int, longest_ns: int) -> dict[str, Observed]:
    return {key: Observed(count, longest_ns / 1e9)} if count else {}


def _outside_since(sections: list[Section], closed: dict[int, int]) -> float | None:
    """The training thread is the main one, or the first that used sections."""
    if not closed:
        return None
    thread = min(closed)
    if any(section.thread == thread for section in sections):
        return None
    return closed[thread] / 1e9
