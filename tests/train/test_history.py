"""The checker of recorded histories finds what it is there for."""

from multiprocessing import get_context
from typing import Any

import pytest

from everstep.core.events import EventKind, JobEvent
from tests.train.history import violations
from tests.train.job import Running
from tests.train.scripts import Plan


def member(group: int, steps: list[dict[str, Any]], logs: list[str] | None = None) -> Running:
    ours, theirs = get_context("forkserver").Pipe()
    ours.close()
    theirs.close()
    process: Any = None
    return Running(Plan(group=group, groups=2, lighthouse=""), process, ours, steps, logs or [])


def step(number: int, **changed: Any) -> dict[str, Any]:
    report = {
        "committed": True,
        "step": number,
        "lineage": f"h:{number}",
        "digest": f"d{number}",
        "positions": [number],
    }
    return report | changed


GOOD = [step(1), step(2), step(3)]


def other(**changed: Any) -> list[dict[str, Any]]:
    return [step(1, positions=[11]), step(2, **{"positions": [12], **changed}), step(3, positions=[13])]


def test_a_good_history_has_no_violation() -> None:
    logs = [
        "switched in quorum=1.1 members=2",
        "settled quorum=1.1 rank=0 step=0 members=0#1,1#2",
        "granted round=1/1 quorum=1.2",
    ]
    assert violations([member(0, GOOD, logs), member(1, other(), logs)], []) == []


@pytest.mark.parametrize(
    ("which", "steps", "logs"),
    [
        ("I1", other(lineage="h:2'"), []),
        ("I2", other(digest="d2'"), []),
        ("I3", [step(1, positions=[11]), step(1, positions=[12])], []),
        ("I3", [step(1, positions=[11]), step(3, positions=[12])], []),
        ("I4", other(positions=[2]), []),
        ("I4", other(positions=[3]), []),
        ("I5", other(), ["granted round=1/1 quorum=1.2 members=1", "adopted quorum=1.2 members=2"]),
        ("I5", other(), ["settled quorum=1.1 rank=0 step=0 members=0#1,1#3"]),
    ],
)
def test_a_bad_history_is_found(which: str, steps: list[dict[str, Any]], logs: list[str]) -> None:
    good = member(0, GOOD, ["settled quorum=1.1 rank=0 step=0 members=0#1,1#2"])
    found = violations([good, member(1, steps, logs)], [])
    assert [line[:2] for line in found] == [which], found


def test_a_failure_without_evidence_is_found() -> None:
    event = JobEvent(kind=EventKind.MEMBER_FAILED, replica_id="1", quorum_id="1.1")
    assert [line[:2] for line in violations([], [event])] == ["I8"]
