"""Kills replica groups of the rival's job, as recovery.py kills ours, with its timeouts tuned for speed.

The join timeout decides its median: after it, survivors are a quorum even before the dead one's heartbeat expires.
"""

import random
import sys
import time
from pathlib import Path
from typing import Any

from campaign import Campaign, spread
from rival import lighthouse, require

WORKER = Path(__file__).parent / "rival_worker.py"
HEARTBEAT_TIMEOUT_S = 1.0  # its default is 5 s
JOIN_TIMEOUT_S = 0.1  # its default is 60 s
COLLECTIVE_TIMEOUT_S = 5.0  # its default is 60 s: blocked survivors of a kill among 5 groups wait for it
STEPS_BETWEEN = 10


def measure_rival(groups: int, kills: int, seed: int) -> dict[str, Any]:
    require()
    next_commit: list[float] = []
    uncommitted = 0
    timeouts = {"heartbeat_timeout_ms": int(HEARTBEAT_TIMEOUT_S * 1e3), "join_timeout_ms": int(JOIN_TIMEOUT_S * 1e3)}
    options = {"min_replicas": 1, **timeouts}
    with lighthouse(**options) as address, RivalCampaign(groups, seed, address) as job:
        for _ in range(kills):
            job.until_whole()
            job.clear()
            job.lost = 0
            job.pause(job.rng.uniform(0.0, 0.15))
            victim = job.draw_victim()
            fault_at = time.monotonic()
            victim.process.kill()
            job.survivors_go_on()
            first = [next(c["at"] for c in g.commits if c["at"] > fault_at) for g in job.groups.values()]
            next_commit.append((max(first) - fault_at) * 1e3)
            uncommitted += job.lost
            victim.process.wait()
            job.start(victim.number)
    note = (
        f"lost {uncommitted}; tuned: heartbeat timeout {HEARTBEAT_TIMEOUT_S:g} s (default 5), "
        f"join timeout {JOIN_TIMEOUT_S:g} s (60), Gloo timeout {COLLECTIVE_TIMEOUT_S:g} s (60)"
    )
    return {"groups": groups, "kills": kills, "next_commit": spread(next_commit), "lost": uncommitted, "note": note}


class RivalCampaign(Campaign):
    """Its workers are told where they belong by arguments."""

    def __init__(self, groups: int, seed: int, address: str) -> None:
        super().__init__(groups, seed)
        self.rng = random.Random(seed)
        self._rival_address = address

    def command_of(self, number: int) -> list[str]:
        return [sys.executable, str(WORKER), self._rival_address, str(number), str(COLLECTIVE_TIMEOUT_S)]
