"""The seeds of `make soak`, at the lowest priority: replica groups, then the nodes of a rendezvous."""

import os
import sys

from everstep.sim.__main__ import main

LOWEST_PRIORITY = 19


def run(arguments: list[str]) -> int:
    os.nice(LOWEST_PRIORITY)
    members = main([*arguments, "--groups", "3:9"])
    nodes = main([*arguments, "--rendezvous"])
    return members or nodes


if __name__ == "__main__":
    raise SystemExit(run(sys.argv[1:]))
