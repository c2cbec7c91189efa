"""`everstep demo` as a process: what it reports, and that it ends everything it has started, whatever ends it."""

import json
import os
import re
import signal
from pathlib import Path

import pytest

from tests.support import proc
from tests.support.processes import Spawned, Spawner
from tests.support.waiting import wait_until

ROOT = Path(__file__).parent.parent
DEADLINE_S = 90.0  # on a machine that does other things, too
END_S = 20.0
# Of a job that has nothing to do with the demo.
FOREIGN = {
    "EVERSTEP_LIGHTHOUSE": "127.0.0.1:1",
    "PET_NNODES": "4",
    "REPLICA_GROUP_ID": "mine",
    "EVERSTEP_JOB_ID": "mine",
}


def start_demo(spawn: Spawner, folder: Path, *arguments: str) -> Spawned:
    env = FOREIGN | {"PYTHONPATH": str(ROOT / "src"), "TMPDIR": str(folder), "COLUMNS": "200"}
    return spawn(["-m", "everstep.cli", "demo", *arguments], env=env)


def test_the_demo_kills_a_group_that_its_agent_brings_back_and_counts_what_that_cost(
    spawn: Spawner, tmp_path: Path
) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    demo = start_demo(spawn, temporary, "--json", "--seed", "7")
    found = json.loads(demo.expect_line(lambda line: line.startswith("{"), DEADLINE_S))
    assert demo.wait(END_S) == 0, demo.output()
    assert found["groups"] == 3
    assert found["replicas_identical"]
    assert found["recovered_bytes"] > 1e6
    assert 0 < found["recovery_s"] < found["rejoin_s"]
    assert [donor.partition("#")[0] for donor in found["recovery_donors"]] == ["0", "1"]
    assert found["steps_lost"] == 0
    assert 0 < found["survivor_pause_s"] < found["restart_s"] + found["rejoin_s"]
    assert found["loss_last"] < found["loss_first"]
    assert sorted(found["ledger"]) == ["0", "1", "2"]
    assert found["ledger"]["2"]["absent_s"] > found["ledger"]["0"]["absent_s"]
    told = demo.stderr_path.read_text()
    assert re.search(r"\$ everstep run --replica-groups 3 --max-restarts 1 -m everstep\.demo\.worker\n", told)
    assert re.search(r"SIGKILL to group 2 after step 4\d\n", told)
    assert re.search(r"live state over: 3\.\d MB in \d+ ms \(\d+ MB/s\) from groups 0 and 1, by (memory|http)\n", told)
    assert list(temporary.iterdir()) == []


@pytest.mark.soak
def test_a_ctrl_c_ends_the_demo_and_all_that_it_has_started(spawn: Spawner, tmp_path: Path) -> None:
    demo = start_demo(spawn, tmp_path)
    demo.expect_line("training, 3 groups", DEADLINE_S)
    job = proc.descendants(demo.pid)
    assert len(job) >= 5  # the agent, the template, three workers
    demo.kill(signal.SIGINT)
    assert demo.wait(END_S) == 130
    wait_until(lambda: not any(proc.is_same_alive(process) for process in job), END_S)


@pytest.mark.soak
def test_a_demo_that_is_killed_takes_its_job_with_it(spawn: Spawner, tmp_path: Path) -> None:
    demo = start_demo(spawn, tmp_path)
    demo.expect_line("training, 3 groups", DEADLINE_S)
    job = proc.descendants(demo.pid)
    demo.kill(signal.SIGKILL)
    demo.wait()
    wait_until(lambda: not any(proc.is_same_alive(process) for process in job), END_S)


@pytest.mark.soak
def test_the_death_of_a_worker_that_the_demo_did_not_kill_is_a_failure_that_shows_the_log(
    spawn: Spawner, tmp_path: Path
) -> None:
    demo = start_demo(spawn, tmp_path)
    demo.expect_line("training, 3 groups", DEADLINE_S)
    job = proc.descendants(demo.pid)
    worker = next(process.pid for process in job if "everstep.demo.worker" in proc.command_line(process.pid))
    os.kill(worker, signal.SIGKILL)
    assert demo.wait(END_S) == 1
    told = demo.stderr_path.read_text()
    assert re.search(r"everstep: group \d ended; the end of the job's log:\n", told)
    assert "settled" in told
    wait_until(lambda: not any(proc.is_same_alive(process) for process in job), END_S)
