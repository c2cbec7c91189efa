"""Failures other than a death, in a job of 3 replica groups: how long until the survivors' next commit.

    python bench/failures.py [--times 5] [--only silence hang notice] [--json]

Prints min / median / max over the repetitions, each the slowest survivor's:

    silence   SIGSTOP, with the default heartbeat timeout (2 s) and with 0.5 s; seconds
    hang      the training thread stands still while the link thread lives, with --stuck-timeout 2: seconds beyond it
    notice    SIGKILL: from the lighthouse's decision that a member failed to a subscriber having the event, in
              another process of this host; milliseconds
"""

import argparse
import datetime
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from campaign import Campaign, Group, cell, spread

GROUPS = 3
STUCK_TIMEOUT_S = 2.0
SUBSCRIBER = """
import sys, time, everstep as es
with es.subscribe_failures(lighthouse=sys.argv[1]) as failures:
    for event in failures:
        print(event.kind.value, time.monotonic(), flush=True)
"""


def silence(times: int, timeout_s: float) -> list[float]:
    found = []
    with Campaign(GROUPS, heartbeat_timeout_s=timeout_s) as job:
        for _ in range(times):
            job.until_whole()
            job.clear()
            job.pause(job.rng.uniform(0.0, 0.5))
            victim = job.draw_victim()
            stopped_at = time.monotonic()
            victim.process.send_signal(signal.SIGSTOP)
            found.append(resumed_after(job, stopped_at))
            victim.process.kill()
            victim.process.wait()
            job.start(victim.number)
    return found


def hang(times: int) -> list[float]:
    """Seconds beyond the limit."""
    found = []
    with Campaign(GROUPS, stuck_timeout_s=STUCK_TIMEOUT_S) as job:
        for _ in range(times):
            job.until_whole()
            job.until(lambda: min(len(group.commits) for group in job.groups.values()) > 20, "enough steps")
            job.clear()
            victim = job.draw_victim()
            victim.order("hang 0")
            job.until(lambda victim=victim: any(r["event"] == "hung" for r in victim.reports), "it hangs")  # type: ignore[misc]
            hung_at = next(r["at"] for r in victim.reports if r["event"] == "hung")
            found.append(resumed_after(job, hung_at) - STUCK_TIMEOUT_S)
            victim.process.wait()
            job.start(victim.number)
    return found


def notice(times: int) -> list[float]:
    """Milliseconds."""
    found = []
    with Campaign(GROUPS) as job:
        reader = subprocess.Popen([sys.executable, "-c", SUBSCRIBER, job.address], stdout=subprocess.PIPE, text=True)
        assert reader.stdout is not None
        try:
            assert reader.stdout.readline().startswith("resync")
            for _ in range(times):
                job.until_whole()
                job.clear()
                victim: Group = job.draw_victim()
                victim.process.kill()
                got_at = float(reader.stdout.readline().split()[1])
                decided_at = next(at for at, event in job.said.lines if event == "member suspected")
                found.append((got_at - decided_at) * 1e3)
                victim.process.wait()
                job.start(victim.number)
        finally:
            reader.kill()
            reader.wait()
            reader.stdout.close()
    return found


def resumed_after(job: Campaign, fault_at: float) -> float:
    """Seconds to the slowest survivor's first commit without the victim."""
    job.survivors_go_on()
    first = [
        next(c["at"] for c in group.commits if c["at"] > fault_at and c["participants"] < GROUPS)
        for group in job.groups.values()
    ]
    return max(first) - fault_at


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument(
        "--only", nargs="+", choices=["silence", "hang", "notice"], default=["silence", "hang", "notice"]
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows: dict[str, Any] = {}
    if "silence" in options.only:
        rows["SIGSTOP, defaults, s"] = spread(silence(options.times, 2.0), 2)
        rows["SIGSTOP, heartbeat timeout 0.5 s, s"] = spread(silence(options.times, 0.5), 2)
    if "hang" in options.only:
        rows[f"hung training thread, beyond the limit of {STUCK_TIMEOUT_S:g} s, s"] = spread(hang(options.times), 2)
    if "notice" in options.only:
        rows["notice to a subscriber, ms"] = spread(notice(options.times), 2)
    if options.json:
        print(json.dumps({"benchmark": "failures", "times": options.times, "rows": rows}))
        return
    print(f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores; {' '.join(sys.argv)}")
    for name, values in rows.items():
        print(f"{name:>60}  {cell(values)}")


if __name__ == "__main__":
    main()
