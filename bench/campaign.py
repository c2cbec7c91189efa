"""A job of N replica groups under a benchmark: started, heard, hurt, made whole again, and gone at the end."""

import contextlib
import dataclasses
import json
import logging
import os
import random
import selectors
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from everstep.config import LighthouseSettings
from everstep.lighthouse.app import Lighthouse

WORKER = Path(__file__).parent / "training_worker.py"
DEADLINE_S = 120.0
STEPS_BETWEEN = 10


@dataclasses.dataclass
class Group:
    """One start of one replica group, and what it reported since it was last cleared."""

    number: int
    process: subprocess.Popen[bytes]
    started_at: float
    log: Path
    reports: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    takeovers: int = 0
    has_ended: bool = False
    rest: bytes = b""

    @property
    def commits(self) -> list[dict[str, Any]]:
        return [report for report in self.reports if report["event"] == "step" and report["committed"]]

    def order(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()


class LighthouseLog(logging.Handler):
    """When the lighthouse said what."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[float, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((time.monotonic(), str(getattr(record, "everstep", {}).get("event", ""))))


class Campaign:
    """`with Campaign(groups) as job`: the lighthouse runs in this process, the groups in their own."""

    def __init__(self, groups: int, seed: int = 0, **lighthouse: Any) -> None:
        self.size = groups
        self.rng = random.Random(seed)
        self.groups: dict[int, Group] = {}
        self.lost = 0
        self.why_lost: list[str] = []
        self.moved = 0
        self.said = LighthouseLog()
        self.address = ""
        self._settings = lighthouse
        self._selector = selectors.DefaultSelector()
        self.stack = contextlib.ExitStack()
        self.started: list[Group] = []
        self.folder = Path()
        self.environment: dict[str, str] = {}
        self.on_wait: Callable[[], None] = lambda: None

    def __enter__(self) -> "Campaign":
        self.folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory(prefix="everstep-bench-")))
        self.address = self.start_lighthouse()
        logger = logging.getLogger("everstep.lighthouse")
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.addHandler(self.said)
        self.stack.callback(logger.removeHandler, self.said)
        self.environment = {
            **os.environ,
            "EVERSTEP_LIGHTHOUSE": self.address,
            "NUM_REPLICA_GROUPS": str(self.size),
            "TORCH_CPP_LOG_LEVEL": "ERROR",
        }
        for number in range(self.size):
            self.start(number)
        return self

    def __exit__(self, *_: object) -> None:
        for group in self.started:
            if group.process.poll() is None:
                group.process.send_signal(signal.SIGKILL)
            group.process.wait()
            for pipe in (group.process.stdin, group.process.stdout):
                assert pipe is not None
                with contextlib.suppress(OSError):
                    pipe.close()
        self._selector.close()
        self.stack.close()

    def start_lighthouse(self) -> str:
        # Groups die here for the measurement's sake; nothing is wrong with them.
        wanted: dict[str, Any] = {"crash_loop_limit": 0, "state_dir": self.folder / "lighthouse", **self._settings}
        settings = LighthouseSettings(port=0, **wanted)
        return self.stack.enter_context(Lighthouse.in_thread(settings)).address

    def start(self, number: int) -> Group:
        log = self.folder / f"group{number}-{len(self.started)}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                self.command_of(number),
                env={**self.environment, "REPLICA_GROUP_ID": str(number)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
            )
        group = self.groups[number] = Group(number, process, time.monotonic(), log)
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        self._selector.register(process.stdout, selectors.EVENT_READ, group)
        self.started.append(group)
        return group

    def command_of(self, _number: int) -> list[str]:
        return [sys.executable, str(WORKER)]

    # ---- time

    def until(self, is_reached: Callable[[], bool], what: str, deadline_s: float = DEADLINE_S) -> None:
        deadline = time.monotonic() + deadline_s
        while not is_reached():
            if time.monotonic() > deadline:
                last = {n: group.commits[-1:] for n, group in self.groups.items()}
                raise TimeoutError(f"{what}: not within {deadline_s:g} s; last commits {last}")
            self.on_wait()
            for group in self._heard(0.02):
                if group.has_ended and self.groups.get(group.number) is group:
                    raise RuntimeError(f"group {group.number} exited:\n{group.log.read_text()[-2000:]}")

    def pause(self, seconds: float) -> None:
        instant = time.monotonic() + seconds
        self.until(lambda: time.monotonic() >= instant, "pause", seconds + 60.0)

    def until_whole(self) -> None:
        """All groups train together, and have for some steps."""
        self.until(lambda: all(self.trains_with(group, self.size) for group in self.groups.values()), "all train")
        steps = {group.number: group.commits[-1]["step"] + STEPS_BETWEEN for group in self.groups.values()}
        self.until(lambda: all(self.groups[n].commits[-1]["step"] >= s for n, s in steps.items()), "some steps")

    def _heard(self, timeout_s: float) -> Iterator[Group]:
        for key, _ in self._selector.select(timeout_s):
            group: Group = key.data
            assert group.process.stdout is not None
            chunk = group.process.stdout.read()
            if not chunk:
                self._selector.unregister(group.process.stdout)
                group.has_ended = True
            else:
                *lines, group.rest = (group.rest + chunk).split(b"\n")
                for line in lines:
                    self._take(group, json.loads(line))
            yield group

    def _take(self, group: Group, report: dict[str, Any]) -> None:
        group.reports.append(report)
        if report["event"] == "step" and not report["committed"]:
            self.lost += 1
            self.why_lost.append(f"group {group.number} step {report['step'] + 1}: {report.get('why', '')}")
        if report.get("what") == "took state":
            group.takeovers += 1
            self.moved += group.takeovers > 1  # the first is how it joined

    # ---- questions

    @staticmethod
    def trains_with(group: Group, participants: int) -> bool:
        commits = group.commits
        return bool(commits) and commits[-1]["participants"] == participants

    def clear(self) -> None:
        for group in self.groups.values():
            group.reports.clear()
        self.said.lines.clear()

    def draw_victim(self) -> Group:
        return self.groups.pop(self.rng.randrange(self.size))

    def survivors_go_on(self, without: int = 1) -> None:
        self.until(
            lambda: all(self.trains_with(group, self.size - without) for group in self.groups.values()), "they go on"
        )

    def times_after(self, fault_at: float) -> dict[str, float]:
        """Milliseconds from the fault, each the slowest survivor's: see recovery.py for what they are."""
        times = {"next_commit": self._slowest(fault_at, lambda r: r["event"] == "step" and r["committed"])}
        for name, what in (("notified", "notice"), ("granted", "granted"), ("reconfigured", "settled")):
            times[name] = self._slowest(fault_at, lambda r, what=what: r.get("what") == what)  # type: ignore[misc]
        without = self.size - 1
        smaller = self._slowest(fault_at, lambda r: r["event"] == "step" and r["participants"] <= without)
        times["without_it"] = smaller
        seen = [r["at"] for g in self.groups.values() for r in g.reports if r.get("what") == "collective failed"]
        seen += [at for at, event in self.said.lines if event in ("member suspected", "round opened")]
        times["seen"] = min(at for at in seen if at > fault_at)
        return {name: (at - fault_at) * 1e3 for name, at in times.items()}

    def _slowest(self, since: float, fits: Callable[[dict[str, Any]], bool]) -> float:
        return max(next(r["at"] for r in g.reports if r["at"] > since and fits(r)) for g in self.groups.values())


def spread(values: list[float], digits: int = 1) -> list[float]:
    return [round(v, digits) for v in (min(values), statistics.median(values), max(values))] if values else []


def cell(values: list[float]) -> str:
    return " / ".join(f"{value:g}" for value in values) if values else "-"
