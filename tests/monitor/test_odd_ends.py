"""Ranks that hang or end in odd places: signal handlers, atexit, exceptions from other threads, process groups."""

import signal
from pathlib import Path

import pytest

from everstep.monitor.events import RankHung
from tests.monitor.agent import Agent, limits
from tests.monitor.test_hangs import BEGIN, hung
from tests.support.processes import Spawner

ASYNC = """
import ctypes, sys
raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
class Interrupted(Exception): pass
def interrupt(thread):
    assert raise_in(ctypes.c_ulong(thread), ctypes.py_object(Interrupted)) == 1
"""


def test_a_sleep_in_a_signal_handler_is_found_with_the_handler_and_what_it_interrupted(spawn: Spawner) -> None:
    source = f"""{BEGIN}
import signal
def sleeps_in_handler(number, frame): forever()
def train():
    with es.section("step"):
        print("up", flush=True)
        forever()
signal.signal(signal.SIGUSR1, sleeps_in_handler)
train()
"""
    with Agent(spawn, limits(step=1.0)) as agent:
        rank = agent.start(0, source)
        rank.expect_line("up")
        rank.kill(signal.SIGUSR1)
        event = hung(agent)
    assert event.section == "step"
    assert event.stacks[0].index("in sleeps_in_handler") < event.stacks[0].index("in train")


def test_a_script_that_ended_and_hangs_in_atexit_is_found_by_what_it_used(spawn: Spawner) -> None:
    source = f"""{BEGIN}
import atexit
def never_ends(): forever()
atexit.register(never_ends)
with es.section("step"): pass
"""
    with Agent(spawn, limits(step=600.0, outside=0.5)) as agent:
        agent.start(0, source)
        event = hung(agent)
    assert event.mechanism == "out-of-section"
    assert "in never_ends" in event.stacks[0]


def test_an_exit_in_atexit_is_the_ranks_own_end_and_no_hang(spawn: Spawner) -> None:
    source = f"""{BEGIN}
import atexit, os
atexit.register(os._exit, 7)
with es.section("step"): pass
"""
    with Agent(spawn, limits(step=0.5, outside=5.0)) as agent:
        assert agent.start(0, source).wait() == 7
        assert not [e for e in agent.events if isinstance(e, RankHung)]


def test_an_exception_from_another_thread_closes_the_sections_that_it_leaves(spawn: Spawner) -> None:
    source = f"""{BEGIN}{ASYNC}
main = threading.get_ident()
try:
    with es.section("outer"), es.section("step"):
        threading.Thread(target=interrupt, args=(main,)).start()
        while True: pass
except Interrupted:
    pass
with es.section("outer"), es.section("step"):
    print("again", flush=True)
forever()
"""
    with Agent(spawn, limits(outer=0.7, step=0.7, outside=1.0)) as agent:
        agent.start(0, source).expect_line("again")
        assert hung(agent).mechanism == "out-of-section"


def test_wherever_exceptions_from_another_thread_strike_the_page_says_what_the_script_is_told(spawn: Spawner) -> None:
    """One that strikes where `__exit__` begins leaves a section open: for the script, and for the monitor."""
    source = f"""{BEGIN}{ASYNC}
from everstep.monitor.attach import here
from everstep.monitor.view import PageReader
sys.setswitchinterval(1e-5)
caught = [0]
is_over = threading.Event()
def train():
    while not is_over.is_set():
        try:
            with es.section("a"), es.section("b"):
                pass
        except Interrupted:
            caught[0] += 1
        except es.ConfigError:
            assert here.open_sections()
        told = list(here.open_sections())
        try:
            assert sorted(s.name for s in PageReader(here.words).read().sections) == sorted(told), told
            here.end_all()
        except Interrupted:
            caught[0] += 1
def run():
    while not is_over.is_set():
        try:
            train()
        except Interrupted:
            caught[0] += 1
        except AssertionError as error:
            print("broken", error, flush=True)
            is_over.set()
is_warm = threading.Event()
def begin():
    with es.section("a"), es.section("b"): pass
    is_warm.set()
    run()
thread = threading.Thread(target=begin, daemon=True)
thread.start()
is_warm.wait()
for _ in range(3000):
    if is_over.is_set(): break
    raise_in(ctypes.c_ulong(thread.ident), ctypes.py_object(Interrupted))
    is_over.wait(1e-4)
print("over", caught[0] > 100, is_over.is_set(), flush=True)
import os
os._exit(0)
"""
    child = spawn(["-c", source])
    assert child.read_line() == "over True False"
    assert child.wait() == 0


GROUP = """
import threading, torch, torch.distributed as dist
import everstep as es
def join():
    dist.init_process_group("gloo", init_method="file://{store}", rank=0, world_size=2)
{calls}
"""


@pytest.mark.soak
@pytest.mark.parametrize(
    ("calls", "given", "mechanism"),
    [
        ("join()", {"initial": 15.0}, "initial"),
        ("with es.section('join'): join()", {"join": 1.0}, "section"),
    ],
    ids=["before the first sign", "in a section"],
)
def test_a_hang_in_process_group_initialisation_is_found(
    spawn: Spawner, tmp_path: Path, calls: str, given: dict[str, float | None], mechanism: str
) -> None:
    first = "from everstep.monitor.first import show_stacks_on_request\nshow_stacks_on_request()\n"
    with Agent(spawn, limits(**given)) as agent:
        agent.start(0, first + GROUP.format(store=tmp_path / "store", calls=calls))
        event = hung(agent, deadline_s=90.0)  # torch has to be imported first
    assert event.mechanism == mechanism
    assert "in init_process_group" in event.stacks[0]
