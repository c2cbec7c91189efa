"""The template: replaced when it dies, done without when it cannot work, and nothing of it is left."""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from everstep.launcher.death_watch import Surroundings
from everstep.launcher.starting import ExitStatus, RunAs
from everstep.launcher.store_host import host_store
from everstep.launcher.template_client import TemplateSettings, TemplateStarter
from everstep.launcher.template_fit import differing_variables
from tests.launcher.workers import DEADLINE_S, Scripts, Worker, environment, nothing_left
from tests.support import proc
from tests.support.processes import Spawner
from tests.support.waiting import wait_until

AGENT_GONE_S = 1.0
UP = "import signal\nprint('up')\nsignal.pause()"
LOADER = """
import os, signal, threading, multiprocessing
def child():
    os.write(1, b"%d\\n" % os.getpid())
    signal.pause()
processes = [multiprocessing.get_context("fork").Process(target=child) for _ in range(2)]
for process in processes:
    process.start()
signal.pause()
"""


@pytest.fixture
def own_template() -> Iterator[TemplateStarter]:
    """One that a test may kill; imports nothing."""
    settings = TemplateSettings(environment=environment(), search_path=os.getcwd(), preload=(), spares=0)
    with TemplateStarter(settings, Surroundings()) as starter:
        assert starter.wait_ready(DEADLINE_S)
        yield starter


def test_a_killed_template_is_replaced_and_its_workers_go_on(own_template: TemplateStarter, scripts: Scripts) -> None:
    launch = scripts.script(UP)
    with Worker(own_template, launch) as before:
        assert before.read_line() == "up"
        killed = own_template.template_pid
        os.kill(killed, signal.SIGKILL)
        with Worker(own_template, launch) as after:
            assert after.read_line() == "up"
            assert own_template.template_pid not in (0, killed)
            assert before.deaths.empty()
            assert not own_template.is_plain


def test_a_template_that_a_signal_stopped_is_replaced_at_once(own_template: TemplateStarter, scripts: Scripts) -> None:
    stopped = own_template.template_pid
    os.kill(stopped, signal.SIGSTOP)
    begun = time.monotonic()
    with Worker(own_template, scripts.script(UP)) as worker:
        assert worker.read_line() == "up"
    assert time.monotonic() - begun < DEADLINE_S / 2
    assert own_template.template_pid not in (0, stopped)


@pytest.mark.soak
def test_a_spare_that_a_signal_stopped_is_not_waited_for(scripts: Scripts) -> None:
    settings = TemplateSettings(environment=environment(), search_path=os.getcwd(), preload=(), spares=1)
    with nothing_left(), TemplateStarter(settings, Surroundings()) as starter:
        assert starter.wait_ready(DEADLINE_S)
        wait_until(lambda: starter.spare_pids)
        (spare,) = starter.spare_pids
        os.kill(spare, signal.SIGSTOP)
        begun = time.monotonic()
        with Worker(starter, scripts.script(UP)) as worker:
            assert worker.read_line() == "up"
            assert worker.pid != spare
        assert time.monotonic() - begun < DEADLINE_S / 2
        wait_until(lambda: not proc.is_alive(spare))


def test_a_start_that_a_templates_death_interrupts_is_retried_and_starts_one_worker(
    own_template: TemplateStarter, scripts: Scripts
) -> None:
    stopped = own_template.template_pid
    os.kill(stopped, signal.SIGSTOP)
    wait_until(lambda: own_template.template_pid and _state(stopped) == "T")
    workers: list[Worker] = []
    thread = threading.Thread(target=lambda: workers.append(Worker(own_template, scripts.script(UP))))
    with nothing_left():
        thread.start()
        # The order lies in the socket of a process that will never read it.
        wait_until(lambda: len(os.listdir("/proc/self/task")) > 1 and _sends_await_a_report())
        os.kill(stopped, signal.SIGKILL)
        thread.join(DEADLINE_S)
        (worker,) = workers
        with worker:
            assert worker.read_line() == "up"
            titles = [proc.command_line(stat.pid) for stat in proc.descendants(os.getpid())]
            assert sum("script.py" in title for title in titles) == 1


def _state(pid: int) -> str:
    stat = proc.stat_of(pid)
    return stat.state if stat else ""


def _sends_await_a_report() -> bool:
    """Whether a thread of this process is in `Handshake.await_report`."""
    return any(frame.f_code.co_name == "_receive" for frame in sys._current_frames().values())


def test_spares_are_used_and_replaced_and_leave_with_the_starter(scripts: Scripts) -> None:
    settings = TemplateSettings(environment=environment(), search_path=os.getcwd(), preload=(), spares=2)
    with nothing_left():
        with TemplateStarter(settings, Surroundings()) as starter:
            assert starter.wait_ready(DEADLINE_S)
            wait_until(lambda: len(starter.spare_pids) == 2)
            dies, is_used = starter.spare_pids
            os.kill(dies, signal.SIGKILL)  # while it waits: no worker's failure
            with Worker(starter, scripts.script(UP)) as worker:
                assert worker.read_line() == "up"
                assert worker.pid == is_used
            wait_until(lambda: len({*starter.spare_pids} - {dies, is_used}) == 2)
            left = starter.spare_pids
        wait_until(lambda: not any(proc.stat_of(pid) for pid in left))


def test_a_preload_that_runs_a_parallel_operation_is_found_out_by_the_canary(
    tmp_path: Path, scripts: Scripts, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "runs_in_parallel.py").write_text(
        "import torch\ntorch.set_num_threads(2)\nassert torch.ones(1 << 20).sum() > 0\n"
    )
    settings = TemplateSettings(
        environment=environment(), search_path=str(tmp_path), preload=("runs_in_parallel",), canary_s=3
    )
    with caplog.at_level(logging.WARNING, "everstep"), TemplateStarter(settings, Surroundings()) as starter:
        with Worker(starter, scripts.script("print('started', __name__)")) as worker:
            assert worker.read_line() == "started __main__"
            assert worker.wait().is_clean
        with Worker(starter, scripts.script("print('again')")) as worker:
            assert worker.read_line() == "again"
        assert starter.is_plain
        assert starter.template_pid == 0
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1, said
    assert "after preloading runs_in_parallel, a parallel operation in a forked process hangs" in said[0]


def test_a_preload_that_fails_is_named_and_workers_are_plain(
    tmp_path: Path, scripts: Scripts, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "fails.py").write_text("raise OSError('no licence')")
    settings = TemplateSettings(environment=environment(), search_path=str(tmp_path), preload=("fails",))
    with caplog.at_level(logging.WARNING, "everstep"), TemplateStarter(settings, Surroundings()) as starter:
        with Worker(starter, scripts.script("print('started')")) as worker:
            assert worker.read_line() == "started"
    assert "importing fails failed in it: OSError: no licence" in caplog.text


def test_a_variable_that_is_read_at_the_start_makes_a_worker_plain(
    light_template: TemplateStarter, scripts: Scripts, caplog: pytest.LogCaptureFixture
) -> None:
    text = "import os, sys\nprint(os.environ.get('OMP_NUM_THREADS'), sys.flags.optimize)"
    with caplog.at_level(logging.WARNING, "everstep"):
        for _ in range(2):
            with Worker(light_template, scripts.script(text, OMP_NUM_THREADS="3", PYTHONOPTIMIZE="1")) as worker:
                assert worker.read_line() == "3 1"
    assert [r.getMessage().split(" differ")[0] for r in caplog.records] == [
        "a worker's OMP_NUM_THREADS, PYTHONOPTIMIZE"
    ]
    assert differing_variables({"LANG": "C", "RANK": "0"}, {"RANK": "1", "TORCH_NCCL_X": "1"}) == {"LANG"}


@pytest.mark.parametrize("way", ["template", "plain"])
def test_the_agents_death_ends_its_workers_and_their_forked_children(way: str, spawn: Spawner, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(LOADER)
    agent = spawn(["-m", "tests.launcher.agent", way, str(tmp_path / "script.py"), "2"])
    numbers: list[int] = []
    lines = 0
    while lines < 3 or len(numbers) < (7 if way == "template" else 6):
        words = agent.read_line().split()
        numbers += [int(word) for word in words if word.isdigit()]
        lines += 1
    os.kill(agent.pid, signal.SIGKILL)
    killed_at = time.monotonic()
    wait_until(lambda: not any(map(proc.is_alive, numbers)), AGENT_GONE_S)
    print(f"all {len(numbers)} gone {time.monotonic() - killed_at:.3f} s after the agent's death")


def test_a_store_is_hosted_and_ends_when_told(torch_template: TemplateStarter, scripts: Scripts) -> None:
    ends: list[ExitStatus] = []
    with nothing_left():
        store = host_store(torch_template, "127.0.0.1", environment(), ends.append)
        client = (
            "import sys\nfrom torch.distributed import TCPStore\n"
            "s = TCPStore(sys.argv[1], int(sys.argv[2]), is_master=False)\ns.set('a', 'b')\nprint(s.get('a'))"
        )
        with Worker(torch_template, scripts.script(client, *map(str, store.address))) as worker:
            assert worker.read_line() == "b'b'"
        store.close()
        assert not proc.is_alive(store.pid)
    assert ends == []


def test_a_store_that_dies_uncalled_for_is_told(torch_template: TemplateStarter) -> None:
    ended = threading.Event()
    store = host_store(torch_template, "127.0.0.1", environment(), lambda _: ended.set())
    os.kill(store.pid, signal.SIGKILL)
    assert ended.wait(DEADLINE_S)


@pytest.mark.soak
def test_fifty_starts_leave_nothing_behind(light_template: TemplateStarter, scripts: Scripts) -> None:
    launch = scripts.launch(RunAs.SCRIPT, "script.py")
    scripts.script("")
    template = light_template.template_pid
    with nothing_left():
        fds = set(os.listdir(f"/proc/{template}/fd"))
        for _ in range(50):
            with Worker(light_template, launch) as worker:
                assert worker.wait().is_clean
        assert set(os.listdir(f"/proc/{template}/fd")) == fds
    wait_until(lambda: not [s for s in proc.every_process() if s.parent == template])
    assert light_template.template_pid == template


def test_several_threads_may_start_workers_at_once(light_template: TemplateStarter, scripts: Scripts) -> None:
    launch = scripts.script(UP)
    workers: list[Worker] = []
    threads = [threading.Thread(target=lambda: workers.append(Worker(light_template, launch))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert len({worker.pid for worker in workers}) == 8
    for worker in workers:
        with worker:
            assert worker.read_line() == "up"
