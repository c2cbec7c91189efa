"""Every end of a worker is seen at once, with its cause, and nothing of the worker is left."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from everstep.launcher.death_watch import is_dying
from everstep.launcher.oom import OomKills, find_counter
from everstep.launcher.starting import ExitStatus, RunAs, Starter
from everstep.launcher.template_client import TemplateStarter
from tests.launcher.workers import Scripts, Worker, nothing_left
from tests.support import proc
from tests.support.processes import Spawner
from tests.support.waiting import wait_until

GONE_S = 1.0
HOLDS_MEMORY = """
import signal, sys
memory = bytearray(int(sys.argv[1]))
memory[:: 4096] = bytes([1]) * (len(memory) // 4096)
print("up")
signal.pause()
"""
FORKS = """
import os, signal, subprocess
def say(pid):
    os.write(1, b"%d\\n" % pid)
if os.fork() == 0:
    if os.fork() == 0:
        say(os.getpid())
        signal.pause()
    say(os.getpid())
    signal.pause()
say(subprocess.Popen(["sleep", "1000"]).pid)
subprocess.Popen(["sh", "-c", "sleep 1000 & echo $!; wait"])
signal.pause()
"""


def test_a_death_is_told_before_the_memory_is_freed(torch_template: TemplateStarter, scripts: Scripts) -> None:
    _check_death_with_memory(torch_template, scripts, 1 << 30)


@pytest.mark.soak
def test_a_death_is_told_before_4_gb_are_freed(torch_template: TemplateStarter, scripts: Scripts) -> None:
    _check_death_with_memory(torch_template, scripts, 4 << 30)


def _check_death_with_memory(starter: Starter, scripts: Scripts, size: int) -> None:
    took_s = []
    for _ in range(3):
        with Worker(starter, scripts.script(HOLDS_MEMORY, str(size))) as worker:
            assert worker.read_line() == "up"
            killed_at = time.monotonic()
            os.kill(worker.pid, signal.SIGKILL)
            death = worker.deaths.get(timeout=GONE_S)
            assert worker.wait().signal == signal.SIGKILL
            assert death.seen_by == "mutex"
            assert worker.deaths.empty()
            took_s.append(death.at - killed_at)
    print(f"deaths of {size >> 30} GB told after {[round(took * 1000, 2) for took in took_s]} ms")
    assert min(took_s) < 0.02, took_s  # each, where there is a processor to run on


def test_what_a_worker_started_ends_with_it(starter: Starter, scripts: Scripts) -> None:
    with nothing_left():
        with Worker(starter, scripts.script(FORKS)) as worker:
            children = [int(worker.read_line()) for _ in range(4)]
            assert all(proc.is_alive(pid) for pid in children)
            os.kill(worker.pid, signal.SIGKILL)
            wait_until(lambda: not any(map(proc.is_alive, children)), GONE_S)
            worker.wait()
        wait_until(lambda: not any(proc.stat_of(pid) for pid in children), what="zombies are reaped")


def test_shared_memory_of_a_killed_worker_is_removed(starter: Starter, scripts: Scripts) -> None:
    text = """
import signal
from multiprocessing import shared_memory
memory = shared_memory.SharedMemory(create=True, size=4096)
print(memory.name)
signal.pause()
"""
    with Worker(starter, scripts.script(text)) as worker:
        file = Path("/dev/shm") / worker.read_line()
        assert file.exists()
        os.kill(worker.pid, signal.SIGKILL)
        worker.wait()
        wait_until(lambda: not file.exists(), what="the resource tracker has lived to remove it")


def test_orphans_in_sessions_of_their_own_are_reaped_where_the_agent_adopts_them(
    spawn: Spawner, tmp_path: Path
) -> None:
    text = """
import os, subprocess
os.write(1, b"daemon %d\\n" % subprocess.Popen(["cat", "fifo"], start_new_session=True).pid)
"""
    (tmp_path / "script.py").write_text(text)
    os.mkfifo(tmp_path / "fifo")
    agent = spawn(["-m", "tests.launcher.agent", "template", str(tmp_path / "script.py"), "1"])
    orphan = int(agent.expect_line("daemon").split()[1])
    agent.expect_line("exit code 0")
    wait_until(lambda: _parent(orphan) == agent.pid)
    with open(tmp_path / "fifo", "w"):
        pass
    wait_until(lambda: not proc.is_alive(orphan))
    agent.kill(signal.SIGUSR1)
    wait_until(lambda: proc.stat_of(orphan) is None)
    agent.kill()
    agent.wait()


def _parent(pid: int) -> int:
    stat = proc.stat_of(pid)
    return stat.parent if stat else 0


def test_an_exec_is_no_death(starter: Starter, scripts: Scripts) -> None:
    text = "import os\nprint('up', flush=True)\nos.execvp('sh', ['sh', '-c', 'echo sh; read x < fifo; exit 6'])"
    os.mkfifo(scripts.folder / "fifo")
    with Worker(starter, scripts.script(text)) as worker:
        assert [worker.read_line(), worker.read_line()] == ["up", "sh"]
        wait_until(lambda: f"everstep-death-{worker.pid}" not in {thread.name for thread in threading.enumerate()})
        assert worker.deaths.empty()
        with open(scripts.folder / "fifo", "w"):
            pass
        assert worker.wait() == ExitStatus(code=6)
        assert worker.deaths.get().seen_by == "pidfd"


def test_the_end_of_the_main_thread_alone_is_no_death(starter: Starter, scripts: Scripts) -> None:
    text = """
import ctypes, os, threading
def other():
    while open("/proc/self/stat").read().rpartition(")")[2].split()[0] != "Z":
        pass
    print("the leader is a zombie")
    open("fifo").read()
    os._exit(8)
threading.Thread(target=other, daemon=True).start()
ctypes.CDLL(None).syscall(60 if os.uname().machine == "x86_64" else 93, 0)
"""
    os.mkfifo(scripts.folder / "fifo")
    with Worker(starter, scripts.script(text)) as worker:
        assert worker.read_line() == "the leader is a zombie"
        assert not is_dying(worker.pid)
        assert worker.deaths.empty()
        with open(scripts.folder / "fifo", "w"):
            pass
        assert worker.wait() == ExitStatus(code=8)


@pytest.mark.parametrize(
    ("end", "status"),
    [
        ("import ctypes\nctypes.string_at(0)", ExitStatus(signal=signal.SIGSEGV)),
        ("import os\nos.abort()", ExitStatus(signal=signal.SIGABRT)),
        ("import os\nos.kill(os.getpid(), 9)", ExitStatus(signal=signal.SIGKILL)),
        ("import sys\nsys.exit(5)", ExitStatus(code=5)),
        ("1 / 0", ExitStatus(code=1)),
    ],
    ids=["segfault", "abort", "kill", "exit", "exception"],
)
def test_every_end_is_told_once_and_then_with_its_status(
    end: str, status: ExitStatus, starter: Starter, scripts: Scripts
) -> None:
    with Worker(starter, scripts.script(end)) as worker:
        assert worker.wait() == status
        worker.deaths.get(timeout=GONE_S)  # by either: with so little memory, it is a race between the two
        assert worker.deaths.empty()
        assert worker.exits.empty()
        assert worker.process.pidfd == -1


def test_a_stopped_worker_is_in_state_t(starter: Starter, scripts: Scripts) -> None:
    with Worker(starter, scripts.launch(RunAs.COMMAND, "sleep", "1000")) as worker:
        worker.process.signal_group(signal.SIGSTOP)
        wait_until(lambda: worker.process.state() == "T")
        worker.process.signal_group(signal.SIGKILL)
        assert worker.wait() == ExitStatus(signal=signal.SIGKILL)


def test_only_kills_that_the_kernel_counted_are_for_want_of_memory(tmp_path: Path) -> None:
    counter = tmp_path / "memory.events"
    counter.write_text("oom 1\noom_kill 3\n")
    kills = OomKills(str(counter))
    assert not kills.explains(is_killed=True)
    counter.write_text("oom 1\noom_kill 5\n")
    assert [kills.explains(is_killed=True) for _ in range(3)] == [True, True, False]
    counter.write_text("oom 1\noom_kill 6\n")
    assert not kills.explains(is_killed=False)
    assert not kills.explains(is_killed=True), "that one killed something else, a DataLoader worker, say"


def test_the_counter_is_found_in_either_hierarchy_and_in_containers(tmp_path: Path) -> None:
    for folder, name in [("v2/job/step", "memory.events"), ("v2", "memory.events"), ("v1/job", "memory.oom_control")]:
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / name).write_text("oom_kill 0\n")
    v2 = f"30 23 0:26 / {tmp_path}/v2 rw - cgroup2 cgroup2 rw\n"
    v1 = f"31 23 0:27 / {tmp_path}/v1 rw - cgroup cgroup rw,memory\n32 23 0:28 / /cpu rw - cgroup cgroup rw,cpu\n"
    assert find_counter("0::/job/step\n", v2) == f"{tmp_path}/v2/job/step/memory.events"
    assert find_counter("0::/../other\n", v2) == f"{tmp_path}/v2/memory.events"
    assert find_counter("9:cpu:/x\n4:memory:/job\n0::/\n", v1) == f"{tmp_path}/v1/job/memory.oom_control"
    contained = v1.replace("0:27 /", "0:27 /docker/1")
    assert find_counter("4:memory:/docker/1/job\n", contained) == f"{tmp_path}/v1/job/memory.oom_control"
    assert find_counter("4:memory:/elsewhere\n", "") is None
