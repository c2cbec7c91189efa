"""A history that breaks nothing, for tests to doctor."""

from typing import Any

from everstep.core.types import genesis
from tests.checkers.history import History, entry_of

MEMBERS = ("0#1", "1#2")


def recorded(steps: int = 4) -> list[History]:
    """Two groups that commit these steps together; in step 2 the first try was aborted."""
    records: list[list[dict[str, Any]]] = [
        [
            {"event": "start", "group": member[0], "number": number},
            {"event": "log", "text": "switched in quorum=1.1 members=2"},
            {"event": "log", "text": f"settled quorum=1.1 rank={number} step=0 members=0#1,1#2"},
        ]
        for number, member in enumerate(MEMBERS)
    ]
    lineage = genesis("h")
    for step in range(1, steps + 1):
        attempt = int(step == 2)
        entry = {"step": step, "attempt": attempt, "quorum": "1.1", "contributors": 2, "samples": f"{step:02x}"}
        lineage = lineage.extended(entry_of(entry))
        for number, member in enumerate(MEMBERS):
            positions = [2 * (step - 1) + number]
            for tried in range(attempt + 1):
                draw = {"event": "draw", "member": member, "step": step, "attempt": tried, "positions": [*positions]}
                records[number].append(draw)
            commit = {"event": "step", "committed": True, "step": step, "positions": positions, "entry": entry}
            commit |= {"lineage": f"h:{step}:{lineage.digest.hex()}", "digest": f"d{step}"}
            records[number].append(commit)
    return [History(member[0], number, records[number]) for number, member in enumerate(MEMBERS)]


def step_of(history: History, step: int) -> dict[str, Any]:
    return next(record for record in history.committed if record["step"] == step)
