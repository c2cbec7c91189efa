"""A job under a rain of seeded faults: kills, stops, drains, joins, and a lighthouse that dies and comes back.

    python -m tests.train.rain FOLDER --seed 7 --faults 200 --seconds 300

Leaves in FOLDER what tests/checkers reads. The seed fixes what happens when; whom it meets also depends on who is
there at that moment. There is always a healthy member left that holds the state.
"""

import argparse
import dataclasses
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from everstep.errors import EverstepError
from everstep.link.operate import drain_group
from everstep.subscribe import target
from tests.train.job import Job, Running
from tests.train.recording import HistoryFile

# How often each kind is drawn.
KINDS = {"kill": 7, "double kill": 2, "stop": 4, "SIGTERM": 2, "operator's drain": 1, "join": 2, "lighthouse": 3}
HEALTHY_AFTER_S = 0.5  # of commits without an interruption by us
STEPS_MIN = 15  # of a process before it is hurt: one that always dies earlier is in a crash loop
STOP_S = (0.05, 2.0)
RETURN_S = (0.05, 1.5)
OUTAGE_S = (0.0, 1.5)
HEARTBEAT_TIMEOUT_S = 1.0
PROGRESS_S = 30.0  # within it the job commits another step, whatever rains
PATIENCE_S = 5.0  # until a kind that is not possible is given up for another
PACE_S = 0.01


@dataclasses.dataclass
class Standing:
    """What the rain knows of one start of a group."""

    running: Running
    healthy_since: float | None = None  # it commits, and we did nothing to it
    stopped_until: float | None = None
    is_leaving: bool = False  # was asked to, and may be away at any moment
    was_asked: bool = False
    seen: int = 0  # of its steps
    evictions: int = 0

    def look(self, now: float) -> None:
        evictions = sum(line.startswith("evicted") for line in self.running.logs)
        if evictions > self.evictions:
            self.evictions, self.healthy_since = evictions, None
        if self.stopped_until is not None and now >= self.stopped_until:
            self.stopped_until = None
            signal_to(self.running, signal.SIGCONT)
        if len(self.running.steps) > self.seen:
            self.seen = len(self.running.steps)
            if self.stopped_until is None and self.healthy_since is None and not self.is_leaving:
                self.healthy_since = now


class Rain(Job):
    """`with Rain(folder, seed) as job: job.pour(faults, seconds); job.clear_up()`."""

    def __init__(self, folder: Path, seed: int, groups: int = 4) -> None:
        super().__init__(groups)
        self._folder = folder
        self._random = random.Random(seed)
        self._faults = HistoryFile(folder / "faults.jsonl")
        (folder / "histories").mkdir()
        self._standing: dict[int, Standing] = {}
        self._returns: dict[int, float] = {}  # when an absent group is started again
        self._lighthouse: subprocess.Popen[str] | None = None
        self._lighthouse_back_at: float | None = None
        self._is_serving = False
        self._drained: list[Standing] = []  # by the operator, since the lighthouse was started
        self._lives = 0
        self._step = 0
        self._step_at = time.monotonic()
        self.done: dict[str, int] = dict.fromkeys(KINDS, 0)

    def __enter__(self) -> "Rain":
        super().__enter__()
        return self

    def __exit__(self, *details: object) -> None:
        super().__exit__(*details)
        self._faults.close()
        if self._lighthouse is not None:
            self._kill_lighthouse()

    # ---- the lighthouse is a process

    def open_lighthouse(self) -> str:
        command = [sys.executable, "-m", "everstep.cli", "lighthouse", "--log-format", "json"]
        command += ["--heartbeat-timeout", str(HEARTBEAT_TIMEOUT_S), "--state-dir", str(self._folder / "state")]
        command += ["--port", self.address.rpartition(":")[2] or "0"]
        with (self._folder / f"lighthouse{self._lives:03}.log").open("wb") as log:
            self._lighthouse = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        self._lives += 1
        self._lighthouse_back_at, self._is_serving = None, False
        if self.address:
            return self.address
        assert self._lighthouse.stdout is not None
        address = self._lighthouse.stdout.readline().rpartition(" ")[2].strip()
        self._is_serving = True
        return address

    def _kill_lighthouse(self) -> None:
        assert self._lighthouse is not None
        assert self._lighthouse.stdout is not None
        self._lighthouse.kill()
        self._lighthouse.wait(10)
        self._lighthouse.stdout.close()
        self._lighthouse = None

    # ---- groups

    def _launch(self, group: int) -> None:
        self._returns.pop(group, None)
        number = len(self.all)
        running = self.start(
            group,
            seed=10 * number,
            history=str(self._folder / "histories" / f"{number:04}-group{group}.jsonl"),
            pace_s=PACE_S,
            is_rich=True,
            options={"connect_timeout_s": 60.0},
        )
        self._standing[group] = Standing(running)

    def _look(self) -> None:
        """Take in what the groups reported, and do what is due."""
        now = time.monotonic()
        for group, standing in list(self._standing.items()):
            if standing.running.has_ended:
                self._bury(group, now)
            else:
                standing.look(now)
                if standing.running.step > self._step:
                    self._step, self._step_at = standing.running.step, now
        for group in [group for group, at in self._returns.items() if now >= at and group not in self._standing]:
            self._launch(group)
        self._look_at_lighthouse(now)
        if now - self._step_at > PROGRESS_S:
            raise AssertionError(f"I7 no step in {PROGRESS_S:g} s\n{self.describe()}")

    def _bury(self, group: int, now: float) -> None:
        standing = self._standing.pop(group)
        process = standing.running.process
        process.join(10)
        if process.exitcode != -signal.SIGKILL and not (standing.was_asked and process.exitcode == 0):
            raise AssertionError(f"group {group} ended by itself: {standing.running.error}\n{self.describe()}")
        self._returns.setdefault(group, now + self._random.uniform(*RETURN_S))

    def _look_at_lighthouse(self, now: float) -> None:
        if self._lighthouse is None:
            self._step_at = now  # without it no failure is resolved
            if self._lighthouse_back_at is not None and now >= self._lighthouse_back_at:
                self.open_lighthouse()
        elif self._lighthouse.poll() is not None:
            raise AssertionError(f"the lighthouse ended by itself with {self._lighthouse.returncode}")
        elif not self._is_serving:
            assert self._lighthouse.stdout is not None
            if select.select([self._lighthouse.stdout], [], [], 0.0)[0]:
                self._is_serving, self._step_at = True, now

    def _wait(self, until: Callable[[], bool], deadline_s: float, what: str) -> None:
        """Like `until`, but goes on looking while nothing is reported."""
        deadline = time.monotonic() + deadline_s
        while not until():
            if time.monotonic() > deadline:
                raise AssertionError(f"{what}: not within {deadline_s:g} s\n{self.describe()}")
            self._hear()

    def _hear(self) -> None:
        self.hear(0.02)
        self._look()

    # ---- faults

    def pour(self, faults: int, seconds: float) -> None:
        for group in range(self.groups):
            self._launch(group)
        self._wait(lambda: len(self._healthy()) == self.groups, 60.0, "all train")
        start = time.monotonic()
        instants = sorted(self._random.uniform(0.0, seconds) for _ in range(faults))
        for instant in instants:
            self._wait_until(start + instant)
            first, *others = self._random.choices(list(KINDS), list(KINDS.values()), k=50)
            patient_until = time.monotonic() + PATIENCE_S
            while not self._strike(first):
                if time.monotonic() > patient_until and any(self._strike(kind) for kind in others):
                    break
                self._hear()

    def _wait_until(self, instant: float) -> None:
        while time.monotonic() < instant:
            self._hear()

    def _healthy(self) -> list[int]:
        """Groups that train, and that we have left alone for a while."""
        now = time.monotonic()
        return [
            group
            for group, standing in sorted(self._standing.items())
            if standing.healthy_since is not None
            and now - standing.healthy_since > HEALTHY_AFTER_S
            and standing.running.step >= self._step - 2
            and len(standing.running.steps) >= STEPS_MIN
            and not standing.running.has_ended
        ]

    def _strike(self, kind: str) -> bool:
        """Do it if it is possible now."""
        healthy = self._healthy()
        needed = {"double kill": 3, "lighthouse": 1, "join": 0}.get(kind, 2)
        if len(healthy) < needed:
            return False
        victims = self._random.sample(healthy, k={"double kill": 2, "lighthouse": 0, "join": 0}.get(kind, 1))
        standings = [self._standing[victim] for victim in victims]
        members = [_member(standing.running) for standing in standings]
        match kind:
            case "kill" | "double kill":
                for standing in standings:
                    signal_to(standing.running, signal.SIGKILL)
            case "stop":
                signal_to(standings[0].running, signal.SIGSTOP)
                standings[0].stopped_until = time.monotonic() + self._random.uniform(*STOP_S)
            case "SIGTERM":
                signal_to(standings[0].running, signal.SIGTERM)
                standings[0].is_leaving = standings[0].was_asked = True
            case "operator's drain":
                if self._lighthouse is None or not self._drain(victims[0]):
                    return False
                standings[0].is_leaving = standings[0].was_asked = True
                self._drained.append(standings[0])
            case "join":
                return self._join()
            case "lighthouse":
                if self._lighthouse is None or not self._is_serving:
                    return False
                self._kill_lighthouse()
                for standing in self._drained:  # what the operator asked may be forgotten with it
                    standing.is_leaving = False
                self._drained.clear()
                self._lighthouse_back_at = time.monotonic() + self._random.uniform(*OUTAGE_S)
        for standing in standings:
            standing.healthy_since = None
        self._note(kind, members)
        return True

    def _join(self) -> bool:
        """A group that is away, at once; else one more than the job was begun with."""
        absent = [group for group in range(self.groups + 1) if group not in self._standing]
        if not absent:
            return False
        self._launch(self._random.choice(absent))
        self._note("join", [])
        return True

    def _drain(self, group: int) -> bool:
        try:
            drain_group(target(lighthouse=self.address, connect_timeout_s=2.0), str(group))
        except EverstepError:
            return False  # the lighthouse has just been started, or does not know it yet
        return True

    def _note(self, kind: str, members: list[str]) -> None:
        self.done[kind] += 1
        self._faults.write({"kind": kind, "members": members, "step": self._step, "at": time.monotonic()})

    def clear_up(self) -> None:
        """No more faults: all groups train together again, and end."""
        self._wait(self._is_whole, 60.0, "all are back")
        last = [standing.running for standing in self._standing.values()]
        self._wait(lambda: all(r.participants == len(last) for r in last), 60.0, "all train together")
        self.stop(last)

    def _is_whole(self) -> bool:
        is_complete = len(self._standing) >= self.groups and not self._returns
        return self._lighthouse is not None and is_complete and len(self._healthy()) == len(self._standing)


def _member(running: Running) -> str:
    return str(running.steps[-1]["member"])


def signal_to(running: Running, number: int) -> None:
    pid = running.process.pid
    assert pid is not None
    if running.process.is_alive():
        os.kill(pid, number)


def rain(folder: Path, seed: int, faults: int, seconds: float) -> dict[str, int]:
    """Returns how many of each kind were made. Raises AssertionError when the job does not go on."""
    with Rain(folder, seed) as job:
        job.pour(faults, seconds)
        job.clear_up()
        return job.done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=300.0)
    options = parser.parse_args()
    options.folder.mkdir()
    print(rain(options.folder, options.seed, options.faults, options.seconds))


if __name__ == "__main__":
    main()
