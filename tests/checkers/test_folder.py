"""`python -m tests.checkers FOLDER`, as it is run after a rain of faults: a process of its own."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.checkers.folder import check
from tests.checkers.good import recorded, step_of
from tests.checkers.history import History
from tests.support.processes import Spawner

FAULTS = [{"kind": "kill", "members": ["1#2"]}, {"kind": "stop", "members": ["0#1"]}]
TOLD = [{"event": "member suspected", "member": "1#2", "cause": "link-closed", "detail": "the link closed"}]


def write(folder: Path, histories: list[History], **changed: list[dict[str, Any]]) -> None:
    reference = [{"step": r["step"], "digest": r["digest"], "lineage": r["lineage"]} for r in histories[0].committed]
    (folder / "histories").mkdir()
    for history in histories:
        put(folder / "histories" / f"{history.number}.jsonl", history.records)
    put(folder / "faults.jsonl", changed.get("faults", FAULTS))
    put(folder / "lighthouse0.log", changed.get("told", TOLD))
    put(folder / "replay.jsonl", changed.get("replay", reference))


def put(path: Path, records: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_a_good_folder_is_exit_0_and_says_what_was_looked_at(spawn: Spawner, tmp_path: Path) -> None:
    write(tmp_path, recorded())
    process = spawn(["-m", "tests.checkers", str(tmp_path)])
    line = process.read_line()
    assert process.wait() == 0, process.output()
    assert line == "2 processes, 2 faults, 4 steps, 4 of them replayed, 1 failures told: no violation"


def test_a_bad_folder_is_exit_1_and_a_line_for_each_violation(spawn: Spawner, tmp_path: Path) -> None:
    histories = recorded()
    step_of(histories[1], 2)["digest"] = "another"
    write(tmp_path, histories)
    process = spawn(["-m", "tests.checkers", str(tmp_path)])
    lines = [process.read_line() for _ in range(3)]
    assert process.wait() == 1
    assert lines[0].startswith("I2 2 different states")
    assert lines[1] == "I2 the reference run has another digest from step 2 on, 1 times in all"
    assert lines[2].endswith("2 violations")


@pytest.mark.parametrize("what", ["digest", "lineage"])
def test_a_reference_run_that_comes_to_something_else_is_found(tmp_path: Path, what: str) -> None:
    histories = recorded()
    reference = [{"step": r["step"], "digest": r["digest"], "lineage": r["lineage"]} for r in histories[0].committed]
    reference[2][what] = "another"
    write(tmp_path, histories, replay=reference)
    assert check(tmp_path)[0] == [f"I2 the reference run has another {what} from step 3 on, 2 times in all"]


def test_a_step_that_was_not_replayed_is_found(tmp_path: Path) -> None:
    write(tmp_path, recorded(), replay=[])
    assert check(tmp_path)[0] == ["I2 4 steps were not replayed: 1 to 4"]


def test_a_kill_of_which_the_lighthouse_never_spoke_is_found(tmp_path: Path) -> None:
    write(tmp_path, recorded(), told=[])
    assert check(tmp_path)[0] == ["I8 1#2 was killed, and nobody said so"]


def test_a_run_without_a_single_step_is_found(tmp_path: Path) -> None:
    write(tmp_path, recorded(0), replay=[])
    assert check(tmp_path)[0] == ["I7 no step was committed at all"]


def test_half_a_line_at_the_end_of_a_killed_process_is_passed_over(tmp_path: Path) -> None:
    write(tmp_path, recorded())
    with (tmp_path / "histories" / "1.jsonl").open("a") as file:
        file.write('{"event": "st')
    assert check(tmp_path)[0] == []


def test_the_checker_imports_nothing_of_what_it_judges(spawn: Spawner) -> None:
    """Neither the training side nor torch: it knows the histories alone."""
    source = "import sys; import tests.checkers.folder; print([m for m in sys.modules if m.startswith(('torch', "
    process = spawn(["-c", source + "'everstep.train', 'everstep.collectives'))])"])
    assert process.read_line() == "[]"
    assert process.wait() == 0
