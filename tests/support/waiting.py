"""The one place where tests poll. Prefer an event, a line of output or a file descriptor; this is the last resort."""

import asyncio
import threading
import time
from collections.abc import Callable

POLL_INTERVAL_S = 0.005


def wait_until(predicate: Callable[[], object], deadline_s: float = 10.0, *, what: str = "") -> None:
    """Return as soon as `predicate()` is true; fail the test after `deadline_s` seconds, saying what was awaited."""
    deadline = time.monotonic() + deadline_s
    never = threading.Event()
    while not predicate():
        if time.monotonic() >= deadline:
            raise AssertionError(_complaint(predicate, deadline_s, what))
        never.wait(POLL_INTERVAL_S)


async def wait_until_async(predicate: Callable[[], object], deadline_s: float = 10.0, *, what: str = "") -> None:
    """`wait_until` for a coroutine: the loop keeps running meanwhile."""
    deadline = time.monotonic() + deadline_s
    while not predicate():
        if time.monotonic() >= deadline:
            raise AssertionError(_complaint(predicate, deadline_s, what))
        tick = asyncio.Event()
        handle = asyncio.get_running_loop().call_later(POLL_INTERVAL_S, tick.set)
        try:
            await tick.wait()
        finally:
            handle.cancel()


def _complaint(predicate: Callable[[], object], deadline_s: float, what: str) -> str:
    return f"not within {deadline_s:g} s: {what or getattr(predicate, '__qualname__', predicate)}"
