"""How much of the undisturbed rate is left when a group is killed every 10 seconds, and starts again each time?

    python bench/goodput.py [--minutes 3] [--every 10] [--groups 4] [--compute-ms 250] [--seed 0] [--json]

First all groups train undisturbed, then one is killed (SIGKILL) at each instant, and started again at once. Every
forward pass sleeps for --compute-ms: it stands for an accelerator, so that a group that starts, which takes seconds of
a core, slows the others no more than it would on a machine of its own. While half of the groups or more are
away, the next kill is postponed, and counted as such: groups come back too slowly then for such a rhythm.

    lost      steps that a live group computed and that did not commit
    rate      committed steps a second and live group: the commits of all groups, over the seconds in which each lived;
              a group lives from its first commit to its kill, so what it imports and recovers is not counted, and what
              the others wait for it is
    goodput   the rate under kills, over the undisturbed rate of the same run
    job       the same for the steps of the job, whoever lived: from first to last, over the wall time
    per kill  milliseconds that the step with the kill took longer than an undisturbed one, and the steps until the next
              kill together, in which the group came back

The exit code is 1 for a lost step, or for a goodput below 0.95.
"""

import argparse
import datetime
import itertools
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
        kill_at = begun_at
        for _ in range(kills):
            job.pause(max(0.0, kill_at - time.monotonic()))
            job.until(lambda: len(live(job)) > groups // 2, "more than half of the groups are back")
            late += time.monotonic() > kill_at + every_s / 10
            victim = job.rng.choice(live(job))
            kill_at = time.monotonic()
            died_at[job.started.index(victim)] = kill_at
            kill_at += every_s
            del job.groups[victim.number]
            victim.process.kill()
            victim.process.wait()
            job.start(victim.number)
        under = (begun_at, kill_at)
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
            "postponed": late,
            "lost": job.lost,
            "lost_undisturbed": undisturbed_lost,
            "why_lost": job.why_lost,
            "rate": [round(quiet, 4), round(hurt, 4)],
            "goodput": round(hurt / quiet, 4),
            "job_rate": [round(quiet_job, 4), round(hurt_job, 4)],
            "job": round(hurt_job / quiet_job, 4),
            "rejoin_s": spread(returns),
            "kill_cost_ms": costs(lives, 1.0 / quiet_job, under, sorted(died_at.values())),
        }


def live(job: Campaign) -> list[Group]:
    return [group for group in job.groups.values() if group.commits]


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


def costs(
    lives: list[tuple[Group, float]], step_s: float, window: tuple[float, float], kills: list[float]
) -> dict[str, list[float]]:
    """Of the step with the kill, and of those after it; by when the job's first member committed each step."""
    firsts: dict[int, float] = {}
    for group, _ in lives:
        for report in group.commits:
            firsts[report["step"]] = min(report["at"], firsts.get(report["step"], report["at"]))
    instants = [firsts[step] for step in sorted(firsts)]
    in_step, after = [], []
    for kill, until in itertools.pairwise([*kills, window[1]]):
        extra = [(end - start - step_s) * 1e3 for start, end in itertools.pairwise(instants) if kill < end <= until]
        if not extra:
            continue
        in_step.append(extra[0])
        after.append(sum(extra[1:]))
    return {"in its step": spread(in_step), "after it": spread(after)}


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
        print(f"{result['kills']} kills, one every {options.every:g} s, {result['postponed']} postponed")
        print(f"lost {result['lost']} steps; {options.groups} groups, back after {result['rejoin_s']} s")
        print(f"steps a second and live group: {result['rate'][0]} undisturbed, {result['rate'][1]} under kills")
        print(f"goodput {result['goodput']:.1%} per live group, {result['job']:.1%} of the job's steps")
        for what, cost in result["kill_cost_ms"].items():
            print(f"a kill cost {cost} ms {what} (min, median, max)")
        for why in result["why_lost"]:
            print(f"    {why}")
    sys.exit(result["lost"] > 0 or result["goodput"] < GOODPUT_MIN)


if __name__ == "__main__":
    main()
