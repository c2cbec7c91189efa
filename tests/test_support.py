"""The test support catches what it is there to catch: a fixture that cannot fail proves nothing."""

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker, shared_memory
from pathlib import Path

import pytest

from tests.support import proc
from tests.support.leaks import LeakWatch
from tests.support.processes import Spawner
from tests.support.waiting import wait_until, wait_until_async

FOREVER = "import signal; print('up'); signal.pause()"
WITH_CHILD = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "{FOREVER}"], stdout=subprocess.DEVNULL)
print(child.pid)
"""
BRIEFLY_S = 0.05


@pytest.fixture
def watch(tmp_path: Path) -> LeakWatch:
    (tmp_path / "tmpdir").mkdir()
    return LeakWatch(tmp_path / "tmpdir")


@pytest.fixture
def nothing() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def test_waiting_ends_as_soon_as_the_predicate_holds_and_fails_at_the_deadline() -> None:
    calls = iter([False, False, True])
    wait_until(lambda: next(calls))
    with pytest.raises(AssertionError, match=r"not within 0\.05 s: the moon"):
        wait_until(lambda: False, BRIEFLY_S, what="the moon")


def test_waiting_in_a_coroutine_lets_the_loop_run_and_fails_at_the_deadline() -> None:
    async def scenario() -> None:
        done = asyncio.Event()
        asyncio.get_running_loop().call_soon(done.set)
        await wait_until_async(done.is_set)
        with pytest.raises(AssertionError, match="not within"):
            await wait_until_async(lambda: False, BRIEFLY_S)

    asyncio.run(scenario())


def test_a_child_is_heard_line_by_line_and_its_exit_status_is_known(spawn: Spawner) -> None:
    child = spawn(["-c", "import sys; print('one'); print('two'); print(sys.stdin.readline()); sys.exit(3)"])
    assert child.read_line() == "one"
    child.send("three")
    assert child.expect_line("three") == "three"
    assert child.wait() == 3
    with pytest.raises(AssertionError, match="output ended"):
        child.expect_line("four")
    assert child.stdout_path.read_text().split() == ["one", "two", "three"]


def test_a_silent_child_fails_the_wait_at_its_deadline(spawn: Spawner) -> None:
    child = spawn(["-c", FOREVER], until_teardown=True)
    child.expect_line("up")
    with pytest.raises(AssertionError, match="within"):
        child.read_line(BRIEFLY_S)
    with pytest.raises(AssertionError, match="still running"):
        child.wait(BRIEFLY_S)


def test_a_killed_child_reports_the_signal(spawn: Spawner) -> None:
    child = spawn(["-c", FOREVER])
    child.expect_line("up")
    child.kill()
    assert child.wait() == -signal.SIGKILL
    assert not child.is_alive()


def test_environment_is_laid_over_and_none_removes(spawn: Spawner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVERSTEP_TEST_REMOVED", "1")
    source = "import os; print(os.environ['ADDED'], 'EVERSTEP_TEST_REMOVED' in os.environ)"
    child = spawn(["-c", source], env={"ADDED": "yes", "EVERSTEP_TEST_REMOVED": None})
    assert child.read_line() == "yes False"
    assert child.wait() == 0


def test_a_process_left_running_is_killed_and_fails_the_test(tmp_path: Path) -> None:
    spawner = Spawner(tmp_path)
    child = spawner(["-c", FOREVER])
    child.expect_line("up")
    with pytest.raises(AssertionError, match="outlived the test"):
        spawner.end_all()
    assert not proc.is_alive(child.pid)


def test_a_server_that_may_live_until_teardown_is_killed_without_a_failure(tmp_path: Path) -> None:
    with Spawner(tmp_path) as spawner:
        child = spawner(["-c", FOREVER], until_teardown=True)
        child.expect_line("up")
    assert not proc.is_alive(child.pid)


def test_an_orphan_of_an_ended_child_is_killed_and_fails_the_test(tmp_path: Path) -> None:
    spawner = Spawner(tmp_path)
    child = spawner(["-c", WITH_CHILD], until_teardown=True)
    orphan = int(child.read_line())
    assert child.wait() == 0
    assert proc.is_alive(orphan)
    with pytest.raises(AssertionError, match="outlived the test"):
        spawner.end_all()
    assert not proc.is_alive(orphan)


def test_a_running_child_is_a_leak(watch: LeakWatch, spawn: Spawner) -> None:
    child = spawn(["-c", FOREVER], until_teardown=True)
    child.expect_line("up")
    watch.note("tests/some_module.py")
    leaks = [leak for leak in watch.leaks(BRIEFLY_S) if f"process {child.pid}:" in leak]
    assert len(leaks) == 1
    assert leaks[0].endswith("from tests/some_module.py")
    child.kill()
    child.wait()
    assert not [leak for leak in watch.leaks(BRIEFLY_S) if leak.startswith("process")]


def test_an_orphan_is_a_leak_although_it_is_no_child_of_ours(watch: LeakWatch, spawn: Spawner, tmp_path: Path) -> None:
    child = spawn(["-c", WITH_CHILD], env={"TMPDIR": str(tmp_path / "tmpdir")})
    orphan = int(child.read_line())
    child.wait()
    assert [leak for leak in watch.leaks(BRIEFLY_S) if f"process {orphan}:" in leak]
    os.kill(orphan, signal.SIGKILL)
    assert not watch.leaks()


def test_a_listening_socket_is_a_leak_until_it_is_closed(watch: LeakWatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert [leak for leak in watch.leaks(BRIEFLY_S) if f"listening socket port {port} " in leak]
    assert not watch.leaks()


def test_a_running_thread_is_a_leak_until_it_ends(watch: LeakWatch, nothing: threading.Event) -> None:
    thread = threading.Thread(target=nothing.wait, name="forgotten", daemon=True)
    thread.start()
    assert [leak for leak in watch.leaks(BRIEFLY_S) if "thread 'forgotten'" in leak]
    nothing.set()
    thread.join()
    assert not watch.leaks()


def test_a_temporary_file_is_a_leak_until_it_is_removed(watch: LeakWatch, tmp_path: Path) -> None:
    path = tmp_path / "tmpdir" / "forgotten"
    path.touch()
    assert [leak for leak in watch.leaks(BRIEFLY_S) if str(path) in leak]
    path.unlink()
    assert not watch.leaks()


def test_shared_memory_is_a_leak_once_nobody_uses_it(watch: LeakWatch) -> None:
    memory = shared_memory.SharedMemory(create=True, size=64)
    path = f"/dev/shm/{memory.name}"
    try:
        assert not [leak for leak in watch.leaks(BRIEFLY_S) if path in leak]  # in use, perhaps another session's
        memory.close()
        assert [leak for leak in watch.leaks(BRIEFLY_S) if path in leak]
    finally:
        memory.unlink()
    assert not watch.leaks()
    resource_tracker.ensure_running()  # it stays until the interpreter ends, and is no leak
    assert not watch.leaks()
