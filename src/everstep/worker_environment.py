"""What the agent says to a worker before anything is imported; config.py reads all else. Imports next to nothing.

| variable | means |
|---|---|
| EVERSTEP_MONITOR | set by `everstep run`: where its rank monitor reads this process's heartbeats |
"""

import os
from collections.abc import Mapping


def monitor_paths(environ: Mapping[str, str] | None = None) -> tuple[str, str] | None:
    """The page that the agent's rank monitor reads, and where it is woken. None: there is no monitor."""
    page, comma, wake = (os.environ if environ is None else environ).get("EVERSTEP_MONITOR", "").partition(",")
    return (page, wake) if comma and page and wake else None
