"""Kills and rejoins for a while: do memory, descriptors and threads of the lighthouse and of a survivor stay flat?

    python bench/soak.py [--minutes 20] [--groups 3] [--seed 0] [--json]

Group 0 is never killed. Every few seconds one of the others gets SIGKILL at a random moment and starts again. The
lighthouse is a process of its own. Prints resident memory (MiB), descriptors and threads, lowest / median / highest in
each quarter of the time after a warm-up. Growth is from the second quarter to the last: of memory's median, of a
count's lowest. What is open only for a while raises the highest and may raise the median; a leak raises the lowest.
Lost steps are named with what the member said; the exit code is 1 for growth, and for a lost step.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from campaign import Campaign, cell, spread

SAMPLE_EVERY_S = 2.0
WARM_UP_S = 30.0
PAUSE_S = (2.0, 6.0)  # between a rejoin and the next kill
QUARTER_SAMPLES_MIN = 5  # the lowest of fewer may be a connection that is just being made
MEMORY_GROWTH_MAX = 0.03  # of the first median; a count may not grow at all
WHAT = ("rss_mib", "fds", "threads")


class SoakCampaign(Campaign):
    """Its lighthouse is a process; group 0 is never a victim."""

    lighthouse: subprocess.Popen[str]

    def start_lighthouse(self) -> str:
        command = [sys.executable, "-m", "everstep.cli", "lighthouse", "--port", "0"]
        command += ["--state-dir", str(self.folder / "lighthouse"), "--crash-loop-limit", "0"]
        with (self.folder / "lighthouse.log").open("wb") as log:
            self.lighthouse = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        self.stack.callback(self._end_lighthouse)
        assert self.lighthouse.stdout is not None
        return self.lighthouse.stdout.readline().rpartition(" ")[2].strip()

    def _end_lighthouse(self) -> None:
        self.lighthouse.terminate()
        self.lighthouse.wait()
        assert self.lighthouse.stdout is not None
        self.lighthouse.stdout.close()


def sample(pid: int) -> dict[str, float]:
    status = Path(f"/proc/{pid}/status").read_text()
    rss_kib, threads = (int(status.split(f"\n{name}:")[1].split()[0]) for name in ("VmRSS", "Threads"))
    return {"rss_mib": rss_kib / 1024, "threads": threads, "fds": len(os.listdir(f"/proc/{pid}/fd"))}


def run(minutes: float, groups: int, seed: int) -> dict[str, Any]:
    samples: dict[str, list[dict[str, float]]] = {"lighthouse": [], "survivor": []}
    kills = 0
    with SoakCampaign(groups, seed) as job:
        pids = {"lighthouse": job.lighthouse.pid, "survivor": job.groups[0].process.pid}
        job.until_whole()
        job.pause(WARM_UP_S if minutes >= 2 else 1.0)
        began_at = time.monotonic()
        sampled_at = 0.0

        def look() -> None:
            nonlocal sampled_at
            if time.monotonic() - sampled_at >= SAMPLE_EVERY_S:
                sampled_at = time.monotonic()
                for name, pid in pids.items():
                    samples[name].append(sample(pid))

        job.on_wait = look
        while time.monotonic() - began_at < minutes * 60:
            job.until_whole()
            job.clear()
            job.pause(job.rng.uniform(*PAUSE_S))
            victim = job.groups.pop(job.rng.randrange(1, groups))
            victim.process.kill()
            job.survivors_go_on()
            victim.process.wait()
            job.start(victim.number)
            kills += 1
        lost, step = job.why_lost, job.groups[0].commits[-1]["step"]
    rows = [judge(name, what, [s[what] for s in samples[name]]) for name in samples for what in WHAT]
    return {
        "minutes": minutes,
        "groups": groups,
        "kills": kills,
        "lost": len(lost),
        "why_lost": lost,
        "steps": step,
        "rows": rows,
    }


def judge(process: str, what: str, values: list[float]) -> dict[str, Any]:
    """A run too short for four quarters of enough samples has no verdict: `is_flat` is None."""
    size = len(values) // 4 if len(values) >= 4 * QUARTER_SAMPLES_MIN else 0
    quarters = [spread(values[i * size : (i + 1) * size or None]) for i in range(4)] if size else [spread(values)]
    lowest, median = zip(*(quarter[:2] for quarter in quarters), strict=True)
    figures, allowed = (median, MEMORY_GROWTH_MAX * median[0]) if what == "rss_mib" else (lowest, 0.0)
    growth = round(figures[-1] - figures[1], 2) if size else None
    return {
        "process": process,
        "what": what,
        "samples": len(values),
        "quarters": quarters,
        "growth": growth,
        "is_flat": None if growth is None else growth <= allowed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--groups", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = run(options.minutes, options.groups, options.seed)
    if options.json:
        print(json.dumps({"benchmark": "soak", **result}))
    else:
        print(f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores; {' '.join(sys.argv)}")
        print(f"{result['kills']} kills in {options.minutes:g} minutes, {result['steps']} steps, lost {result['lost']}")
        for why in result["why_lost"]:
            print(f"    {why}")
        for row in result["rows"]:
            quarters = "   ".join(f"{cell(quarter):>21}" for quarter in row["quarters"])
            verdict = {True: "flat", False: "GROWS", None: "too short to say"}[row["is_flat"]]
            print(f"{row['process']:>12} {row['what']:>8}  {quarters}  growth {row['growth']}: {verdict}")
    sys.exit(result["lost"] > 0 or any(row["is_flat"] is False for row in result["rows"]))


if __name__ == "__main__":
    main()
