"""Runs one machine of `core/` on an event loop: feeds it events and the clock, performs what it returns.

The machine says when it wants to be woken; the driver keeps ONE timer for that (the idea is aioquic's). A loop may
wake a little early, and floats disagree, so a due tick sees `max(the deadline, the clock)`.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from everstep.core.messages import Effect

EventT = TypeVar("EventT", contravariant=True)


class Machine(Protocol[EventT]):
    """The contract of every class in core/ that lives in time."""

    def receive(self, event: EventT, now: float, /) -> list[Effect]: ...
    def tick(self, now: float, /) -> list[Effect]: ...
    def next_deadline(self) -> float | None: ...


class Driver(Generic[EventT]):
    """`perform(effects)` gets every machine call's effects, in order, while the lock is held; it must not block.

    Give a `lock` when other threads use the machine: then `receive`, `run` and `wake` may be called from any thread.
    Without one, all of it belongs to the loop's thread. `perform` must not call back into the driver.
    What a call raises is a bug and reaches the caller; what a tick raises has no caller and goes to `on_crash`.
    """

    def __init__(
        self,
        machine: Machine[EventT],
        perform: Callable[[list[Effect]], None],
        *,
        lock: contextlib.AbstractContextManager[Any] | None = None,
        on_crash: Callable[[Exception], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._machine = machine
        self._perform = perform
        self._lock = lock if lock is not None else contextlib.nullcontext()
        self._on_crash = on_crash
        self._clock = clock
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = 0
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at: float | None = None  # read and written under the lock
        self._is_closed = False

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to tick. Call it on the loop's thread; events may have been fed before."""
        with self._lock:
            self._loop = loop
            self._thread = threading.get_ident()
            self._arm()

    def close(self) -> None:
        """Feed the machine nothing more, no tick either. On the loop's thread, or once the loop has ended."""
        with self._lock:
            self._is_closed = True
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def receive(self, event: EventT) -> None:
        self.run(lambda now: self._machine.receive(event, now))

    def run(self, call: Callable[[float], list[Effect]]) -> None:
        """Call the machine some other way (`start`, say) with the time now, and perform what it returns."""
        with self._lock:
            if self._is_closed:
                return
            self._perform(call(self._clock()))
            self._arm()

    def wake(self) -> None:
        """The machine was called directly: look at its next deadline again."""
        with self._lock:
            self._arm()

    def _arm(self) -> None:
        """Under the lock. A timer that rings too early re-arms itself, so only an earlier deadline needs a new one."""
        deadline = self._machine.next_deadline()
        if deadline is None or self._loop is None or self._is_closed:
            return
        if self._timer_at is not None and self._timer_at <= deadline:
            return
        self._timer_at = deadline
        if threading.get_ident() == self._thread:
            self._set_timer()
        else:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and ticking with it
                self._loop.call_soon_threadsafe(self._set_timer_later)

    def _set_timer_later(self) -> None:
        with self._lock:
            if self._timer_at is not None and not self._is_closed:
                self._set_timer()

    def _set_timer(self) -> None:
        assert self._loop is not None
        assert self._timer_at is not None
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(max(0.0, self._timer_at - self._clock()), self._ring)

    def _ring(self) -> None:
        try:
            self._tick()
        except Exception as error:
            # Loop boundary: the loop would only log it, and the machine would stand still.
            if self._on_crash is None:
                raise
            self._on_crash(error)

    def _tick(self) -> None:
        with self._lock:
            timer_at, self._timer_at, self._timer = self._timer_at, None, None
            if self._is_closed or timer_at is None:
                return
            now = max(timer_at, self._clock())
            deadline = self._machine.next_deadline()
            if deadline is not None and now >= deadline:
                self._perform(self._machine.tick(now))
            self._arm()
