"""What scripts tell their agent besides beats: limits that they worked out, and requests."""

import math
from typing import Any

from everstep.core.hang import HangJudge
from everstep.monitor import page
from everstep.monitor.control import REASON_CHARS_MAX, WorkloadAction
from everstep.monitor.events import ControlRequested, RankEvent


class Letters:
    """Of one rank. What is wrong in a letter is passed over: its writer is the user's process."""

    def __init__(self, words: page.Words) -> None:
        self._words = words
        self._crc = -1
        self._handled = 0

    def read(self, rank: int, judge: HangJudge, now: float) -> list[RankEvent]:
        """News since the last call; `judge` takes the timeouts."""
        try:
            letter = page.read_letter(self._words, lambda crc: crc != self._crc)
        except ValueError:
            return []
        if letter is None:
            return []
        self._crc = self._words[page.W_LETTER_CRC]
        timeouts = letter.get("timeouts")
        if isinstance(timeouts, dict):
            judge.set_timeouts(rank, {key: limit for key, limit in timeouts.items() if _is_limit(limit)}, now)
        requests = letter.get("requests")
        return self._requests(rank, requests) if isinstance(requests, list) else []

    def _requests(self, rank: int, requests: list[Any]) -> list[RankEvent]:
        events: list[RankEvent] = []
        for request in requests:
            match request:
                case [int(number), str(action), str(reason)] if (
                    number > self._handled and action in WorkloadAction.__members__
                ):
                    self._handled = number
                    events.append(ControlRequested(rank, reason[:REASON_CHARS_MAX], WorkloadAction[action]))
        return events


def _is_limit(value: object) -> bool:
    return value is None or (
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    )
