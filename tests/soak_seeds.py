"""The seeds of `make soak`, at the lowest priority.

Replica groups of one rank, and a part as many of what is simpler, or costs more: nodes of a rendezvous, groups with
agents, groups of several ranks.
"""

import contextlib
import os
import sys
from pathlib import Path

from everstep.sim.__main__ import main

LOWEST_PRIORITY = 19
RENDEZVOUS_PART = 5
AGENTS_PART = 20
RANKED_PART = 60


def run(seeds: str, jobs: str) -> int:
    os.nice(LOWEST_PRIORITY)
    with contextlib.suppress(OSError):  # this session as a whole, where the kernel shares time among sessions first
        Path("/proc/self/autogroup").write_text(str(LOWEST_PRIORITY))
    first, last = map(int, seeds.split(":"))
    ranked = ["--groups", "2:5", "--ranks", "2:3", "--steps", "8"]

    def of(part: int) -> list[str]:
        return ["--seeds", f"{first}:{first + (last - first) // part}"]

    kinds = (
        [*of(1), "--groups", "3:9"],
        [*of(RENDEZVOUS_PART), "--rendezvous"],
        [*of(AGENTS_PART), "--agents"],
        [*of(RANKED_PART), *ranked],
        [*of(RANKED_PART), *ranked, "--agents"],
    )
    return max(main([*kind, "--jobs", jobs]) for kind in kinds)


if __name__ == "__main__":
    raise SystemExit(run(*sys.argv[1:]))
