"""The driver: events and ticks in order, one timer, from one thread or from two."""

import asyncio
import threading
from collections.abc import Awaitable, Callable

import pytest

from everstep.core.messages import Effect, Log
from everstep.link.driver import Driver
from tests.link.parties import DEADLINE_S


class Alarm:
    """A machine: an event is the instant to be woken at; a tick clears what is due and says so."""

    def __init__(self) -> None:
        self.due: list[float] = []
        self.ticks: list[float] = []

    def receive(self, event: float, now: float) -> list[Effect]:
        if event < 0:
            raise AssertionError("a bug")
        self.due.append(event)
        return [Log("set", {"at": event})]

    def tick(self, now: float) -> list[Effect]:
        self.ticks.append(now)
        rung = [at for at in self.due if now >= at]
        self.due = [at for at in self.due if now < at]
        if any(at == 0 for at in rung):
            raise AssertionError("a bug in a tick")
        return [Log("rang", {"at": at}) for at in sorted(rung)]

    def next_deadline(self) -> float | None:
        return min(self.due, default=None)


class Performed:
    """Collects effects; `wait_for` returns once there are so many."""

    def __init__(self) -> None:
        self.effects: list[Log] = []
        self._changed = asyncio.Event()

    def __call__(self, effects: list[Effect]) -> None:
        self.effects += [effect for effect in effects if isinstance(effect, Log)]
        self._changed.set()

    async def wait_for(self, count: int) -> None:
        while len(self.effects) < count:
            self._changed.clear()
            await asyncio.wait_for(self._changed.wait(), DEADLINE_S)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await test()

    asyncio.run(main())


def test_a_tick_comes_at_the_earliest_deadline_and_effects_come_in_order() -> None:
    async def test() -> None:
        machine, performed = Alarm(), Performed()
        driver: Driver[float] = Driver(machine, performed)
        loop = asyncio.get_running_loop()
        driver.attach(loop)
        start = loop.time()
        driver.receive(start + 0.04)
        driver.receive(start + 0.02)
        await performed.wait_for(4)
        assert [(e.event, round(float(str(e.fields["at"])) - start, 3)) for e in performed.effects] == [
            ("set", 0.04),
            ("set", 0.02),
            ("rang", 0.02),
            ("rang", 0.04),
        ]
        assert len(machine.ticks) <= 2, "one where the loop woke up late for the first, and never one too early"
        driver.close()

    run(test)


def test_a_tick_never_sees_a_time_before_its_deadline_although_the_clock_is_behind_the_timer() -> None:
    async def test() -> None:
        machine, performed = Alarm(), Performed()
        driver: Driver[float] = Driver(machine, performed, clock=lambda: 100.0)  # a clock that never gets there
        driver.attach(asyncio.get_running_loop())
        driver.receive(100.01)
        await performed.wait_for(2)
        assert machine.ticks == [100.01]
        driver.close()

    run(test)


def test_an_event_fed_before_the_loop_is_known_is_not_forgotten() -> None:
    async def test() -> None:
        machine, performed = Alarm(), Performed()
        driver: Driver[float] = Driver(machine, performed)
        driver.receive(1.0)  # long past
        driver.attach(asyncio.get_running_loop())
        await performed.wait_for(2)
        driver.close()

    run(test)


def test_another_threads_earlier_deadline_rings_in_time() -> None:
    async def test() -> None:
        machine, performed = Alarm(), Performed()
        lock = threading.RLock()
        driver: Driver[float] = Driver(machine, performed, lock=lock)
        loop = asyncio.get_running_loop()
        driver.attach(loop)
        driver.receive(loop.time() + 3600)

        def train() -> None:
            with lock:
                machine.due.append(loop.time() + 0.01)  # as a training thread that calls the machine itself
            driver.wake()

        thread = threading.Thread(target=train)
        thread.start()
        await performed.wait_for(2)
        thread.join()
        assert performed.effects[-1].event == "rang"
        driver.close()

    run(test)


def test_a_bug_in_an_event_reaches_its_caller_and_one_in_a_tick_reaches_on_crash() -> None:
    async def test() -> None:
        crashes: asyncio.Queue[Exception] = asyncio.Queue()
        driver: Driver[float] = Driver(Alarm(), Performed(), on_crash=crashes.put_nowait)
        driver.attach(asyncio.get_running_loop())
        with pytest.raises(AssertionError, match="a bug"):
            driver.receive(-1.0)
        driver.receive(0.0)
        assert str(await asyncio.wait_for(crashes.get(), DEADLINE_S)) == "a bug in a tick"
        driver.close()

    run(test)


def test_a_closed_driver_feeds_its_machine_no_more() -> None:
    async def test() -> None:
        machine = Alarm()
        driver: Driver[float] = Driver(machine, Performed())
        driver.attach(asyncio.get_running_loop())
        driver.receive(asyncio.get_running_loop().time() + 0.001)
        driver.close()
        driver.receive(5.0)
        turned = asyncio.Event()
        asyncio.get_running_loop().call_later(0.02, turned.set)
        await turned.wait()
        assert machine.ticks == []
        assert len(machine.due) == 1

    run(test)
