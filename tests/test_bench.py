"""Every benchmark runs in a small configuration and prints what its documentation promises."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
DEADLINE_S = 120.0


def run(*command: str) -> dict[str, Any]:
    environment = os.environ | {"TORCH_CPP_LOG_LEVEL": "ERROR"}
    done = subprocess.run(
        [sys.executable, *command, "--json"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_steady_state_pairs_plain_ddp_and_everstep() -> None:
    rows = run("bench/steady_state.py", "--blocks", "2", "--steps", "5")["rows"]
    assert [row["parameters"] for row in rows] == ["1.2 k", "1 M"]
    assert all(len(row[key]) == 3 for row in rows for key in ("ddp", "everstep", "everstep_over_ddp"))


def test_recovery_splits_the_time_and_counts_what_was_lost() -> None:
    (row,) = run("bench/recovery.py", "--kills", "1", "--groups", "3")["rows"]
    assert (row["groups"], row["kills"], row["lost"], row["moved"]) == (3, 1, 0, 0)
    times = [row[name][1] for name in ("seen", "notified", "granted", "reconfigured", "without_it")]
    assert times == sorted(times)


@pytest.mark.soak
def test_recovery_sweeps_over_the_phases_of_a_step() -> None:
    rows = run("bench/recovery.py", "--kills", "1", "--groups", "3", "--sweep")["rows"]
    assert [row["point"] for row in rows] == ["forward", "backward", "reduction", "reduced", "vote", "optimizer"]
    assert not any(row["lost"] or row["moved"] for row in rows)


def test_failures_times_a_notice() -> None:
    rows = run("bench/failures.py", "--times", "1", "--only", "notice")["rows"]
    assert list(rows) == ["notice to a subscriber, ms"]


def test_a_rival_that_is_not_installed_is_a_line_that_says_how_to_install_it() -> None:
    command = [sys.executable, "bench/recovery.py", "--kills", "0", "--groups", "3", "--with", "torchft"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode != 0
    assert "make bench-venv" in done.stderr
