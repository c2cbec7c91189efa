"""The seeds of `make soak`, at the lowest priority.

Replica groups of one rank, the nodes of a rendezvous, a part as many groups with agents, and a smaller part of groups
of several ranks, which cost more.
"""

import contextlib
import os
import sys
from pathlib import Path

from everstep.sim.__main__ import main

LOWEST_PRIORITY = 19
RANKED_PART = 60
AGENTS_PART = 10


def run(seeds: str, jobs: str) -> int:
    os.nice(LOWEST_PRIORITY)
    with contextlib.suppress(OSError):  # this session as a whole, where the kernel shares time among sessions first
        Path("/proc/self/autogroup").write_text(str(LOWEST_PRIORITY))
    first, last = map(int, seeds.split(":"))
    fewer = f"{first}:{first + (last - first) // RANKED_PART}"
    with_agents = f"{first}:{first + (last - first) // AGENTS_PART}"
    kinds = (
        ["--seeds", seeds, "--groups", "3:9"],
        ["--seeds", seeds, "--rendezvous"],
        ["--seeds", with_agents, "--agents"],
        ["--seeds", fewer, "--groups", "2:5", "--ranks", "2:3", "--steps", "8"],
        ["--seeds", fewer, "--groups", "2:5", "--ranks", "2:3", "--steps", "8", "--agents"],
    )
    return max(main([*kind, "--jobs", jobs]) for kind in kinds)


if __name__ == "__main__":
    raise SystemExit(run(*sys.argv[1:]))
