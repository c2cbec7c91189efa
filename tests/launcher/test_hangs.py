"""Workers that hang under a real agent: found, shown, ended, started again."""

import ast
import re
from pathlib import Path

import pytest

import everstep as es
from everstep.config import LighthouseSettings
from everstep.core.events import EventKind
from everstep.lighthouse.app import Lighthouse
from everstep.link.operate import admit_node, job_status
from everstep.subscribe import line, target
from tests.launcher.agents import ROOT, script, start_agent, stderr_of
from tests.support.processes import Spawner

PLAIN = ("--standalone", "--no-template")

HANGS_ONCE = """
import os, threading
import everstep as es
restart, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
def stuck_layer():
    threading.Event().wait()
with es.section("step"):
    if restart == 0 and rank == 1:
        stuck_layer()
print("done", restart, rank, flush=True)
"""


def test_a_rank_that_hangs_shows_its_stacks_and_is_started_again(spawn: Spawner, tmp_path: Path) -> None:
    """And the job's events say so."""
    with Lighthouse.in_thread(LighthouseSettings(port=0)) as lighthouse:
        meet = ("--no-template", "--lighthouse", lighthouse.address, "--rdzv-id", "job", "--nproc-per-node", "2")
        limits = ("--max-restarts", "1", "--ft-rank-section-timeouts", "step:1")
        agent = start_agent(spawn, tmp_path, *meet, *limits, script(tmp_path, HANGS_ONCE))
        agent.expect_line("done 1")
        agent.expect_line("done 1")
        assert agent.wait() == 0
        with es.subscribe_events(
            lighthouse=lighthouse.address, job_id="job", after="oldest", follow=False, connect_timeout_s=5.0
        ) as subscription:
            events = list(subscription)
    suspected, hung = (e for e in events if e.kind in (EventKind.RANK_SUSPECTED, EventKind.RANK_HUNG))
    assert (suspected.kind, suspected.rank, suspected.section) == (EventKind.RANK_SUSPECTED, "rank 1", "step")
    assert (hung.kind, hung.rank, hung.section) == (EventKind.RANK_HUNG, "rank 1", "step")
    assert 1.0 <= hung.age_s < 4.0
    assert "in stuck_layer" in hung.stacks
    assert "rank 1  (section 'step' open for" in line(hung)
    said = stderr_of(agent)
    assert "rank 1 hangs, and is ended by signal 9: section 'step' open for" in said
    assert "in stuck_layer" in said


def test_a_hang_in_an_import_is_found_with_its_stacks(spawn: Spawner, tmp_path: Path) -> None:
    script(tmp_path, "import threading\nthreading.Event().wait()\n", "stuck_module.py")
    path = script(tmp_path, "import stuck_module")
    agent = start_agent(spawn, tmp_path, *PLAIN, "--ft-initial-rank-heartbeat-timeout", "1.5", path)
    assert agent.wait() == 1
    said = stderr_of(agent)
    assert "no heartbeat and no section" in said
    assert 'stuck_module.py", line 2 in <module>' in said


def test_the_report_of_a_hang_is_in_the_ranks_own_log(spawn: Spawner, tmp_path: Path) -> None:
    arguments = (*PLAIN, "--max-restarts", "1", "--ft-rank-section-timeouts", "step:1", "--log-dir", str(tmp_path))
    source = HANGS_ONCE.replace("rank == 1", "rank == 0")
    agent = start_agent(spawn, tmp_path, *arguments, "--redirects", "3", script(tmp_path, source))
    assert agent.wait() == 0
    (log,) = tmp_path.glob("*/attempt_0/0/stderr.log")
    assert "rank 0 hangs" in log.read_text()
    assert "in stuck_layer" in log.read_text()


ASKS = """
import threading
from everstep.monitor import RankMonitorClient, WorkloadAction, WorkloadControlRequest
client = RankMonitorClient()
client.init_workload_monitoring()
client.send_workload_control_request(WorkloadControlRequest(WorkloadAction.{action}, "a broken GPU"))
threading.Event().wait({wait})
"""


@pytest.mark.parametrize(("action", "code"), [("ShutdownWorkload", 93), ("ExcludeThisNode", 92), ("Continue", 0)])
def test_a_script_may_ask_its_launcher(spawn: Spawner, tmp_path: Path, action: str, code: int) -> None:
    source = ASKS.format(action=action, wait="0.1" if action == "Continue" else "")
    agent = start_agent(spawn, tmp_path, *PLAIN, "--max-restarts", "3", script(tmp_path, source))
    assert agent.wait() == code
    assert f"rank 0 asks for {action}: a broken GPU" in stderr_of(agent)


def test_an_excluded_node_is_turned_away_until_the_operator_admits_it(spawn: Spawner, tmp_path: Path) -> None:
    with Lighthouse.in_thread(LighthouseSettings(port=0)) as lighthouse:
        meet = ("--no-template", "--lighthouse", lighthouse.address, "--rdzv-id", "job")
        asks = script(tmp_path, ASKS.format(action="ExcludeThisNode", wait=""))
        assert start_agent(spawn, tmp_path, *meet, asks).wait() == 92
        where = target(lighthouse=lighthouse.address, job_id="job")
        ((node, reason),) = job_status(where)["excluded_nodes"].items()
        assert "a broken GPU" in reason
        path = script(tmp_path, "print('runs', flush=True)")
        again = start_agent(spawn, tmp_path, *meet, path)
        assert again.wait() == 92
        assert f"`everstep nodes admit {node}`" in stderr_of(again)
        admit_node(where, node)
        with pytest.raises(es.ConfigError, match="is not excluded; excluded are: none"):
            admit_node(where, node)
        admitted = start_agent(spawn, tmp_path, *meet, path)
        admitted.expect_line("runs")
        assert admitted.wait() == 0


DIES_AT_ONE_STEP = """
import os, struct, sys
with open(os.environ["EVERSTEP_STEPS_FILE"], "r+b") as file:
    file.write(struct.pack("<QQ", 1, 7))  # as a Manager does
print("died", flush=True)
sys.exit(3)
"""


def test_workers_that_die_at_one_step_again_and_again_are_given_up(spawn: Spawner, tmp_path: Path) -> None:
    arguments = (*PLAIN, "--max-restarts", "50", "--ft-max-no-progress-cycles", "2")
    agent = start_agent(spawn, tmp_path, *arguments, script(tmp_path, DIES_AT_ONE_STEP))
    assert agent.wait() == 93
    assert agent.stdout_path.read_text().count("died") == 3
    assert "2 attempts in a row ended without passing step 7" in stderr_of(agent)


@pytest.mark.soak
def test_a_worker_forked_from_the_template_is_watched_too(spawn: Spawner, tmp_path: Path) -> None:
    arguments = ("--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "--ft-rank-section-timeouts", "step:1")
    agent = start_agent(spawn, tmp_path, *arguments, script(tmp_path, HANGS_ONCE))
    assert agent.wait(60.0) == 0
    assert "in stuck_layer" in stderr_of(agent)


LEARNS_FROM_THE_OTHER = """
import os, threading
import everstep as es
restart, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
if rank == 0:
    for _ in range(30):
        with es.section("save"):
            threading.Event().wait(0.02)
    es.heartbeat()
    threading.Event().wait(None if restart == 0 else 0)
with es.section("save"):  # its first one ever
    if restart == 0:
        threading.Event().wait()
print("done", restart, rank, flush=True)
"""


@pytest.mark.soak
def test_a_rank_has_the_limits_that_ranks_of_another_node_have_learned(spawn: Spawner, tmp_path: Path) -> None:
    with Lighthouse.in_thread(LighthouseSettings(port=0)) as lighthouse:
        meet = ("--no-template", "--lighthouse", lighthouse.address, "--rdzv-id", "job", "--nnodes", "2")
        floors = ("--ft-learned-timeout-floor", "1", "--ft-learned-mixed-timeout-floor", "2")
        arguments = (*meet, *floors, "--ft-stopped-timeout", "5", "--max-restarts", "1")
        path = script(tmp_path, LEARNS_FROM_THE_OTHER)
        agents = [start_agent(spawn, tmp_path, *arguments, "--local-addr", f"127.0.0.{n}", path) for n in (1, 2)]
        for agent in agents:
            agent.expect_line("done 1")
            assert agent.wait() == 0
    said = "".join(map(stderr_of, agents))
    assert "rank 1 hangs, and is ended by signal 9: section 'save' open for" in said
    assert "(limit 2.0 s)" in said


FAILS_AGAIN_WHILE_IT_RESTARTS = """
import os, signal, sys, threading
import everstep as es
restart, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
if restart == 1 and rank == 0:
    if {again!r} == "hang":
        threading.Event().wait()  # before its first sign
    os.kill(os.getpid(), signal.SIGKILL)
if restart == 0 and rank == 0:
    signal.signal(signal.SIGTERM, lambda number, frame: threading.Event().wait())  # it does not go when it is asked to
with es.section("step"):
    if restart == 0 or (restart == 1 and {again!r} == "hang"):
        threading.Event().wait()
print("done", restart, rank, flush=True)
"""


@pytest.mark.parametrize("again", [pytest.param("hang", marks=pytest.mark.soak), "kill"])
def test_a_second_failure_during_the_restart_after_a_hang_is_one_more_restart(
    spawn: Spawner, tmp_path: Path, again: str
) -> None:
    limits = ("--ft-rank-section-timeouts", "step:1", "--ft-initial-rank-heartbeat-timeout", "2")
    arguments = (*PLAIN, "--nproc-per-node", "2", "--max-restarts", "2", "--shutdown-timeout", "1", *limits)
    source = FAILS_AGAIN_WHILE_IT_RESTARTS.format(again=again)
    agent = start_agent(spawn, tmp_path, *arguments, script(tmp_path, source))
    agent.expect_line("done 2")
    agent.expect_line("done 2")
    assert agent.wait() == 0


def test_what_a_script_leaves_in_atexit_is_how_its_rank_ended(spawn: Spawner, tmp_path: Path) -> None:
    agent = start_agent(spawn, tmp_path, *PLAIN, script(tmp_path, "import atexit, os\natexit.register(os._exit, 7)\n"))
    assert agent.wait() == 1
    assert "exitcode  : 7" in stderr_of(agent) or "exit code 7" in stderr_of(agent)


HANGS_IN_EVERY_WAY = """
import atexit, ctypes, multiprocessing, os, signal, threading, time
import everstep as es
restart = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
forever = threading.Event().wait
def sleeps_in_handler(number, frame): time.sleep(1000)
def sleeps_at_exit(): time.sleep(1000)
def loads_batches(): forever()
def holds_the_gil(): ctypes.PyDLL(None).sleep(1000)
es.heartbeat()
with es.section("step"):
    match restart:
        case 0: os.kill(os.getpid(), signal.SIGSTOP)
        case 1: holds_the_gil()
        case 2: signal.signal(signal.SIGTERM, sleeps_in_handler); os.kill(os.getpid(), signal.SIGTERM)
        case 3:
            child = multiprocessing.get_context("fork").Process(target=loads_batches)
            child.start()
            child.join()
        case 4: atexit.register(sleeps_at_exit)
if restart == 5: print("done", flush=True)
"""


@pytest.mark.soak
def test_whatever_a_worker_hangs_in_it_is_shown_ended_and_started_again(spawn: Spawner, tmp_path: Path) -> None:
    limits = ("--ft-rank-section-timeouts", "step:1", "--ft-stopped-timeout", "1", "--ft-rank-heartbeat-timeout", "2")
    path = script(tmp_path, HANGS_IN_EVERY_WAY)
    agent = start_agent(spawn, tmp_path, *PLAIN, "--max-restarts", "5", *limits, path)
    agent.expect_line("done", 60.0)
    assert agent.wait() == 0
    said = stderr_of(agent)
    reports = [line for line in said.splitlines() if line.startswith("everstep: rank 0 hangs: ")]
    assert len(reports) == 5
    assert all("section 'step' open for" in report for report in reports[1:4]), reports
    assert "stopped by a signal" in reports[0] or "section 'step' open for" in reports[0]
    assert "no heartbeat for" in reports[4]
    for function in ("holds_the_gil", "sleeps_in_handler", "loads_batches", "sleeps_at_exit"):
        assert f"in {function}" in said


DATA = """
import os, threading, torch
torch.set_num_threads(1)
class Model(torch.nn.Linear):
    steps = 0
    def forward(self, batch):
        self.steps += 1
        if self.steps == 25 and (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
            stuck_layer()
        return super().forward(batch)
def stuck_layer():
    threading.Event().wait()
def build_model():
    return Model(8, 8)
def batches():
    return [torch.ones(4, 8) for _ in range(40)]
"""


def documented(kind: str, number: int, changed: int = 0) -> str:
    """A block of docs/hangs.md, changed."""
    blocks = re.findall(rf"```{kind}\n(.*?)```", (ROOT / "docs/hangs.md").read_text(), flags=re.DOTALL)
    lines = blocks[number].splitlines()
    assert sum(line.startswith("+") for line in lines) == changed
    return "\n".join(line[1:] if changed else line for line in lines if not line.startswith("-"))


def documented_script() -> str:
    return documented("diff", 0, changed=8)


def test_the_documented_script_is_changed_in_eight_lines_and_is_one() -> None:
    ast.parse(documented_script())


@pytest.mark.soak
def test_the_documented_script_is_hang_proof_without_a_setting(spawn: Spawner, tmp_path: Path) -> None:
    script(tmp_path, DATA, "data.py")
    arguments = ("--standalone", "--nproc-per-node", "2", "--max-restarts", "1")
    agent = start_agent(spawn, tmp_path, *arguments, script(tmp_path, documented_script(), "train.py"))
    assert agent.wait(180.0) == 0
    assert agent.stdout_path.read_text().count("is done") == 2
    said = stderr_of(agent)
    assert "(limit 1" in said
    assert "it waits for rank 1, which is where the trouble is" in said or "the others wait for rank 1" in said
    assert "in stuck_layer" in said


@pytest.mark.soak
def test_an_ft_launcher_script_runs_after_renaming_the_command_and_the_import(spawn: Spawner, tmp_path: Path) -> None:
    script(tmp_path, DATA, "data.py")
    script(tmp_path, documented("diff", 2, changed=1), "train.py")
    script(tmp_path, documented("yaml", 0), "cfg.yaml")
    command, *arguments = documented("diff", 1, changed=1).replace("\\\n", " ").split()
    assert (command, arguments.pop(0)) == ("everstep", "run")
    words = [str(tmp_path / word) if word in ("cfg.yaml", "train.py", "ckpt.pt") else word for word in arguments]
    agent = start_agent(spawn, tmp_path, *words)
    assert agent.wait(240.0) == 0
    assert agent.stdout_path.read_text().count("is done") == 2
    said = stderr_of(agent)
    assert "in stuck_layer" in said
    limits = [float(limit) for limit in re.findall(r"hangs: section 'step' open for .* \(limit ([0-9.]+) s\)", said)]
    assert limits
    assert limits[0] < 60.0, "it was calculated from the steps, not the one that is given"
