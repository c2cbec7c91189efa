"""An agent and its workers as real processes: every way in which a worker, or the agent itself, can end."""

import json
import os
import resource
import select
import signal
from pathlib import Path

import pytest

from everstep.config import LighthouseSettings
from everstep.lighthouse.app import Lighthouse
from tests.launcher.agents import script, start_agent, stderr_of
from tests.support.processes import Spawner

PLAIN = ("--standalone", "--no-template")
GONE_S = 1.0
TORCH_S = 60.0  # to import it, on a machine that does other things, too
DRAINED_S = 8.0  # less than what the agent waits for a thread

ENDS_IN_EVERY_WAY = """
import atexit, ctypes, os, signal, sys, threading
restart = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
print("begins", restart, flush=True)
def interrupt(thread):
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(ValueError))
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the test's runner has made of it
match restart:
    case 0: os.kill(os.getpid(), signal.SIGSEGV)
    case 1: os.abort()
    case 2: sys.exit(7)
    case 3: raise ValueError("of the user's")
    case 4: os.kill(os.getpid(), signal.SIGKILL)
    case 5: os.kill(os.getpid(), signal.SIGTERM)
    case 6: os.kill(os.getpid(), signal.SIGINT)
    case 7: atexit.register(os._exit, 8); sys.exit(0)
    case 8:
        threading.Thread(target=interrupt, args=(threading.get_ident(),)).start()
        while True: pass
print("done", flush=True)
"""


def test_whatever_a_worker_dies_of_it_starts_again_and_is_reported(spawn: Spawner, tmp_path: Path) -> None:
    agent = start_agent(spawn, tmp_path, *PLAIN, "--max-restarts", "9", script(tmp_path, ENDS_IN_EVERY_WAY))
    agent.expect_line("done")
    assert agent.wait() == 0
    said = [line for line in stderr_of(agent).splitlines() if line.startswith("restart why=")]
    codes_and_signals = ("signal 11 (SIGSEGV)", "signal 6 (SIGABRT)", "exit code 7", "exit code 1")
    others = ("signal 9 (SIGKILL)", "signal 15 (SIGTERM)", "signal 2 (SIGINT)", "exit code 8", "exit code 1")
    causes = (*codes_and_signals, *others)
    assert len(said) == len(causes)
    assert all(cause in line for cause, line in zip(causes, said, strict=True)), said


FAILS = """
import json, os, sys, time
rank = int(os.environ["RANK"])
if rank == 1:
    stack = {"py_callstack": "Traceback\\nValueError: the root cause", "timestamp": str(int(time.time()))}
    with open(os.environ["TORCHELASTIC_ERROR_FILE"], "w") as file:
        json.dump({"message": {"message": "ValueError: the root cause", "extraInfo": stack}}, file)
    sys.exit(3)
time.sleep(60)
"""


def test_the_table_at_the_end_names_the_root_cause(spawn: Spawner, tmp_path: Path) -> None:
    handed_on = tmp_path / "error.json"
    agent = start_agent(
        spawn,
        tmp_path,
        *PLAIN,
        "--nproc-per-node",
        "2",
        script(tmp_path, FAILS),
        TORCHELASTIC_ERROR_FILE=str(handed_on),
    )
    assert agent.wait() == 1
    others, _, cause = stderr_of(agent).partition("Root Cause (first observed failure):")
    assert "script.py FAILED" in others
    assert "exitcode  : -15" in others
    assert "rank      : 1 (local_rank: 1)" in cause
    assert "exitcode  : 3 (pid: " in cause
    assert "ValueError: the root cause" in cause
    assert json.loads(handed_on.read_text())["message"]["message"] == "ValueError: the root cause"


@pytest.mark.parametrize("code", [93, 90])
def test_a_worker_that_asks_not_to_be_started_again_is_not(spawn: Spawner, tmp_path: Path, code: int) -> None:
    agent = start_agent(
        spawn, tmp_path, *PLAIN, "--max-restarts", "5", script(tmp_path, f"import sys; print('x'); sys.exit({code})")
    )
    assert agent.wait() == code
    assert agent.stdout_path.read_text() == "x\n"


def test_a_program_that_does_not_exist_is_a_failure_that_says_so(spawn: Spawner, tmp_path: Path) -> None:
    agent = start_agent(spawn, tmp_path, "--standalone", "--no-python", "/does/not/exist")
    assert agent.wait() == 1
    assert "/does/not/exist" in stderr_of(agent)


WITH_CHILD = r"""
import os, signal, sys, time
child = os.fork()
if child == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)
    os._exit(0)
os.write(1, f"runs {os.environ['TORCHELASTIC_RESTART_COUNT']} {os.getpid()} {child}\n".encode())
if os.environ["TORCHELASTIC_RESTART_COUNT"] == sys.argv[1]:
    print("end", flush=True)
    time.sleep(60)
os.kill(os.getpid(), signal.SIGKILL)
"""


def wait_gone(pidfds: list[int], within_s: float) -> None:
    for pidfd in pidfds:
        assert select.select([pidfd], [], [], within_s)[0], "a process is still there"
        os.close(pidfd)


def test_the_children_of_a_dead_worker_end_with_it(spawn: Spawner, tmp_path: Path) -> None:
    agent = start_agent(spawn, tmp_path, *PLAIN, "--max-restarts", "1", script(tmp_path, WITH_CHILD), "1")
    child = int(agent.expect_line("runs 0").split()[3])
    agent.expect_line("runs 1")
    assert not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text()
    agent.expect_line("end")
    agent.kill(signal.SIGTERM)
    assert agent.wait() == 92


def test_an_agent_that_is_killed_takes_its_workers_and_their_children_with_it(spawn: Spawner, tmp_path: Path) -> None:
    agent = start_agent(spawn, tmp_path, *PLAIN, "--nproc-per-node", "2", script(tmp_path, WITH_CHILD), "0")
    lines = [agent.expect_line("runs 0") for _ in range(2)]
    pidfds = [os.pidfd_open(int(pid)) for line in lines for pid in line.split()[2:]]
    agent.kill(signal.SIGKILL)
    wait_gone(pidfds, GONE_S)
    agent.wait()


DRAINS = """
import os, signal, sys, time
def drain(number, _):
    print("told", number, flush=True)
    if sys.argv[1] == "obeys":
        sys.exit(0)
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, drain)
print("ready", flush=True)
while True:
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_the_node(spawn: Spawner, tmp_path: Path, number: int) -> None:
    agent = start_agent(spawn, tmp_path, *PLAIN, script(tmp_path, DRAINS), "obeys")
    agent.expect_line("ready")
    agent.kill(number)
    agent.expect_line(f"told {number}")
    assert agent.wait() == 92


LOADS_FOR_EVER = """
import os, signal
os.write(1, b"loads\\n")
signal.pause()
"""


@pytest.mark.soak
def test_a_node_whose_template_still_loads_joins_no_round_and_drains_at_once(spawn: Spawner, tmp_path: Path) -> None:
    script(tmp_path, LOADS_FOR_EVER, "loads_for_ever.py")
    source = script(tmp_path, "")
    agent = start_agent(spawn, tmp_path, "--replica-groups", "2", "--preload", "loads_for_ever", source)
    agent.expect_line("loads", TORCH_S)
    agent.kill(signal.SIGTERM)
    assert agent.wait(DRAINED_S) == 92
    assert "round" not in stderr_of(agent)


def test_a_second_signal_kills_workers_that_do_not_obey(spawn: Spawner, tmp_path: Path) -> None:
    agent = start_agent(spawn, tmp_path, *PLAIN, script(tmp_path, DRAINS), "ignores")
    agent.expect_line("ready")
    agent.kill(signal.SIGTERM)
    agent.expect_line("told")
    agent.kill(signal.SIGTERM)
    assert agent.wait() == 128 + signal.SIGTERM


def test_workers_that_do_not_obey_are_killed_after_the_shutdown_timeout(spawn: Spawner, tmp_path: Path) -> None:
    agent = start_agent(spawn, tmp_path, *PLAIN, "--shutdown-timeout", "1", script(tmp_path, DRAINS), "ignores")
    agent.expect_line("ready")
    agent.kill(signal.SIGTERM)
    assert agent.wait() == 92


WRITES_MUCH = """
import sys
for number in range(300):
    print("x" * 1000)
    print("e" * 1000, file=sys.stderr)
print("all written", flush=True)
"""


def test_a_full_disk_under_the_log_directory_does_not_stop_training(tmp_path: Path, spawn: Spawner) -> None:
    arguments = [*PLAIN, "--log-dir", str(tmp_path / "logs"), "--redirects", "2", "--tee", "1"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # What a write meets on a full disk, for this process's children only.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        agent = start_agent(spawn, tmp_path, *arguments, script(tmp_path, WRITES_MUCH))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    agent.expect_line("[default0]:all written")
    assert agent.wait() == 0
    assert stderr_of(agent).count("log file given up, training goes on") == 2


TALKS = r"""
import os, sys
os.write(1, f"out {os.environ['RANK']}\n".encode())
os.write(2, f"err {os.environ['RANK']}\n".encode())
sys.stdout.write("no newline")
"""


def test_streams_go_where_redirects_and_tee_say(spawn: Spawner, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    agent = start_agent(
        spawn, tmp_path, *PLAIN, "--nproc-per-node", "3", "--rdzv-id", "job", "--log-dir", str(logs),
        "--redirects", "0:3,1:2", "--tee", "1:1", "--role", "trainer", script(tmp_path, TALKS),
    )  # fmt: skip
    assert agent.wait() == 0
    (run,) = logs.iterdir()
    assert run.name.startswith("job_")
    found = {str(path.relative_to(run)): path.read_text() for path in run.rglob("*.log")}
    assert found == {
        "attempt_0/0/stdout.log": "out 0\nno newline",
        "attempt_0/0/stderr.log": "err 0\n",
        "attempt_0/1/stdout.log": "out 1\nno newline",
        "attempt_0/1/stderr.log": "err 1\n",
    }
    shown = agent.stdout_path.read_text()
    assert "[trainer1]:out 1\n" in shown
    assert "[trainer1]:no newline\n" in shown
    assert "out 0" not in shown
    assert "out 2" in shown
    assert "err 2" in stderr_of(agent)
    assert "err 0" not in stderr_of(agent)


WAITS = "import os, time; print('runs', os.environ['REPLICA_GROUP_ID'], os.getpid(), flush=True); time.sleep(60)"


def test_a_second_agent_with_the_same_node_id_is_refused(spawn: Spawner, tmp_path: Path) -> None:
    source = script(tmp_path, WAITS)
    with Lighthouse.in_thread(LighthouseSettings(port=0)) as lighthouse:
        arguments = ("--no-template", "--lighthouse", lighthouse.address, "--rdzv-id", "job", "--nnodes", "1:2",
                     "--rdzv-conf", "node_id=same,last_call_timeout=0", source)  # fmt: skip
        first = start_agent(spawn, tmp_path, *arguments, REPLICA_GROUP_ID="0")
        first.expect_line("runs")
        second = start_agent(spawn, tmp_path, *arguments, REPLICA_GROUP_ID="0")
        assert second.wait() == 90
        assert "node id same belongs to another live process" in stderr_of(second)
        first.kill(signal.SIGTERM)
        assert first.wait() == 92


LEAVES_AND_STAYS = r"""
import os, signal, sys, time
group, restart = os.environ["REPLICA_GROUP_ID"], os.environ["TORCHELASTIC_RESTART_COUNT"]
os.write(1, f"runs {group} {restart} {os.environ['WORLD_SIZE']}\n".encode())
if group == "1" and restart == "0":
    os.kill(os.getpid(), signal.SIGKILL)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
time.sleep(60)
"""


def test_only_the_replica_group_that_failed_starts_again(spawn: Spawner, tmp_path: Path) -> None:
    agent = start_agent(
        spawn, tmp_path, *PLAIN, "--replica-groups", "3", "--max-restarts", "1", script(tmp_path, LEAVES_AND_STAYS)
    )
    started = sorted(agent.expect_line("runs") for _ in range(4))
    assert started == ["runs 0 0 1", "runs 1 0 1", "runs 1 1 1", "runs 2 0 1"]
    agent.kill(signal.SIGTERM)
    assert agent.wait() == 92


NODE = """
import os, sys, time
print("node", os.environ["GROUP_RANK"], "of", os.environ["GROUP_WORLD_SIZE"], "restart",
      os.environ["TORCHELASTIC_RESTART_COUNT"], "ranks", os.environ["RANK"], os.environ["WORLD_SIZE"], flush=True)
sys.stdin.close()
while not os.path.exists(sys.argv[1]):
    time.sleep(0.02)
if sys.argv[2:] == ["fails"]:
    sys.exit(9)
"""


def test_two_agents_meet_lose_one_and_end_together(spawn: Spawner, tmp_path: Path) -> None:
    source, end = script(tmp_path, NODE), tmp_path / "end"
    with Lighthouse.in_thread(LighthouseSettings(port=0)) as lighthouse:
        common = ("--no-template", "--lighthouse", lighthouse.address, "--rdzv-id", "job", "--nnodes", "1:2",
                  "--nproc-per-node", "1", "--rdzv-conf", "last_call_timeout=60")  # fmt: skip
        first = start_agent(spawn, tmp_path, *common, source, str(end))
        second = start_agent(spawn, tmp_path, *common, source, str(end))
        assert {first.expect_line("node"), second.expect_line("node")} == {
            "node 0 of 2 restart 0 ranks 0 2",
            "node 1 of 2 restart 0 ranks 1 2",
        }
        second.kill(signal.SIGKILL)
        assert first.expect_line("node") == "node 0 of 1 restart 0 ranks 0 1"
        second.wait()
        third = start_agent(spawn, tmp_path, *common, source, str(end))
        assert first.expect_line("node") == "node 0 of 2 restart 0 ranks 0 2"
        third.expect_line("node 1 of 2")
        end.touch()
        assert first.wait() == 0
        assert third.wait() == 0


def test_a_node_that_gives_up_ends_the_others_with_its_code(spawn: Spawner, tmp_path: Path) -> None:
    source, end, never = script(tmp_path, NODE), tmp_path / "end", tmp_path / "never"
    with Lighthouse.in_thread(LighthouseSettings(port=0)) as lighthouse:
        common = ("--no-template", "--lighthouse", lighthouse.address, "--rdzv-id", "job", "--nnodes", "2")
        first = start_agent(spawn, tmp_path, *common, source, str(never))
        second = start_agent(spawn, tmp_path, *common, source, str(end), "fails")
        first.expect_line("node")
        second.expect_line("node")
        end.touch()
        assert second.wait() == 1
        assert first.wait() == 1
        assert "exit code 9" in stderr_of(first)


def test_agent_and_workers_go_on_without_the_lighthouse(spawn: Spawner, tmp_path: Path) -> None:
    source, end = script(tmp_path, NODE), tmp_path / "end"
    with Lighthouse.in_thread(LighthouseSettings(port=0)) as lighthouse:
        port = int(lighthouse.address.rpartition(":")[2])
        agent = start_agent(
            spawn, tmp_path, "--no-template", "--lighthouse", lighthouse.address, "--rdzv-id", "job",
            "--max-restarts", "1", source, str(end), "fails",
        )  # fmt: skip
        agent.expect_line("node 0 of 1 restart 0")
    assert agent.is_alive()
    end.touch()  # the worker fails while there is no lighthouse
    with Lighthouse.in_thread(LighthouseSettings(port=port)):
        agent.expect_line("node 0 of 1 restart 1")
        assert agent.wait() == 93


def test_a_port_that_is_taken_is_said_at_once(spawn: Spawner, tmp_path: Path) -> None:
    with Lighthouse.in_thread(LighthouseSettings(port=0)) as lighthouse:
        agent = start_agent(
            spawn, tmp_path, "--no-template", "--nnodes", "2", "--node-rank", "0", "--master-addr", "127.0.0.1",
            "--master-port", lighthouse.address.rpartition(":")[2], script(tmp_path, "pass"),
        )  # fmt: skip
        assert agent.wait() == 90
        assert "is in use" in stderr_of(agent)
