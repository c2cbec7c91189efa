"""Agents whose workers train with torch: replica groups through a kill, Gloo worlds started again and again."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from everstep.config import LighthouseSettings
from everstep.exit_codes import ExitCode
from everstep.lighthouse.app import Lighthouse
from tests.launcher.agents import QUIET, ROOT, script, start_agent, stderr_of
from tests.support import proc
from tests.support.processes import Spawned, Spawner
from tests.support.waiting import wait_until

START_S = 60.0  # importing torch, on a machine that does other things, too

PRINTS_ENVIRONMENT = r"""
import json, os, sys
sys.stdout.write("environment " + json.dumps(dict(os.environ)) + "\n")  # in one piece
"""
# What is another one each time, or only the agent's, or of the tests' own.
DIFFERS = {
    "TORCHELASTIC_RUN_ID",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_ERROR_FILE",
    "TMPDIR",
    "PYTHONPATH",
    *QUIET,
}


def test_workers_have_the_environment_that_torchrun_gives_them(spawn: Spawner, tmp_path: Path) -> None:
    source = script(tmp_path, PRINTS_ENVIRONMENT)
    arguments = ["--standalone", "--nproc-per-node", "2", "--role", "trainer", "--max-restarts", "2", source]
    environ = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    rival = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environ, text=True,
    )  # fmt: skip
    agent = start_agent(spawn, tmp_path, *arguments, OMP_NUM_THREADS="")
    mine = [agent.expect_line("environment", START_S) for _ in range(2)]
    assert agent.wait() == 0
    theirs = [line for line in rival.communicate(timeout=START_S)[0].splitlines() if line.startswith("environment")]
    for found, wanted in zip(_environments(mine), _environments(theirs), strict=True):
        ours = {name for name in found.keys() - wanted.keys() if not name.startswith("EVERSTEP_")}
        assert ours <= DIFFERS
        assert wanted.keys() - found.keys() <= DIFFERS
        same = wanted.keys() - DIFFERS
        assert {name: found[name] for name in same} == {name: wanted[name] for name in same}


def _environments(lines: list[str]) -> list[dict[str, str]]:
    found = [json.loads(line.partition(" ")[2]) for line in lines]
    for environment in found:
        environment.pop("OMP_NUM_THREADS", None)
    return sorted(found, key=lambda environment: int(environment["RANK"]))


WORLD = r"""
import os, signal, sys
import torch
import torch.distributed as dist
torch.set_num_threads(1)
dist.init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total)
restart = os.environ["TORCHELASTIC_RESTART_COUNT"]
sys.stdout.write(f"reduced {int(total)} restart {restart} rank {dist.get_rank()} {os.getpid()}\n")  # in one piece
if restart == sys.argv[1]:
    dist.barrier()
    dist.destroy_process_group()
    sys.exit(0)
signal.pause()
"""


class Footprint:
    """What an agent holds: descriptors, threads, memory in MB."""

    def __init__(self, pid: int) -> None:
        self.fds = len(os.listdir(f"/proc/{pid}/fd"))
        self.threads = len(os.listdir(f"/proc/{pid}/task"))
        status = Path(f"/proc/{pid}/status").read_text()
        self.memory_mb = int(status.partition("VmRSS:")[2].split()[0]) / 1024


def restart_again_and_again(spawn: Spawner, tmp_path: Path, count: int) -> tuple[Footprint, Footprint]:
    """Kill a worker of a Gloo world `count` times; the agent's footprint after the fifth part, and at the end."""
    agent = start_agent(
        spawn, tmp_path, "--standalone", "--nproc-per-node", "2", "--max-restarts", str(count),
        script(tmp_path, WORLD), str(count + 1),
    )  # fmt: skip
    footprints = []
    for restart in range(count + 1):
        pids = [int(agent.expect_line(f"reduced 2 restart {restart}", START_S).split()[-1]) for _ in range(2)]
        if restart in (max(1, count // 5), count):
            footprints.append(Footprint(agent.pid))
        if restart < count:
            os.kill(pids[restart % 2], signal.SIGKILL)
    agent.kill(signal.SIGTERM)
    assert agent.wait() == 92
    return footprints[0], footprints[1]


def test_a_gloo_world_is_started_again_and_again(spawn: Spawner, tmp_path: Path) -> None:
    before, after = restart_again_and_again(spawn, tmp_path, 4)
    assert after.threads <= before.threads
    assert after.fds <= before.fds


@pytest.mark.soak
def test_fifty_restarts_leave_nothing_behind_in_the_agent(spawn: Spawner, tmp_path: Path) -> None:
    before, after = restart_again_and_again(spawn, tmp_path, 50)
    assert (after.fds, after.threads) == (before.fds, before.threads)
    assert after.memory_mb - before.memory_mb < 10


@pytest.mark.soak
def test_survivors_of_a_killed_replica_group_never_stop(spawn: Spawner, tmp_path: Path) -> None:
    end = tmp_path / "end"
    agent = start_agent(
        spawn, tmp_path, "--standalone", "--replica-groups", "3", "--max-restarts", "2", "--log-dir",
        str(tmp_path / "logs"), str(ROOT / "tests" / "launcher" / "trainer.py"), str(end),
    )  # fmt: skip
    started: dict[str, int] = {}
    while len(started) < 3:
        _, group, _, pid = agent.expect_line("starts", START_S).split()
        started[group] = int(pid)
    agent.expect_line(lambda line: line.endswith("of 3"), START_S)
    os.kill(started["1"], signal.SIGKILL)
    line = agent.expect_line("starts", START_S)
    assert line.split()[:3] == ["starts", "1", "1"]
    back = agent.expect_line(lambda line: line.startswith("group 1 step") and line.endswith("of 3"), START_S)
    last = int(back.split()[3]) + 60
    (tmp_path / "written").write_text(str(last))
    (tmp_path / "written").rename(end)
    assert agent.wait(START_S) == 0
    lines = agent.stdout_path.read_text().splitlines()
    assert sum(line.startswith("starts") for line in lines) == 4
    assert {line for line in lines if "done" in line} == {f"group {group} done {last}" for group in "012"}


def template_of(agent: Spawned) -> proc.Stat:
    """It is older than what it forked; the workers in waiting have its command line."""
    found = [stat for stat in proc.descendants(agent.pid) if "template" in proc.command_line(stat.pid)]
    return min(found, key=lambda stat: (stat.started, stat.pid))


@pytest.mark.soak
def test_a_killed_template_is_replaced_and_workers_go_on(spawn: Spawner, tmp_path: Path) -> None:
    agent = start_agent(
        spawn, tmp_path, "--standalone", "--nproc-per-node", "2", "--max-restarts", "1", script(tmp_path, WORLD), "1"
    )
    pids = [int(agent.expect_line("reduced 2 restart 0", START_S).split()[-1]) for _ in range(2)]
    with contextlib.suppress(ProcessLookupError):
        os.kill(template_of(agent).pid, signal.SIGKILL)
    os.kill(pids[0], signal.SIGKILL)
    for _ in range(2):
        agent.expect_line("reduced 2 restart 1", START_S)
    assert agent.wait(START_S) == 0
    assert "another takes its place" in stderr_of(agent)


@pytest.mark.soak
def test_two_agents_train_a_world_of_two_nodes_through_the_loss_of_one(spawn: Spawner, tmp_path: Path) -> None:
    with Lighthouse.in_thread(LighthouseSettings(port=0)) as lighthouse:
        common = ("--lighthouse", lighthouse.address, "--rdzv-id", "job", "--nnodes", "2", "--nproc-per-node", "1",
                  script(tmp_path, WORLD), "1")  # fmt: skip
        first = start_agent(spawn, tmp_path, "--max-restarts", "1", *common)
        second = start_agent(spawn, tmp_path, "--max-restarts", "1", *common)
        first.expect_line("reduced 2", START_S)
        second.expect_line("reduced 2", START_S)
        second.kill(signal.SIGKILL)
        second.wait()
        third = start_agent(spawn, tmp_path, "--max-restarts", "1", *common)
        first.expect_line("reduced 2", START_S)
        worker = int(third.expect_line("reduced 2", START_S).split()[-1])
        os.kill(worker, signal.SIGKILL)
        first.expect_line("reduced 2 restart 1", START_S)
        third.expect_line("reduced 2 restart 1", START_S)
        assert first.wait(START_S) == 0
        assert third.wait(START_S) == 0


def test_the_one_command_of_the_readme_trains_two_groups_through_a_kill(spawn: Spawner, tmp_path: Path) -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    (command,) = [line for line in lines if line.startswith("everstep run --replica-groups 2")]
    arguments = command.removeprefix("everstep run ").replace("examples/", f"{ROOT}/examples/").split()
    agent = start_agent(spawn, tmp_path, *arguments)
    agent.expect_line("participants 2", START_S)
    workers = [stat.pid for stat in proc.descendants(agent.pid) if "train_ddp.py" in proc.command_line(stat.pid)]
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    # By the lighthouse's word: the script prints every 20 steps, which the group may be back before.
    for event in (r"granted .* members=1 ", r"adopted .* members=2 joined="):
        wait_until(lambda event=event: re.search(event, stderr_of(agent)) is not None, START_S)  # type: ignore[misc]
    agent.expect_line("participants 2", START_S)
    agent.kill(signal.SIGTERM)
    assert agent.wait(START_S) == ExitCode.DRAINED


def readme_commands() -> list[str]:
    """The torchrun lines of the README, with the variables before them."""
    text = (ROOT / "README.md").read_text()
    return [line for line in text.splitlines() if " torchrun --standalone " in line]


@pytest.mark.soak
def test_the_torchrun_commands_of_the_readme_run_unchanged(spawn: Spawner, tmp_path: Path) -> None:
    commands = readme_commands()
    assert len(commands) == 2
    with Lighthouse.in_thread(LighthouseSettings(port=0)) as lighthouse:
        agents = []
        for command in commands:
            variable, _, rest = command.partition(" torchrun ")
            name, _, value = variable.partition("=")
            arguments = rest.replace("examples/", f"{ROOT}/examples/").replace("20000", "200").split()
            environment: dict[str, Any] = {name: value, "EVERSTEP_LIGHTHOUSE": lighthouse.address}
            agents.append(start_agent(spawn, tmp_path, *arguments, NUM_REPLICA_GROUPS="2", **environment))
        for agent in agents:
            agent.expect_line("participants 2", START_S)
        for agent in agents:
            assert agent.wait(START_S) == 0


EATS = r"""
import os, sys
sys.stdout.write("begins " + os.environ["TORCHELASTIC_RESTART_COUNT"] + "\n")
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    held = []
    while True:
        held.append(bytearray(os.urandom(1 << 20)))
"""
LIMIT_BYTES = 400 << 20
IN_CGROUP = """
import os, sys
with open(sys.argv[1], "w") as file:
    file.write(str(os.getpid()))
os.execv(sys.executable, [sys.executable, "-u", "-m", "tests.launcher.agents", "0.001", *sys.argv[2:]])
"""


@pytest.fixture
def memory_cgroup() -> Iterator[Path]:
    """The file to write a pid to, of a cgroup with little memory; skips where none can be made."""
    mine = Path("/proc/self/cgroup").read_text().splitlines()
    v1 = next((line.split(":", 2)[2] for line in mine if ":memory:" in line), None)
    root = Path("/sys/fs/cgroup/memory" if v1 is not None else "/sys/fs/cgroup")
    folder = root / (v1 or "/").lstrip("/") / f"everstep-test-{os.getpid()}"
    limit = folder / ("memory.limit_in_bytes" if v1 is not None else "memory.max")
    try:
        folder.mkdir()
        limit.write_text(str(LIMIT_BYTES))
    except OSError as error:
        with contextlib.suppress(OSError):
            folder.rmdir()
        pytest.skip(f"no memory cgroup can be made here: {error}")
    yield folder / "cgroup.procs"
    wait_until(lambda: not (folder / "cgroup.procs").read_text(), 10)
    folder.rmdir()


@pytest.mark.soak
def test_a_worker_that_is_killed_for_its_memory_starts_again_and_the_cause_is_said(
    spawn: Spawner, tmp_path: Path, memory_cgroup: Path
) -> None:
    env = QUIET | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    arguments = ("--standalone", "--no-template", "--max-restarts", "1", script(tmp_path, EATS))
    agent = spawn(["-c", IN_CGROUP, str(memory_cgroup), *arguments], env=env)
    agent.expect_line("begins 1", START_S)
    assert agent.wait(START_S) == 0
    assert "out of memory" in stderr_of(agent)
