"""The checker of recorded histories finds what it is there for: each invariant has histories that must fail."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

from tests.checkers.good import recorded, step_of
from tests.checkers.history import Failure, History, violations


def test_a_good_history_has_no_violation() -> None:
    assert violations(recorded(), []) == []


def test_what_a_killed_member_put_into_a_step_counts_though_it_never_saw_the_commit() -> None:
    good = recorded()
    del good[1].records[-1]
    assert violations(good, []) == []


def change_step(at: int, **changed: Any) -> Callable[[list[History]], None]:
    return lambda histories: step_of(histories[1], at).update(changed)


def change_entry(at: int, **changed: Any) -> Callable[[list[History]], None]:
    """On every member: they agree, but not with the lineage, or not with what was drawn."""

    def change(histories: list[History]) -> None:
        for history in histories:
            step_of(history, at)["entry"] = step_of(history, at)["entry"] | changed

    return change


def add_logs(*lines: str) -> Callable[[list[History]], None]:
    return lambda histories: histories[1].records.extend({"event": "log", "text": line} for line in lines)


def draw(step: int, **changed: Any) -> Callable[[list[History]], None]:
    return lambda histories: [r for r in histories[1].of("draw") if r["step"] == step][-1].update(changed)


def drop(*steps: int, of: tuple[int, ...] = (0, 1)) -> Callable[[list[History]], None]:
    def change(histories: list[History]) -> None:
        for index in of:
            kept = [r for r in histories[index].records if not (r["event"] == "step" and r["step"] in steps)]
            histories[index].records[:] = kept

    return change


def commit_again_after_a_restart(histories: list[History]) -> None:
    last = copy.deepcopy(histories[1].records[-1])
    histories.append(History("1", 2, [{"event": "start", "group": "1", "number": 2}, last]))


def commit_twice(histories: list[History]) -> None:
    histories[1].records.append(histories[1].records[-1])


def grow(histories: list[History]) -> None:
    """Positions that no later step makes up for."""
    for step in (3, 4):
        for history in histories:
            for record in history.of("draw"):
                if record["step"] == step:
                    record["positions"] = [position + 6 for position in record["positions"]]


DOCTORED = [
    ("I1", change_step(2, lineage=f"h:2:{'00' * 16}")),
    ("I1", change_entry(3, samples="77")),
    ("I1", change_entry(3, attempt=5)),
    ("I1", change_entry(3, step=4)),
    ("I2", change_step(2, digest="d2'")),
    ("I3", drop(3, of=(1,))),
    ("I3", drop(3)),
    ("I3", commit_twice),
    ("I3", commit_again_after_a_restart),
    ("I4", draw(2, positions=[0])),
    ("I4", draw(3, positions=[4])),
    ("I4", draw(3, attempt=1)),
    ("I4", draw(3, member="1#1")),
    ("I4", change_entry(3, contributors=1)),
    ("I4", grow),
    ("I5", add_logs("granted round=1/1 quorum=1.2 members=1", "adopted quorum=1.2 members=2")),
    ("I5", add_logs("granted round=1/1 quorum=2.1 members=1", "adopted quorum=1.9 members=2")),
    ("I5", add_logs("settled quorum=1.1 rank=0 step=0 members=0#1,1#3")),
    ("I5", change_entry(3, quorum="0.9")),
]


@pytest.mark.parametrize(("which", "doctor"), DOCTORED)
def test_a_bad_history_is_found(which: str, doctor: Callable[[list[History]], None]) -> None:
    histories = recorded()
    doctor(histories)
    assert which in [line[:2] for line in violations(histories, [])]


def test_a_sample_that_counts_twice_is_found_without_draws() -> None:
    histories = recorded()
    for history in histories:
        for record in history.committed:
            record["entry"] = None
            record["positions"] = [7]
    assert {line[:2] for line in violations(histories, [])} == {"I4"}


def test_a_jump_is_legal_after_an_eviction_once() -> None:
    histories = recorded(5)
    drop(2, of=(1,))(histories)
    add_logs("evicted member=1#2 why=silent")(histories)
    assert violations(histories, []) == []
    drop(4, of=(1,))(histories)
    assert [line[:2] for line in violations(histories, [])] == ["I3"]


@pytest.mark.parametrize("missing", ["member", "cause", "evidence"])
def test_a_failure_without_evidence_is_found(missing: str) -> None:
    told = {"member": "1#2", "cause": "silent", "evidence": "nothing heard for 2 s", missing: ""}
    assert [line[:2] for line in violations([], [Failure(**told)])] == ["I8"]


def test_a_killed_member_of_which_nobody_spoke_is_found() -> None:
    told = Failure(member="1#2", cause="silent", evidence="nothing heard for 2 s")
    assert violations([], [told], ["1#2"]) == []
    assert [line[:2] for line in violations([], [told], ["1#2", "0#1"])] == ["I8"]
