"""SIGKILL of one of N replica groups at random moments; it restarts and rejoins before the next kill.

    python bench/bench_recovery.py [--kills 20] [--groups 3 5] [--seed 0] [--json]

Trains the demo's GPT. Prints milliseconds (min / median / max over kills), each the slowest survivor's: from the kill
to the next commit, and to the first commit that is made without the victim; from the restart to the first commit of the
restarted group (seconds). `lost` counts steps that a survivor computed and that did not commit; `moved` counts
transfers of state to survivors.
"""

import argparse
import datetime
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from everstep.config import LighthouseSettings
from everstep.demo.workers import Worker, Workers
from everstep.lighthouse.app import Lighthouse

DEADLINE_S = 90.0
STEPS_BETWEEN = 10


class Campaign:
    """One job of N groups, killed and revived again and again."""

    def __init__(self, workers: Workers, groups: int, rng: random.Random) -> None:
        self.workers = workers
        self.groups = groups
        self.rng = rng
        self.current: dict[int, Worker] = {group: workers.start(group) for group in range(groups)}
        self.commits: dict[int, list[dict[str, Any]]] = {group: [] for group in range(groups)}
        self.lost = 0

    def run(self, kills: int) -> dict[str, Any]:
        rows: dict[str, list[float]] = {"next_commit_ms": [], "without_victim_ms": [], "rejoin_s": []}
        for _ in range(kills):
            self._until(lambda: all(self._trains_with(group, self.groups) for group in self.current))
            steps = {group: self.commits[group][-1]["step"] + STEPS_BETWEEN for group in self.current}
            self._until(lambda steps=steps: all(self.commits[g][-1]["step"] >= s for g, s in steps.items()))  # type: ignore[misc]
            instant = time.monotonic() + self.rng.uniform(0.0, 0.15)
            self._until(lambda instant=instant: time.monotonic() >= instant)  # type: ignore[misc]
            for name, value in self._kill_one().items():
                rows[name].append(value)
        result: dict[str, Any] = {"groups": self.groups, "kills": kills, "lost": self.lost}
        result["moved"] = self._recoveries_of_survivors()
        return result | {name: spread(values) for name, values in rows.items()}

    def _recoveries_of_survivors(self) -> int:
        """A process takes state over once, when it joins; anything more went to a survivor."""
        logs = [worker.log.read_text() for worker in self.current.values()]
        return sum(max(0, log.count(" recovered step=") - 1) for log in logs)

    def _kill_one(self) -> dict[str, float]:
        victim = self.rng.randrange(self.groups)
        worker = self.current.pop(victim)
        survivors = list(self.current)
        for group in survivors:
            self.commits[group].clear()
        killed_at = time.monotonic()
        worker.process.kill()
        self._until(lambda: all(self._trains_with(group, self.groups - 1) for group in survivors))
        next_commit = max(self._first(group, killed_at, self.groups) for group in survivors)
        without = max(self._first(group, killed_at, self.groups - 1) for group in survivors)
        worker.process.wait()
        self.commits[victim].clear()
        self.current[victim] = self.workers.start(victim)
        self._until(lambda: bool(self.commits[victim]))
        rejoin_s = self.commits[victim][0]["at"] - self.current[victim].started_at
        return {
            "next_commit_ms": (next_commit - killed_at) * 1e3,
            "without_victim_ms": (without - killed_at) * 1e3,
            "rejoin_s": rejoin_s,
        }

    def _first(self, group: int, since: float, participants: int) -> float:
        """The instant of the group's first commit after `since` by at most so many participants."""
        found = [c["at"] for c in self.commits[group] if c["at"] > since and c["participants"] <= participants]
        return float(found[0])

    def _trains_with(self, group: int, participants: int) -> bool:
        commits = self.commits[group]
        return bool(commits) and commits[-1]["participants"] == participants

    def _until(self, is_reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not is_reached():
            if time.monotonic() > deadline:
                raise TimeoutError(f"stuck: { ({g: c[-1:] for g, c in self.commits.items()}) }")
            for report in self.workers.reports(0.02):
                if self.current.get(report.worker.group) is not report.worker:
                    continue
                if report.fields is None:
                    log = report.worker.log.read_text()[-2000:]
                    raise RuntimeError(f"survivor {report.worker.group} exited:\n{log}")
                if report.fields["event"] == "step":
                    if report.fields["committed"]:
                        self.commits[report.worker.group].append(report.fields)
                    else:
                        self.lost += 1


def measure(groups: int, kills: int, seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="everstep-bench-") as name:
        folder = Path(name)
        with Lighthouse.in_thread(LighthouseSettings(port=0, state_dir=folder / "lighthouse")) as lighthouse:
            environment = {
                **os.environ,
                "EVERSTEP_LIGHTHOUSE": lighthouse.address,
                "NUM_REPLICA_GROUPS": str(groups),
                "TORCH_CPP_LOG_LEVEL": "ERROR",
            }
            with Workers(environment, folder) as workers:
                return Campaign(workers, groups, random.Random(seed)).run(kills)


def spread(values: list[float]) -> list[float]:
    return [round(v, 1) for v in (min(values), statistics.median(values), max(values))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--groups", type=int, nargs="+", default=[3, 5])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = [measure(groups, options.kills, options.seed) for groups in options.groups]
    if options.json:
        print(json.dumps({"benchmark": "recovery", "rows": rows}))
        return
    print(f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores; {' '.join(sys.argv)}")
    names = ("next_commit_ms", "without_victim_ms", "rejoin_s")
    print(f"{'groups':>6} {'kills':>5} {'lost':>4} {'moved':>5}  " + "  ".join(f"{name:>24}" for name in names))
    for row in rows:
        cells = [" / ".join(map(str, row[name])) for name in names]
        print(
            f"{row['groups']:>6} {row['kills']:>5} {row['lost']:>4} {row['moved']:>5}  "
            + "  ".join(f"{c:>24}" for c in cells)
        )


if __name__ == "__main__":
    main()
