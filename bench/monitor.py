"""What rank monitoring costs a worker and a node, and how soon after its deadline a rank is ended.

    python bench/monitor.py [--blocks 200] [--kills 20] [--with nvidia-resiliency-ext] [--json]

Heartbeat and section: microseconds a call in the worker, attached to a monitor in another process; median and minimum
over blocks. Kill: from a rank's deadline until its parent has read its exit; milliseconds, min / median / max. Node: 8
ranks that share 100,000 sections a second; CPU of the monitor, and memory (PSS) that the monitor adds to a process that
has Everstep's agent modules loaded. The rival needs `make bench-venv`, and runs in the same blocks, in turn.
"""

import argparse
import contextlib
import json
import os
import platform
import queue
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from everstep.core.hang import HangPolicy
from everstep.core.limits import HEARTBEAT, LimitPolicy
from everstep.monitor.events import RankEvent, RankHung
from everstep.monitor.reader import Monitor, MonitorSettings

CALLS = 1_000  # so few that a busy machine lets a block through now and then
RIVAL_CALLS = 20
RANKS = 8
SECTIONS_PER_S = 100_000
LIMIT_S = 0.4

BEATER = """
import sys, time
import everstep as es
from everstep.monitor import RankMonitorClient
client = RankMonitorClient(); client.init_workload_monitoring()
es.heartbeat()
heartbeat, section, calls = es.heartbeat, es.section, int(sys.argv[1])
def empty(): pass
def timed(call):
    begun = time.perf_counter()
    for _ in range(calls): call()
    return (time.perf_counter() - begun) / calls * 1e6
def sections():
    begun = time.perf_counter()
    for _ in range(calls):
        with section("step"): pass
    return (time.perf_counter() - begun) / calls * 1e6
def pairs():
    start, end = client.start_section, client.end_section
    begun = time.perf_counter()
    for _ in range(calls): start("step"); end("step")
    return (time.perf_counter() - begun) / calls * 1e6
sections(); timed(heartbeat)
print("up", flush=True)
for _ in sys.stdin:
    print(timed(heartbeat), sections(), pairs(), timed(empty), flush=True)
"""
SLEEPER = """
import threading
import everstep as es
es.heartbeat()
print("up", flush=True)
threading.Event().wait()
"""
BUSY = """
import sys, time
import everstep as es
each = float(sys.argv[1])
due = time.monotonic()
print("up", flush=True)
while True:
    for _ in range(100):
        with es.section("step"): pass
    due += 100 / each
    pause = due - time.monotonic()
    if pause > 0: time.sleep(pause)
"""


class Child:
    """A rank: as launcher/starting.py has it, and its output."""

    def __init__(self, source: str, environment: dict[str, str], *args: str) -> None:
        self.started_at = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, "-c", source, *args],
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.pid = self._process.pid

    def read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def ask(self) -> list[float]:
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return [float(word) for word in self.read().split()]

    def signal_group(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def wait(self) -> None:
        self._process.wait()

    def end(self) -> None:
        self.signal_group(signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()


@contextlib.contextmanager
def rank(monitor: Monitor, number: int, source: str, *args: str) -> Iterator[Child]:
    child = Child(source, monitor.environment(number), *args)
    monitor.add_rank(number, child)
    try:
        child.read()
        yield child
    finally:
        monitor.remove_rank(number)
        child.end()


def beats(blocks: int, rival: Callable[[], list[float]] | None) -> dict[str, Any]:
    """Of ours and, in turn, of the rival's."""
    ours: list[list[float]] = []
    theirs: list[list[float]] = []
    with Monitor(MonitorSettings(), lambda _: None) as monitor, rank(monitor, 0, BEATER, str(CALLS)) as child:
        for _ in range(blocks):
            ours.append(child.ask())
            if rival is not None:
                theirs.append(rival())
    names = ["heartbeat_us", "with_section_us", "section_pair_us", "empty_call_us"]
    found: dict[str, Any] = {name: spread(column) for name, column in zip(names, zip(*ours, strict=True), strict=True)}
    if theirs:
        columns = zip(["rival_heartbeat_us", "rival_section_pair_us"], zip(*theirs, strict=True), strict=True)
        found |= {name: spread(column) for name, column in columns}
    return found


def kills(times: int) -> dict[str, Any]:
    """Of ranks whose heartbeat is overdue."""
    delays: list[float] = []
    shown = 0
    for _ in range(times):
        hung: queue.SimpleQueue[RankHung] = queue.SimpleQueue()

        def note(event: RankEvent, hung: "queue.SimpleQueue[RankHung]" = hung) -> None:
            if isinstance(event, RankHung):
                hung.put(event)

        limits = LimitPolicy(given={HEARTBEAT: LIMIT_S}, learns=False)
        settings = MonitorSettings(hang=HangPolicy(limits=limits))
        with Monitor(settings, note) as monitor, rank(monitor, 0, SLEEPER) as child:
            view = monitor.view(0)
            assert view is not None
            assert view.heartbeat_at is not None
            child.wait()
            delays.append((time.monotonic() - view.heartbeat_at - LIMIT_S) * 1000)
            shown += "File" in hung.get(timeout=10.0).stacks[0]
    return {"deadline_to_exit_ms": spread(delays), "kills": times, "with_stacks": shown}


def node(seconds: float) -> dict[str, Any]:
    """A monitor in a process of its own, so that its CPU time is its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--node", str(seconds)], capture_output=True, text=True, check=True, timeout=120
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _serve_node(seconds: float) -> None:
    before_kb = pss_kb()
    with contextlib.ExitStack() as stack:
        limits = LimitPolicy(given={HEARTBEAT: 10.0, "step": 10.0})
        monitor = stack.enter_context(Monitor(MonitorSettings(hang=HangPolicy(limits=limits)), lambda _: None))
        each = SECTIONS_PER_S / RANKS
        for number in range(RANKS):
            stack.enter_context(rank(monitor, number, BUSY, str(each)))
        after_kb = pss_kb()
        cpu, begun = time.process_time(), time.monotonic()
        counts = [monitor.view(number) for number in range(RANKS)]
        threading.Event().wait(seconds)
        cpu_percent = 100 * (time.process_time() - cpu) / (time.monotonic() - begun)
        seen = [monitor.view(number) for number in range(RANKS)]
        done = sum(_steps(b) - _steps(a) for a, b in zip(counts, seen, strict=True))
    print(
        json.dumps(
            {
                "monitor_cpu_percent": round(cpu_percent, 3),
                "memory_added_mb": round((after_kb - before_kb) / 1024, 2),
                "sections_counted": done,
                "ranks": RANKS,
            }
        )
    )


def _steps(view: Any) -> int:
    observed = view.observed.get("step") if view is not None else None
    return observed.count if observed is not None else 0


def pss_kb() -> int:
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Pss:"))


# ---- the rival


@contextlib.contextmanager
def nvidia() -> Iterator[Callable[[], list[float]]]:
    """Its client in this process, its server in another, as its launcher has them."""
    from nvidia_resiliency_ext import fault_tolerance as ft  # type: ignore[import-not-found]
    from nvidia_resiliency_ext.fault_tolerance.data import (  # type: ignore[import-not-found]
        FT_RANK_MONITOR_IPC_SOCKET_ENV_VAR,
    )
    from nvidia_resiliency_ext.fault_tolerance.rank_monitor_server import (  # type: ignore[import-not-found]
        RankMonitorServer,
    )

    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/socket"
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", FT_RANK_MONITOR_IPC_SOCKET_ENV_VAR: path}
        config = ft.FaultToleranceConfig(rank_section_timeouts={"step": 600.0}, enable_nic_monitor=False)
        server = RankMonitorServer.run_in_subprocess(config, path)
        client = ft.RankMonitorClient()
        client.init_workload_monitoring()

        def block() -> list[float]:
            begun = time.perf_counter()
            for _ in range(RIVAL_CALLS):
                client.send_heartbeat()
            middle = time.perf_counter()
            for _ in range(RIVAL_CALLS):
                client.start_section("step")
                client.end_section("step")
            end = time.perf_counter()
            return [(middle - begun) / RIVAL_CALLS * 1e6, (end - middle) / RIVAL_CALLS * 1e6]

        try:
            yield block
        finally:
            client.shutdown_workload_monitoring()
            server.terminate()
            server.join()


def spread(values: Any) -> list[float]:
    """Min, median, max."""
    return [round(v, 3) for v in (min(values), statistics.median(values), max(values))]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--blocks", type=int, default=200)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=10.0, help="of 100,000 sections a second")
    parser.add_argument("--with", dest="rival", choices=["nvidia-resiliency-ext"])
    parser.add_argument("--node", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.node:
        _serve_node(arguments.node)
        return
    with nvidia() if arguments.rival else contextlib.nullcontext() as rival:
        found = beats(arguments.blocks, rival)
    found |= kills(arguments.kills)
    found |= node(arguments.seconds)
    if arguments.json:
        print(json.dumps(found))
        return
    print(
        f"Python {platform.python_version()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}; min / median / max"
    )
    for name, value in found.items():
        print(f"{name:24} {' / '.join(map(str, value)) if isinstance(value, list) else value}")


if __name__ == "__main__":
    main()
