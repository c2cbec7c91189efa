"""Fixtures for every test, and the check that the whole session leaves nothing behind."""

import faulthandler
import os
import signal
from collections.abc import Generator, Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.support.leaks import LeakWatch, use_temp_dir
from tests.support.processes import Spawner

TO_FAIL_S = 20.0  # for a test that hangs to end what it started, before the whole run is ended

# Started in the background of a script, the tests would hand an ignored SIGINT on to every process they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Deadlines per example measure the machine, not the code. In CI a failure must not depend on the day.
hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("soak", deadline=None, max_examples=5000)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rewrite", action="store_true", help="record the transcripts of tests/core anew")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """A test that hangs fails, says where, and the others go on; `faulthandler_timeout` ends what no signal wakes."""
    patience_s = float(item.config.getini("faulthandler_timeout") or 0.0) - TO_FAIL_S
    if patience_s <= 0.0:  # switched off, for soak tests
        yield
        return

    def fail(number: int, frame: object) -> None:
        faulthandler.dump_traceback(2, all_threads=True)  # into the report
        pytest.fail(f"still running after {patience_s:g} s")

    previous = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, patience_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, previous)


@pytest.fixture
def rewrite(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--rewrite"))


@pytest.fixture(scope="session", autouse=True)
def leak_watch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LeakWatch]:
    """Fails the session when anything that the tests made is still there after the last fixture."""
    temp_dir = tmp_path_factory.mktemp("tmpdir")
    use_temp_dir(temp_dir)
    watch = LeakWatch(temp_dir)
    yield watch
    leaks = watch.leaks()
    if leaks:
        pytest.fail("left behind by the tests:\n  " + "\n  ".join(leaks), pytrace=False)


@pytest.fixture(scope="module", autouse=True)
def _note_leaks(request: pytest.FixtureRequest, leak_watch: LeakWatch) -> Iterator[None]:
    """Autouse and first, hence torn down after the other fixtures of the module."""
    yield
    leak_watch.note(request.node.nodeid)


@pytest.fixture
def spawn(tmp_path: Path) -> Iterator[Spawner]:
    """Starts real python processes; see `Spawner`."""
    with Spawner(tmp_path) as spawner:
        yield spawner
