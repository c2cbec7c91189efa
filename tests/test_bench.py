"""Every benchmark runs in a small configuration and prints what its documentation promises."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import proc
from tests.support.processes import Spawned, Spawner
from tests.support.waiting import wait_until

ROOT = Path(__file__).parent.parent
DEADLINE_S = 90.0

Run = Callable[..., dict[str, Any]]


def start(spawn: Spawner, script: str, *options: str) -> Spawned:
    return spawn([str(ROOT / script), *options, "--json"], env={"TORCH_CPP_LOG_LEVEL": "ERROR"})


@pytest.fixture
def run(spawn: Spawner) -> Run:
    def run(script: str, *options: str, deadline_s: float = DEADLINE_S) -> dict[str, Any]:
        process = start(spawn, script, *options)
        result: dict[str, Any] = json.loads(process.expect_line(lambda line: line.startswith("{"), deadline_s))
        assert process.wait() == 0, process.output()
        # multiprocessing's resource tracker ends when it has seen that its parent has
        wait_until(lambda: not proc.of_session(process.pid), 5.0)
        return result

    return run


def test_steady_state_pairs_plain_ddp_and_everstep(run: Run) -> None:
    rows = run("bench/steady_state.py", "--blocks", "2", "--steps", "5")["rows"]
    assert [row["parameters"] for row in rows] == ["1.2 k", "1 M"]
    assert all(len(row[key]) == 3 for row in rows for key in ("ddp", "everstep", "everstep_over_ddp", "everstep_ratio"))


@pytest.mark.soak
def test_recovery_splits_the_time_and_counts_what_was_lost(run: Run) -> None:
    (row,) = run("bench/recovery.py", "--kills", "1", "--groups", "3")["rows"]
    assert (row["groups"], row["kills"], row["lost"], row["moved"]) == (3, 1, 0, 0)
    times = [row[name][1] for name in ("seen", "notified", "granted", "reconfigured", "without_it")]
    assert times == sorted(times)


def test_lighthouse_times_a_failure_among_its_members(run: Run) -> None:
    found = run("bench/lighthouse.py", "--members", "20", "--failures", "2", "--quiet-s", "0.5")
    assert found["members"] == 20
    for key in ("failure_to_last_grant_ms", "notice_spread_ms", "last_ready_to_last_grant_ms"):
        assert len(found[key]) == 3
    assert found["heartbeat_cpu_percent"] >= 0


def test_rendezvous_times_a_join_and_a_loss(run: Run) -> None:
    found = run("bench/rendezvous.py", "--nodes", "4", "--times", "1", "--without-torch")
    assert found["nodes"] == 4
    assert [len(found["everstep"][key]) for key in ("join_ms", "loss_ms")] == [3, 3]


@pytest.mark.parametrize(
    ("what", "samples", "is_flat"),
    [
        ("fds", [24.0, 24, 25, 24, 24, 25, 25, 24], True),  # a transient one, however often
        ("fds", [24.0, 24, 24, 24, 24, 24, 25, 25], False),  # one more than before, for good
        ("fds", [24.0, 24, 25], None),
        ("rss_mib", [100.0, 100, 101, 101, 101, 101, 103, 103], True),
        ("rss_mib", [100.0, 100, 101, 101, 103, 103, 106, 106], False),
    ],
)
def test_the_soak_tells_a_leak_from_what_comes_and_goes(
    what: str, samples: list[float], is_flat: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    judge = importlib.import_module("soak").judge
    assert judge("survivor", what, [value for value in samples for _ in range(3)])["is_flat"] is is_flat


@pytest.mark.soak
def test_a_short_soak_reports_every_figure(run: Run) -> None:
    result = run("bench/soak.py", "--minutes", "0.1")
    assert [row["what"] for row in result["rows"]] == ["rss_mib", "fds", "threads"] * 2
    assert (result["lost"], result["why_lost"]) == (0, [])
    assert result["kills"] >= 1


@pytest.mark.soak
def test_a_kill_every_ten_seconds_costs_no_computed_step_and_less_than_a_twentieth_of_the_rate(run: Run) -> None:
    found = run("bench/goodput.py", deadline_s=600.0)
    assert (found["kills"], found["lost"], found["why_lost"]) == (18, 0, [])
    assert found["goodput"] >= 0.95


@pytest.mark.soak
def test_recovery_sweeps_over_the_phases_of_a_step(run: Run) -> None:
    rows = run("bench/recovery.py", "--kills", "1", "--groups", "3", "--sweep", deadline_s=180.0)["rows"]
    assert [row["point"] for row in rows] == [
        "forward",
        "backward",
        "reduction",
        "reduced",
        "vote",
        "optimizer",
        "stepped",
    ]
    assert not any(row["lost"] or row["moved"] for row in rows)


@pytest.mark.soak
def test_live_recovery_measures_transfers_beside_a_bare_socket(run: Run) -> None:
    found = run("bench/live_recovery.py", "--mib", "64", "--job-mib", "16", "--times", "1", deadline_s=300.0)
    ways = {"bare", "bare_tuned", "one", "donors", "one_again", "same_host", "group", "group_donors"}
    assert set(found["gb_s"]) == set(found["of_bare"]) == ways
    assert found["growth_mib"] < 64
    assert found["slow_reader"] > 0
    assert found["pause"]["fetch_ms"] > 0
    assert found["first_step"]["start_s"] > found["first_step"]["torch_s"] > 0


@pytest.mark.soak
def test_live_recovery_compares_many_donors_with_one_in_a_series(run: Run) -> None:
    found = run("bench/live_recovery.py", "--mib", "16", "--series", "3")
    for name in ("donors", "one_again"):
        mean, low, high = found[name]
        assert 0 < low <= mean <= high


@pytest.mark.soak
def test_failures_times_a_notice(run: Run) -> None:
    rows = run("bench/failures.py", "--times", "1", "--only", "notice")["rows"]
    assert list(rows) == ["notice to a subscriber, ms"]


def test_a_rival_that_is_not_installed_is_a_line_that_says_how_to_install_it(spawn: Spawner) -> None:
    process = start(spawn, "bench/recovery.py", "--kills", "0", "--groups", "3", "--with", "torchft")
    assert process.wait(DEADLINE_S) != 0
    assert "make bench-venv" in process.stderr_path.read_text()


def test_monitor_measures_beats_kills_and_a_node(run: Run) -> None:
    found = run("bench/monitor.py", "--blocks", "3", "--kills", "1", "--seconds", "0.5")
    assert all(len(found[key]) == 3 for key in ("heartbeat_us", "with_section_us", "deadline_to_exit_ms"))
    assert found["with_stacks"] == 1
    assert found["sections_counted"] > 0
