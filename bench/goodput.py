"""How much of the undisturbed rate is left when a group is killed every 10 seconds, and starts again each time?

    python bench/goodput.py [--minutes 3] [--every 10] [--groups 4] [--compute-ms 250] [--seed 0] [--json]

First all groups train undisturbed, then one is killed (SIGKILL) at each instant, and started again at once. Every
forward pass sleeps for --compute-ms: it stands for an accelerator, so that a group that starts, which takes seconds of
a core, slows the others no more than it would on a machine of its own.

    lost      steps that a live group computed and that did not commit
    rate      committed steps a second and live group: the commits of all groups, over the seconds in which each lived;
              a group lives from its first commit to its kill, so what it imports and recovers is not counted, and what
              the others wait for it is
    goodput   the rate under kills, over the undisturbed rate of the same run
    job       the same for the steps of the job, whoever lived: from first to last, over the wall time

The exit code is 1 for a lost step, or for a goodput below 0.95.
"""

import argparse
import datetime
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from campaign import WORKER, Campaign, Group, spread

GOODPUT_MIN = 0.95
UNDISTURBED_S = 30.0


class GoodputCampaign(Campaign):
    """Its groups compute as if on accelerators of their own."""

    def __init__(self, groups: int, seed: int, compute_s: float) -> None:
        super().__init__(groups, seed)
        self._compute_s = compute_s

    def command_of(self, _number: int) -> list[str]:
        return [sys.executable, str(WORKER), "--compute-s", str(self._compute_s)]


def run(minutes: float, every_s: float, groups: int, seed: int, compute_s: float) -> dict[str, Any]:
    died_at: dict[int, float] = {}  # by the victim's place in job.started
    with GoodputCampaign(groups, seed, compute_s) as job:
        job.until_whole()
        before = (time.monotonic(), time.monotonic() + UNDISTURBED_S)
        job.pause(UNDISTURBED_S)
        undisturbed_lost, job.lost = job.lost, 0
        begun_at = time.monotonic()
        kills = round(minutes * 60 / every_s)
        late = 0
        for number in range(kills):
            job.pause(max(0.0, begun_at + number * every_s - time.monotonic()))
            live = [group for group in job.groups.values() if group.commits]
            late += len(live) < groups
            victim = job.rng.choice(live)
            died_at[job.started.index(victim)] = time.monotonic()
            del job.groups[victim.number]
            victim.process.kill()
            victim.process.wait()
            job.start(victim.number)
        under = (begun_at, begun_at + kills * every_s)
        job.pause(max(0.0, under[1] - time.monotonic()))
        lives = [(group, died_at.get(index, under[1])) for index, group in enumerate(job.started)]
        quiet, hurt = rate(lives, before), rate(lives, under)
        quiet_job, hurt_job = job_rate(lives, before), job_rate(lives, under)
        returns = [g.commits[0]["at"] - g.started_at for g in job.started[groups:] if g.commits]
        return {
            "minutes": minutes,
            "every_s": every_s,
            "groups": groups,
            "compute_s": compute_s,
            "kills": kills,
            "killed_while_another_was_away": late,
            "lost": job.lost,
            "lost_undisturbed": undisturbed_lost,
            "why_lost": job.why_lost,
            "rate": [round(quiet, 4), round(hurt, 4)],
            "goodput": round(hurt / quiet, 4),
            "job_rate": [round(quiet_job, 4), round(hurt_job, 4)],
            "job": round(hurt_job / quiet_job, 4),
            "rejoin_s": spread(returns),
        }


def rate(lives: list[tuple[Group, float]], window: tuple[float, float]) -> float:
    """Committed steps a second and live group."""
    commits, seconds = 0, 0.0
    for group, died_at in lives:
        instants = [report["at"] for report in group.commits]
        if not instants:
            continue
        start, end = max(window[0], instants[0]), min(window[1], died_at)
        if end > start:
            seconds += end - start
            commits += sum(start < at <= end for at in instants)
    return commits / seconds


def job_rate(lives: list[tuple[Group, float]], window: tuple[float, float]) -> float:
    steps = [step for group, _ in lives for step in _steps_in(group, window)]
    return (max(steps) - min(steps)) / (window[1] - window[0])


def _steps_in(group: Group, window: tuple[float, float]) -> Iterator[int]:
    for report in group.commits:
        if window[0] < report["at"] <= window[1]:
            yield report["step"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--every", type=float, default=10.0, help="seconds from kill to kill")
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--compute-ms", type=float, default=250.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = run(options.minutes, options.every, options.groups, options.seed, options.compute_ms / 1e3)
    if options.json:
        print(json.dumps({"benchmark": "goodput", **result}))
    else:
        print(f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores; {' '.join(sys.argv)}")
        print(
            f"{result['kills']} kills, one every {options.every:g} s, of {options.groups} groups; "
            f"lost {result['lost']} steps; back after {result['rejoin_s']} s (min, median, max)"
        )
        print(f"steps a second and live group: {result['rate'][0]} undisturbed, {result['rate'][1]} under kills")
        print(f"goodput {result['goodput']:.1%} per live group, {result['job']:.1%} of the job's steps")
        for why in result["why_lost"]:
            print(f"    {why}")
    sys.exit(result["lost"] > 0 or result["goodput"] < GOODPUT_MIN)


if __name__ == "__main__":
    main()
