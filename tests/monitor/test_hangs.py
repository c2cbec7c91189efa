"""Ranks that hang, as real processes, and what becomes of them."""

import contextlib
import dataclasses
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from everstep.core.hang import HangPolicy
from everstep.core.limits import ENOUGH, LimitPolicy, Observed
from everstep.monitor.control import WorkloadAction
from everstep.monitor.events import ControlRequested, RankCleared, RankEvent, RankHung, RankSuspected
from everstep.monitor.processes import process
from everstep.monitor.reader import Monitor
from everstep.monitor.settings import MonitorSettings
from tests.monitor.agent import DEADLINE_S, Agent, Rank, limits
from tests.support.processes import Spawner
from tests.support.waiting import wait_until

BEGIN = "import threading\nimport everstep as es\nforever = threading.Event().wait\n"


def pages() -> dict[str, int]:
    """Of this process: pages that are open, and mapped."""
    links = [os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if os.path.lexists(entry.path)]
    maps = Path("/proc/self/maps").read_text().splitlines()
    return {"fd": str(links).count("everstep-monitor"), "maps": str(maps).count("everstep-monitor")}


def hung(agent: Agent, rank: int = 0, deadline_s: float = DEADLINE_S) -> RankHung:
    event = agent.expect(RankHung, lambda e: e.rank == rank, deadline_s)
    assert agent.ranks[rank].spawned.wait() == -signal.SIGKILL
    return event


def test_an_outer_section_that_expired_ends_the_rank_though_a_fresh_inner_one_is_open(
    spawn: Spawner, tmp_path: Path
) -> None:
    source = f"""{BEGIN}
def train():
    with es.section("outer"):
        while True:
            with es.section("inner"):
                forever(0.01)
train()
"""
    with Agent(spawn, limits(outer=0.6, inner=600.0)) as agent:
        agent.start(0, source, tmp_path / "log")
        event = hung(agent)
    assert (event.section, event.mechanism, event.limit_s) == ("outer", "section", 0.6)
    assert 0.6 <= event.age_s < 1.6
    assert "in train" in event.stacks[0]
    log = (tmp_path / "log").read_text()
    assert "rank 0 hangs: section 'outer' open for" in log
    assert "in train" in log


def test_sections_closed_in_another_order_are_well_and_the_one_left_open_is_found(spawn: Spawner) -> None:
    source = f"""{BEGIN}
from everstep.monitor import RankMonitorClient
client = RankMonitorClient()
client.init_workload_monitoring()
client.start_section("a")
client.start_section("b")
client.end_section("a")
client.start_section("c")
client.end_section("c")
forever()
"""
    with Agent(spawn, limits(a=0.3, b=0.6, c=0.3)) as agent:
        agent.start(0, source)
        assert hung(agent).section == "b"


def test_a_rank_that_ended_all_its_sections_is_well(spawn: Spawner) -> None:
    source = f"""{BEGIN}
from everstep.monitor import RankMonitorClient
client = RankMonitorClient()
client.init_workload_monitoring()
client.start_section("a")
client.start_section("b")
client.end_all_sections()
client.shutdown_workload_monitoring()
print("done", flush=True)
forever(0.9)
"""
    with Agent(spawn, limits(a=0.3, b=0.3, outside=0.3, heartbeat=0.3)) as agent:
        assert agent.start(0, source).wait() == 0
        assert not [e for e in agent.events if isinstance(e, RankHung)]


@pytest.mark.parametrize("place", ["import", "silence"])
def test_a_hang_before_the_first_beat_is_counted_from_the_spawn(spawn: Spawner, place: str) -> None:
    """In an import of a worker whose starter has made it show stacks before anything else, and in one that has not."""
    first = "from everstep.monitor.first import show_stacks_on_request\nshow_stacks_on_request()\n"
    source = f"{first if place == 'import' else ''}import threading\nthreading.Event().wait()"
    with Agent(spawn, limits(initial=1.0)) as agent:
        agent.start(0, source)
        event = hung(agent)
    assert (event.mechanism, event.limit_s) == ("initial", 1.0)
    assert 1.0 <= event.age_s < 2.0
    assert ("in wait" in event.stacks[0]) is (place == "import")
    assert ("no stacks" in event.report()) is (place == "silence")


def test_a_c_call_that_holds_the_gil_shows_its_stack_and_is_ended(spawn: Spawner) -> None:
    source = f"""{BEGIN}
import ctypes
def stuck_in_c():
    ctypes.PyDLL(None).sleep(1000)  # PyDLL: with the GIL held
es.heartbeat()
stuck_in_c()
"""
    with Agent(spawn, limits(heartbeat=0.5)) as agent:
        agent.start(0, source)
        event = hung(agent)
    assert event.mechanism == "heartbeat"
    assert "in stuck_in_c" in event.stacks[0]


def test_a_stopped_rank_is_found_and_ended(spawn: Spawner) -> None:
    with Agent(spawn, limits(stopped=0.5)) as agent:
        rank = agent.start(0, f"{BEGIN}es.heartbeat()\nprint('up', flush=True)\nforever()")
        rank.expect_line("up")
        rank.kill(signal.SIGSTOP)
        assert hung(agent).mechanism == "stopped"


def test_a_hang_in_a_forked_child_that_its_parent_waits_for_shows_the_child_too(spawn: Spawner) -> None:
    """As a DataLoader's worker."""
    source = f"""{BEGIN}
import os
def load_batch():
    es.heartbeat()  # of the child: it says nothing about its parent
    forever()
def wait_for_child(pid):
    os.waitpid(pid, 0)
es.heartbeat()
pid = os.fork()
load_batch() if pid == 0 else wait_for_child(pid)
"""
    with Agent(spawn, limits(heartbeat=0.7)) as agent:
        agent.start(0, source)
        event = hung(agent)
    assert "in wait_for_child" in event.stacks[0]
    assert "in load_batch" in event.stacks[0]
    assert "a child of it" in event.stacks[0]


def test_the_rank_that_the_others_wait_for_is_named_and_ended_though_they_expired_first(spawn: Spawner) -> None:
    waits = f"""{BEGIN}
from everstep.monitor.attach import here
here.describe("reduction", waits=True)
with es.section("compute"): pass
with es.section("reduction"): forever()
"""
    computes = f"{BEGIN}\ndef slow_layer(): forever()\nwith es.section('compute'): slow_layer()"
    with Agent(spawn, limits(compute=1.5, reduction=0.4)) as agent:
        for rank in range(4):
            agent.start(rank, computes if rank == 2 else waits)
        event = hung(agent, 2)
        assert event.culprit == 2
        assert sorted(event.waiting) == [(0, "reduction"), (1, "reduction"), (3, "reduction")]
        assert "in slow_layer" in event.stacks[2]
        assert all(agent.ranks[rank].spawned.is_alive() for rank in (0, 1, 3))
        for rank in (0, 1, 3):
            agent.ranks[rank].spawned.kill()
            agent.ranks[rank].spawned.wait()


def test_a_slow_rank_is_suspect_and_cleared_when_it_moves_on(spawn: Spawner) -> None:
    with Agent(spawn, limits(heartbeat=4.0)) as agent:
        rank = agent.start(0, f"{BEGIN}es.heartbeat()\ninput()\nes.heartbeat()\ninput()")
        agent.expect(RankSuspected)
        rank.send("on")
        agent.expect(RankCleared)
        rank.send("end")
        assert rank.wait() == 0


def test_a_termination_signal_that_is_ignored_is_followed_by_sigkill(spawn: Spawner) -> None:
    settings = dataclasses.replace(limits(heartbeat=0.3), termination_signal=signal.SIGTERM, kill_after_s=0.3)
    source = f"import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n{BEGIN}es.heartbeat()\nforever()"
    with Agent(spawn, settings) as agent:
        agent.start(0, source)
        hung(agent)
        assert [number for number, _ in agent.ranks[0].signalled] == [signal.SIGTERM, signal.SIGCONT, signal.SIGKILL]


def test_a_request_reaches_the_agent_at_once_with_its_reason(spawn: Spawner) -> None:
    source = f"""{BEGIN}
from everstep.monitor import RankMonitorClient, WorkloadAction, WorkloadControlRequest
client = RankMonitorClient()
client.init_workload_monitoring()
for action in WorkloadAction:
    assert client.send_workload_control_request(WorkloadControlRequest(action, f"because of {{action.value}}"))
"""
    with Agent(spawn, limits()) as agent:
        assert agent.start(0, source).wait() == 0
        agent.expect(ControlRequested, lambda e: e.action is WorkloadAction.ShutdownWorkload)
        asked = [(e.action, e.detail) for e in agent.events if isinstance(e, ControlRequested)]
    assert asked == [(action, f"because of {action.value}") for action in WorkloadAction]


def test_a_timeout_that_a_script_calculated_holds_at_once(spawn: Spawner) -> None:
    source = f"""{BEGIN}
from everstep.monitor import RankMonitorClient
client = RankMonitorClient()
client.init_workload_monitoring()
for _ in range(30):
    client.send_heartbeat()
    forever(0.01)
client.calculate_and_set_hb_timeouts()
forever()
"""
    with Agent(spawn, limits(heartbeat=None)) as agent:
        agent.start(0, source)
        assert hung(agent).limit_s < 5.0


def test_limits_that_other_nodes_have_learned_hold_and_the_first_sections_of_a_process_may_take_longer(
    spawn: Spawner,
) -> None:
    source = f"""{BEGIN}
for seconds in (0.4, 0.1, 0, 0, 0):
    with es.section("step"): forever(seconds)
with es.section("step"): forever()
"""
    policy = LimitPolicy(floor_s=0.2, mixed_floor_s=20.0)
    with Agent(spawn, MonitorSettings(hang=HangPolicy(limits=policy))) as agent:
        agent.monitor.hear({"step": Observed(ENOUGH, 0.01)})
        agent.start(0, source)
        event = hung(agent)
    assert event.limit_s == 0.2
    assert event.age_s < 1.0


def test_a_worker_whose_agent_is_killed_goes_on_and_says_so_once(spawn: Spawner) -> None:
    agent = """
import os, sys, threading
from everstep.monitor.reader import Monitor, MonitorSettings
monitor = Monitor(MonitorSettings(), print)
monitor.start()
print(monitor.environment(0)["EVERSTEP_MONITOR"], flush=True)
threading.Event().wait()
"""
    worker = f"""{BEGIN}
import logging
logging.basicConfig()
from everstep.monitor import RankMonitorClient, WorkloadAction, WorkloadControlRequest
client = RankMonitorClient()
client.init_workload_monitoring()
es.heartbeat()
print("up", flush=True)
input()
for _ in range(1000):
    with es.section("step"): es.heartbeat()
for _ in range(3):
    assert not client.send_workload_control_request(WorkloadControlRequest(WorkloadAction.Continue))
"""
    parent = spawn(["-c", agent])
    child = spawn(["-c", worker], env={"EVERSTEP_MONITOR": parent.read_line()})
    child.expect_line("up")
    parent.kill()
    parent.wait()
    child.send("go")
    assert child.wait() == 0
    assert child.stderr_path.read_text().count("nothing watches this process") == 1


def test_a_monitor_whose_thread_is_stuck_costs_the_worker_nothing_and_the_agent_can_let_go_of_it(
    spawn: Spawner,
) -> None:
    """Its events go nowhere: whoever listens to them does not come back."""
    is_stuck, may_go = threading.Event(), threading.Event()

    def listen(_: RankEvent) -> None:
        is_stuck.set()
        assert may_go.wait(DEADLINE_S)

    source = f"""{BEGIN}
from everstep.monitor import RankMonitorClient, WorkloadAction, WorkloadControlRequest
client = RankMonitorClient()
client.init_workload_monitoring()
for _ in range(1000):
    assert client.send_workload_control_request(WorkloadControlRequest(WorkloadAction.Continue))
    with es.section("step"): es.heartbeat()
"""
    with Monitor(limits(), listen) as monitor:
        child = spawn(["-c", source], env=monitor.environment(0))
        monitor.add_rank(0, Rank(child, time.monotonic()))
        assert is_stuck.wait(DEADLINE_S)
        assert child.wait() == 0
        assert monitor.view(0) is not None
        monitor.remove_rank(0)
        may_go.set()


def test_a_log_that_does_not_take_the_report_does_not_hold_up_the_ranks_end(spawn: Spawner) -> None:
    """As on a file system that hangs. Here a pipe that nobody reads, and the rank has filled."""
    read_end, write_end = os.pipe()
    try:
        with Monitor(limits(heartbeat=0.3), lambda _: None) as monitor:
            environment = monitor.environment(0)
            os.set_blocking(write_end, False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    os.write(write_end, bytes(65536))
            os.set_blocking(write_end, True)
            child = spawn(["-c", f"{BEGIN}es.heartbeat()\nforever()"], env=environment)
            monitor.add_rank(0, Rank(child, time.monotonic()), write_end)
            assert child.wait() == -signal.SIGKILL
            monitor.remove_rank(0)
            os.set_blocking(read_end, False)
            wait_until(lambda: b"rank 0 hangs" in _read(read_end))
    finally:
        os.close(read_end)
        os.close(write_end)


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, 1 << 20)
    except BlockingIOError:
        return b""


def test_a_stopped_agent_costs_the_worker_nothing_and_accuses_nobody_when_it_goes_on(spawn: Spawner) -> None:
    agent = """
import subprocess, sys, threading, time
from tests.monitor.agent import limits
from everstep.monitor.events import RankHung
from everstep.monitor.reader import Monitor
class Rank:
    def __init__(self, child, at): self.pid, self.started_at = child.pid, at
    def signal_group(self, number): print("signalled", number, flush=True)
monitor = Monitor(limits(heartbeat=1.5), lambda event: print(type(event).__name__, flush=True))
monitor.start()
env = monitor.environment(0)
print(env["EVERSTEP_MONITOR"], flush=True)
at = time.monotonic()
class Child: pid = int(input())
monitor.add_rank(0, Rank(Child, at))
print("watching", flush=True)
input()
"""
    worker = f"{BEGIN}\nwhile True:\n    es.heartbeat()\n    forever(0.002)\n    print('on', flush=True)\n"
    parent = spawn(["-c", agent])
    child = spawn(["-c", worker], env={"EVERSTEP_MONITOR": parent.read_line()})
    parent.send(str(child.pid))
    parent.expect_line("watching")
    parent.kill(signal.SIGSTOP)
    wait_until(lambda: process(parent.pid).state == "T")
    child.kill(signal.SIGSTOP)  # as when the whole machine stands still
    wait_until(lambda: process(child.pid).state == "T")
    stopped_at = time.monotonic()
    wait_until(lambda: time.monotonic() > stopped_at + 1.8, what="longer than the limit")
    parent.kill(signal.SIGCONT)
    child.kill(signal.SIGCONT)
    for _ in range(300):
        child.expect_line("on")
    parent.send("end")
    assert parent.wait() == 0
    assert "Hung" not in parent.stdout_path.read_text()
    child.kill()
    child.wait()


def test_without_an_agent_beats_and_sections_do_the_same(spawn: Spawner) -> None:
    source = f"""{BEGIN}
es.heartbeat()
with es.section("a"):
    try:
        with es.section("a"): pass
    except es.ConfigError as error:
        print(error, flush=True)
"""
    for address in (None, "/proc/1/fd/77,/proc/1/fd/78", "nonsense"):
        child = spawn(["-c", source], env={"EVERSTEP_MONITOR": address})
        assert "section 'a' is open already" in child.read_line()
        assert child.wait() == 0


def test_nothing_is_left_of_a_monitor_that_was_closed(spawn: Spawner) -> None:
    with Agent(spawn, limits()) as agent:
        agent.start(0, f"{BEGIN}es.heartbeat()")
        assert pages() == {"fd": 2, "maps": 1}  # mmap keeps a duplicate
        assert agent.ranks[0].spawned.wait() == 0
    assert pages() == {"fd": 0, "maps": 0}
