"""How soon killed workers run again: `everstep run` beside torchrun (and ft_launcher where installed), in one run.

    python bench/restart.py [--times 5] [--rival-times 3] [--without-torchrun] [--json]

Two workers on one node; one is killed by SIGKILL, both start again. From the kill until the first line of the restarted
script, and until the first working allreduce (Gloo) of the restarted workers, of the later of the two; from a new start
of the launcher each time, since both pace restarts that follow one another. Milliseconds, min / median / max.
Death: a worker of one of three replica groups that holds 4 GB is killed; until a subscriber on this host has the
notice. Memory: the agent's own and the template's with 8 workers, proportional set size, MB.
"""

import argparse
import contextlib
import json
import os
import platform
import select
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

DEADLINE_S = 120.0


class Unfinished(Exception):
    """The workers did not come so far: a launcher that gave up, or the deadline."""


SCRIPT = """
import os, signal, time
first_at = time.monotonic()
import torch
import torch.distributed as dist
dist.init_process_group("gloo")
dist.all_reduce(torch.ones(1))
reduced_at = time.monotonic()
said = open(os.environ["SAY_TO"], "a")
said.write(f"{os.environ['RANK']} {os.getpid()} {first_at} {reduced_at}\\n")
said.flush()
signal.pause()
"""
HOLDER = """
import os, time
import torch
import everstep as es
model = torch.nn.Linear(8, 1)
held = torch.ones(int(float(os.environ["HELD_GB"]) * 2**28)) if os.environ["REPLICA_GROUP_ID"] == "1" else None
manager = es.Manager()
manager.start()
ddp = es.DistributedDataParallel(manager, model)
optimizer = es.Optimizer(manager, torch.optim.SGD(model.parameters(), 0.01))
said = open(os.environ["SAY_TO"], "a")
for step in range(1_000_000):
    optimizer.zero_grad()
    ddp(torch.ones(4, 8)).sum().backward()
    optimizer.step()
    if step == 20:
        said.write(f"{os.environ['REPLICA_GROUP_ID']} {os.getpid()} 0 0\\n")
        said.flush()
    time.sleep(0.01)
"""


class Launched:
    """A launcher and what its workers say, one line each; everything ends with the block."""

    def __init__(self, command: list[str], folder: Path, script: str, **environment: str) -> None:
        self._said = folder / "said"
        self._said.touch()
        (folder / "script.py").write_text(script)
        quiet = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", "GLOO_SOCKET_IFNAME": "lo"}
        self.process = subprocess.Popen(
            [*command, str(folder / "script.py")],
            env={**os.environ, **quiet, **environment, "SAY_TO": str(self._said)},
            stdout=subprocess.DEVNULL,
            stderr=(folder / "log").open("wb"),
            start_new_session=True,
        )
        self._log = folder / "log"

    def lines(self, count: int) -> list[tuple[str, int, float, float]]:
        """The first `count` of them, as (rank or group, pid, first line at, reduced at)."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            rows = [line.split() for line in self._said.read_text().splitlines() if line.count(" ") == 3]
            if len(rows) >= count:
                return [(who, int(pid), float(first), float(reduced)) for who, pid, first, reduced in rows[:count]]
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise Unfinished(f"{count} lines were awaited, {len(rows)} came:\n{self._log.read_text()[-2000:]}")
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.01)

    def end(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@contextlib.contextmanager
def launched(command: list[str], script: str, **environment: str) -> Iterator[Launched]:
    with tempfile.TemporaryDirectory(prefix="everstep-bench-") as folder:
        run = Launched(command, Path(folder), script, **environment)
        try:
            yield run
        finally:
            run.end()


def launchers() -> dict[str, list[str]]:
    options = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "3"]
    found = {
        "everstep run": [sys.executable, "-m", "everstep.cli", "run", *options],
        "torchrun": [sys.executable, "-m", "torch.distributed.run", *options],
    }
    ft_launcher = shutil.which("ft_launcher", path=str(Path(sys.executable).parent))
    if ft_launcher is not None:
        found["ft_launcher"] = [ft_launcher, *options]
    return found


def restart(command: list[str]) -> tuple[float, float]:
    """Milliseconds from the kill to the restarted script's first line, and to its first allreduce."""
    with launched(command, SCRIPT) as run:
        _, pid, _, _ = run.lines(2)[1]
        killed_at = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        again = run.lines(4)[2:]
        return 1e3 * (max(row[2] for row in again) - killed_at), 1e3 * (max(row[3] for row in again) - killed_at)


def _repeat(command: list[str], times: int) -> tuple[list[tuple[float, float]], int]:
    """What the runs took, and how many did not come back at all."""
    pairs: list[tuple[float, float]] = []
    failed = 0
    while len(pairs) + failed < times:
        with contextlib.suppress(Unfinished):
            pairs.append(restart(command))
            continue
        failed += 1
    if not pairs:
        raise SystemExit(f"no run of {times} came back: {command}")
    return pairs, failed


def notice(held_gb: float) -> float:
    """Milliseconds from the kill of a worker that holds so much until a subscriber has the notice."""
    import everstep as es

    with lighthouse() as address:
        options = ["--lighthouse", address, "--replica-groups", "3", "--replica-group-id", "g", "--max-restarts", "3"]
        command = [sys.executable, "-m", "everstep.cli", "run", "--nproc-per-node", "1", *options]
        with launched(command, HOLDER, HELD_GB=str(held_gb)) as run:
            victim = next(row for row in run.lines(3) if row[0].endswith("1"))
            with es.subscribe_failures(lighthouse=address) as failures:
                killed_at, killed_at_wall = time.monotonic(), time.time()  # the same clock as the lighthouse's
                os.kill(victim[1], signal.SIGKILL)
                # The group may have failed before, as it started.
                next(event for event in failures if event.replica_id == victim[0] and event.at >= killed_at_wall)
                return 1e3 * (time.monotonic() - killed_at)


@contextlib.contextmanager
def lighthouse() -> Iterator[str]:
    command = [sys.executable, "-m", "everstep.cli", "lighthouse", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], DEADLINE_S)
        if not ready:
            raise SystemExit(f"the lighthouse did not start within {DEADLINE_S:g} s")
        yield process.stdout.readline().rpartition(" ")[2].strip()
    finally:
        process.kill()
        process.wait()


def memory() -> dict[str, float]:
    """MB of the agent and of the template (with its spares) beside 8 workers."""
    command = [*launchers()["everstep run"]]
    command[command.index("2")] = "8"
    with launched(command, SCRIPT) as run:
        workers = {row[1] for row in run.lines(8)}
        others = [pid for pid in _descendants(run.process.pid) if pid not in workers]
        names = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace") for pid in others}
        templates = sum(_pss_mb(pid) for pid, name in names.items() if "template" in name)
        return {"agent": _pss_mb(run.process.pid), "template": templates}


def _descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found += [child, *_descendants(child)]
    return found


def _pss_mb(pid: int) -> float:
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return next(int(line.split()[1]) / 1024 for line in rollup.splitlines() if line.startswith("Pss:"))


def _three(values: list[float]) -> list[float]:
    return [round(value, 1) for value in (min(values), statistics.median(values), max(values))]


def _shown(three: list[float]) -> str:
    return " / ".join(f"{value:.0f}" if value >= 10 else f"{value:.1f}" for value in three)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--rival-times", type=int, default=3)
    parser.add_argument("--held-gb", type=float, default=4.0)
    parser.add_argument("--without-torchrun", action="store_true", help="measure everstep alone")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # nothing of either launcher stays
    result: dict[str, object] = {"cores": os.cpu_count(), "machine": platform.machine()}
    if not args.json:
        print(f"{platform.machine()}, {os.cpu_count()} cores; ms, min / median / max")
    for name, command in launchers().items():
        times = args.times if name == "everstep run" else 0 if args.without_torchrun else args.rival_times
        if not times:
            continue
        pairs, failed = _repeat(command, times)
        first, reduced = (_three([pair[i] for pair in pairs]) for i in (0, 1))
        result[name] = {"first_line_ms": first, "allreduce_ms": reduced, "failed": failed}
        if not args.json:
            print(
                f"{name:14} kill to first line {_shown(first)}   to first allreduce {_shown(reduced)}"
                + (f"   ({failed} of {times} runs failed)" if failed else "")
            )
    noticed = _three([notice(args.held_gb) for _ in range(args.times)])
    mb = {name: round(value, 1) for name, value in memory().items()}
    result |= {"held_gb": args.held_gb, "notice_ms": noticed, "memory_mb": mb}
    if args.json:
        print(json.dumps(result))
        return
    print(f"death of a worker that holds {args.held_gb:g} GB to a subscriber's notice {_shown(noticed)}")
    print(f"with 8 workers: agent {mb['agent']:.0f} MB, template and its spares {mb['template']:.0f} MB")


if __name__ == "__main__":
    main()
