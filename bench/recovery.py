"""SIGKILL of one of N replica groups; it restarts and rejoins before the next kill.

    python bench/recovery.py [--kills 20] [--groups 3 5] [--sweep] [--seed 0] [--with torchft] [--json]

At random moments, or with --sweep at each phase of a step in turn. Trains the demo's GPT. Prints milliseconds from the
kill, min / median / max over the kills, each the slowest survivor's:

    next commit   the survivors' next commit, whatever it was: what the loop feels
    seen          the first survivor's collective fails, or the lighthouse sees the connection close
    notified      the last survivor has the notice of the failure round
    granted       ... the grant, which says how the step goes on
    reconfigured  ... the new group, after its barrier
    without it    ... a commit made without the victim

and the seconds from a victim's restart to its first commit. `lost`: steps that a survivor computed and that did not
commit; `moved`: transfers of state to survivors. `--with torchft` kills groups of the rival's job as well.
"""

import argparse
import datetime
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from campaign import Campaign, cell, spread
from rival import require
from training_worker import POINTS

COLUMNS = ("next_commit", "seen", "notified", "granted", "reconfigured", "without_it")


def measure(groups: int, kills: int, seed: int, points: tuple[str, ...]) -> list[dict[str, Any]]:
    """One row for each point ("random": SIGKILL from outside at a random moment)."""
    rows = []
    with Campaign(groups, seed) as job:
        for point in points:
            found: dict[str, list[float]] = {name: [] for name in (*COLUMNS, "rejoin_s")}
            job.lost = job.moved = 0
            for _ in range(kills):
                times = kill_one(job, point)
                for name, values in found.items():
                    values.append(times[name])
            row: dict[str, Any] = {"groups": groups, "point": point, "kills": kills, "lost": job.lost}
            row["moved"] = job.moved
            rows.append(row | {name: spread(values) for name, values in found.items()})
    return rows


def kill_one(job: Campaign, point: str) -> dict[str, float]:
    job.until_whole()
    job.clear()
    if point == "random":
        job.pause(job.rng.uniform(0.0, 0.15))
        victim = job.draw_victim()
        fault_at = time.monotonic()
        victim.process.kill()
    else:
        victim = job.draw_victim()
        victim.order(f"die {point} 0")
        job.until(lambda: any(r["event"] == "died" for r in victim.reports), "the victim dies")
        fault_at = next(r["at"] for r in victim.reports if r["event"] == "died")
    job.survivors_go_on()
    times = job.times_after(fault_at)
    victim.process.wait()
    returned = job.start(victim.number)
    job.until(lambda: bool(returned.commits), "it comes back")
    return times | {"rejoin_s": returned.commits[0]["at"] - returned.started_at}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--groups", type=int, nargs="+", default=[3, 5])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sweep", action="store_true", help="kill at each phase of a step, --kills times each")
    parser.add_argument("--with", dest="rival", choices=["torchft"], help="measure it in the same run")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.rival:
        require()
    points = POINTS if options.sweep else ("random",)
    rows = [row for groups in options.groups for row in measure(groups, options.kills, options.seed, points)]
    result: dict[str, Any] = {"benchmark": "recovery", "rows": rows}
    if options.rival:
        from rival_recovery import measure_rival

        result["torchft"] = [measure_rival(groups, options.kills, options.seed) for groups in options.groups]
    if options.json:
        print(json.dumps(result))
        return
    print(f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores; {' '.join(sys.argv)}")
    names = (*COLUMNS, "rejoin_s")
    print(
        f"{'groups':>6} {'killed in':>10} {'kills':>5} {'lost':>4} {'moved':>5}  "
        + "  ".join(f"{n:>20}" for n in names)
    )
    for row in rows:
        cells = "  ".join(f"{cell(row[name]):>20}" for name in names)
        head = f"{row['groups']:>6} {row['point']:>10} {row['kills']:>5} {row['lost']:>4} {row['moved']:>5}"
        print(f"{head}  {cells}")
    for row in result.get("torchft", []):
        print(f"torchft {row['groups']} groups: next commit {cell(row['next_commit'])} ms; {row['note']}")


if __name__ == "__main__":
    main()
