"""Checks the folder that a recorded run left behind.

*.jsonl in histories/   one file a process (history.py)
faults.jsonl            what was done to the job: kind, members (as `replica#incarnation`)
lighthouse*.log         its log, as JSON lines
replay.jsonl            the reference run's digests: step, digest, lineage
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.checkers.history import Failure, History, Record, load, violations


def check(folder: Path) -> tuple[list[str], str]:
    """The violations, and what was looked at, for people."""
    histories = [load(path) for path in sorted((folder / "histories").glob("*.jsonl")) if path.stat().st_size]
    faults = read(folder / "faults.jsonl")
    failures = list(failures_in(folder))
    killed = [member for fault in faults if fault["kind"] in ("kill", "double kill") for member in fault["members"]]
    found = violations(histories, failures, killed)
    replayed = read(folder / "replay.jsonl")
    found += replay_violations(histories, replayed)
    steps = max((record["step"] for history in histories for record in history.committed), default=0)
    if not steps:
        found.append("I7 no step was committed at all")
    looked_at = (
        f"{len(histories)} processes, {len(faults)} faults, {steps} steps, {len(replayed)} of them replayed, "
        f"{len(failures)} failures told"
    )
    return found, looked_at


def replay_violations(histories: list[History], replayed: list[Record]) -> list[str]:
    """Without any fault, the same memberships and samples lead to the same bits, step by step."""
    reference = {record["step"]: record for record in replayed}
    committed = [record for history in histories for record in history.committed]
    missing = sorted({record["step"] for record in committed if record["step"] not in reference})
    found = [f"I2 {len(missing)} steps were not replayed: {missing[0]} to {missing[-1]}"] if missing else []
    for what in ("digest", "lineage"):
        others = [r for r in committed if r["step"] in reference and r[what] != reference[r["step"]][what]]
        if others:
            first = min(record["step"] for record in others)
            found.append(f"I2 the reference run has another {what} from step {first} on, {len(others)} times in all")
    return found


def failures_in(folder: Path) -> Iterator[Failure]:
    for path in sorted(folder.glob("lighthouse*.log")):
        for line in read(path):
            if line.get("event") == "member suspected":
                yield Failure(member=line["member"], cause=line["cause"], evidence=line["detail"])


def read(path: Path) -> list[Record]:
    """JSON lines; what is killed may leave half of one at the end."""
    *lines, _half = path.read_text().split("\n")
    return [json.loads(line) for line in lines]


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        print("usage: python -m tests.checkers FOLDER", file=sys.stderr)
        return 2
    found, looked_at = check(Path(arguments[0]))
    for line in found:
        print(line)
    print(f"{looked_at}: {len(found)} violations" if found else f"{looked_at}: no violation")
    return 1 if found else 0
