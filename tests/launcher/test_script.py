"""A script that the launcher starts behaves as one that `python` starts: compared with the real thing, text by text."""

import os
import re
import signal
import subprocess
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from everstep.launcher.starting import ExitStatus, Launch, RunAs, Starter, WorkerNotStarted
from everstep.launcher.template_client import TemplateStarter
from tests.launcher.workers import DEADLINE_S, PYTHON, Scripts, Worker, environment
from tests.support.waiting import wait_until

FACTS = """
'''What I am.'''
import os, signal, sys, threading
import __main__
print(__name__, __doc__, __file__, __package__, __spec__, type(__loader__), __builtins__)
print(sorted(name for name in globals()), vars(__main__) is globals())
print(sys.argv, sys.orig_argv, sys.path[0], sys.flags, sys.stdin.read(), sys.stdout.write_through)
print([signal.getsignal(n) for n in sorted(signal.valid_signals() - {9, 19})])
print(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
print(os.getcwd(), sorted(os.environ.items()), os.umask(0o22), threading.current_thread() is threading.main_thread())
print(open("/proc/self/cmdline").read().rstrip(chr(0)).split(chr(0)))
print(sys.getrecursionlimit(), threading.active_count(), sys.gettrace(), sys.excepthook is sys.__excepthook__)
"""
PACKAGE_FACTS = FACTS + "\nfrom . import other\nprint(__spec__.name, __spec__.origin, other.__name__)"
DEEP = """
def f(n):
    if n:
        return f(n - 1)
    try:
        {}["no"]
    except KeyError as e:
        raise ValueError("deep") from e
f(3)
"""
AT_EXIT = """
import atexit, sys, threading
class Tells:
    def __del__(self):
        print("deleted")
tells = Tells()
atexit.register(lambda: print("at exit", __name__, __file__))
atexit.register(lambda: print(sys.modules["__main__"].tells is tells))
def late():
    threading.main_thread().join()
    print("the thread ends after the main one")
threading.Thread(target=late).start()
print("main ends")
"""
EXIT_IN_AT_EXIT = """
import atexit, os
atexit.register(os._exit, 7)
raise ValueError("and yet 7")
"""
PROCESSES = """
import multiprocessing, os, pickle, sys

class Thing:
    def __eq__(self, other):
        return type(self) is type(other)

def work(thing):
    return type(thing).__module__ + " " + str(thing == Thing())

if __name__ == "__main__":
    assert pickle.loads(pickle.dumps(Thing())) == Thing()
    print(pickle.dumps(Thing())[:40])
    for method in ["spawn", "fork"]:
        with multiprocessing.get_context(method).Pool(1) as pool:
            print(pool.map(work, [Thing()]))
"""
HOOK = """
import sys
def hook(kind, value, tb):
    print(kind, value, tb.tb_frame.f_code.co_name, tb.tb_next, value.__traceback__ is tb, sys.excepthook is hook)
sys.excepthook = hook
raise LookupError("hooked")
"""
SCRIPTS = {
    "facts": FACTS,
    "returns": "print('é')",
    "code": "import sys\nsys.exit(3)",
    "text": "import sys\nsys.exit('a reason')",
    "no_code": "raise SystemExit",
    "exception": DEEP,
    "group": "raise RuntimeError('x') from OSError(2, 'y')",
    "syntax": "x = (1,\ny = 2 3\n",
    "interrupted": "raise KeyboardInterrupt",
    "sigint": "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nsignal.pause()",
    "abort": "import os\nos.abort()",
    "segfault": "import ctypes\nctypes.string_at(0)",
    "killed": "import os\nos.kill(os.getpid(), 9)",
    "os_exit": "import os\nprint('flushed')\nos._exit(200)",
    "at_exit": AT_EXIT,
    "exit_in_at_exit": EXIT_IN_AT_EXIT,
    "hook": HOOK,
    "thread": "import threading\nt = threading.Thread(target=lambda: 1 / 0, name='T')\nt.start()\nt.join()",
    "unraisable": "class C:\n    def __del__(self):\n        1 / 0\nC()",
    "coding": "# coding: latin-1\nprint('\\xe9', __file__[-3:])",
    "processes": PROCESSES,
}
Result = tuple[ExitStatus, str, str]
ARGS = ("--lr", "0.1", "a b", "")


def truth(launch: Launch) -> Result:
    """What `python` itself does."""
    as_module = ["-m"] if launch.run_as is RunAs.MODULE else []
    return _run([PYTHON, "-u", *as_module, launch.target, *launch.args], launch)


def _run(command: list[str], launch: Launch) -> Result:
    done = subprocess.run(
        command, cwd=launch.cwd, env=dict(launch.environment), capture_output=True, check=False,
        stdin=subprocess.DEVNULL, timeout=DEADLINE_S,
    )  # fmt: skip
    code = done.returncode
    status = ExitStatus(code=code) if code >= 0 else ExitStatus(signal=-code)
    return status, _without_addresses(done.stdout), _without_addresses(done.stderr)


def outcome(starter: Starter, launch: Launch) -> Result:
    with Worker(starter, launch) as worker:
        status = worker.wait()
        return status, _without_addresses(worker.out), _without_addresses(worker.err)


def _without_addresses(text: bytes | bytearray) -> str:
    return re.sub("0x[0-9a-f]+", "0x", text.decode())


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_behaves_as_one_that_python_starts(name: str, starter: Starter, scripts: Scripts) -> None:
    launch = scripts.script(SCRIPTS[name], *ARGS)
    with ThreadPoolExecutor(1) as beside:
        expected = beside.submit(truth, launch)
        found = outcome(starter, launch)
        assert found == expected.result()


def _write_package(scripts: Scripts) -> None:
    package = scripts.folder / "package"
    package.mkdir()
    for file, text in {"__init__": "", "other": "", "facts": PACKAGE_FACTS, "fails": DEEP, "__main__": FACTS}.items():
        (package / f"{file}.py").write_text(text)
    with zipfile.ZipFile(scripts.folder / "archive", "w") as archive:
        archive.writestr("__main__.py", FACTS)
        archive.writestr("beside.py", "")
    (scripts.folder / "link.py").symlink_to(package / "__main__.py")


@pytest.mark.parametrize(
    ("run_as", "target"),
    [
        (RunAs.MODULE, "package.facts"),
        (RunAs.MODULE, "package.fails"),
        (RunAs.MODULE, "package"),
        (RunAs.MODULE, "no.such.module"),
        (RunAs.SCRIPT, "package"),
        (RunAs.SCRIPT, "archive"),
        (RunAs.SCRIPT, "link.py"),
        (RunAs.SCRIPT, "missing.py"),
    ],
    ids=str,
)
def test_modules_folders_archives_and_links_behave_as_by_python(
    run_as: RunAs, target: str, starter: Starter, scripts: Scripts
) -> None:
    _write_package(scripts)
    launch = scripts.launch(run_as, target, *ARGS)
    assert outcome(starter, launch) == truth(launch)


def test_a_program_is_run_as_it_is(starter: Starter, scripts: Scripts) -> None:
    text = 'echo "$0 $1 $PWD $X"; grep SigIgn /proc/$$/status | tail -c 8; cat; exec >&2; echo done; exit 5'
    launch = scripts.launch(RunAs.COMMAND, "sh", "-c", text, "zero", "a b", X="y")
    expected = _run([launch.target, *launch.args], launch)
    assert outcome(starter, launch) == expected
    assert expected[0] == ExitStatus(code=5)


def test_what_cannot_be_started_is_said(starter: Starter, scripts: Scripts) -> None:
    with pytest.raises(WorkerNotStarted, match=r"no-such-program.*No such file"):
        starter.start(scripts.launch(RunAs.COMMAND, "no-such-program"))
    launch = Launch(run_as=RunAs.SCRIPT, target="x", environment=environment(), cwd=str(scripts.folder / "gone"))
    with pytest.raises(WorkerNotStarted, match=r"No such file.*gone"):
        starter.start(launch)


def test_a_worker_leads_a_session_and_has_no_descriptor_but_its_three(starter: Starter, scripts: Scripts) -> None:
    text = """
import os
print(os.getsid(0) == os.getpgrp() == os.getpid(), os.getppid())
print(os.listdir("/proc/self/fd"))
"""
    status, out, _ = outcome(starter, scripts.script(text))
    leads, fds = out.splitlines()
    assert leads == f"True {os.getpid()}"
    # One is the listing's own; the other is where fork_guard points sockets that are taken away.
    assert len(fds.split()) <= 5, fds
    assert status.is_clean


def test_forks_do_not_draw_the_same_random_numbers(torch_template: TemplateStarter, scripts: Scripts) -> None:
    text = """
import numpy, random, torch, multiprocessing
print(torch.rand(()).item(), numpy.random.rand(), random.random(), multiprocessing.current_process().authkey)
"""
    outcomes = [outcome(torch_template, scripts.script(text)) for _ in range(2)]
    for a, b in zip(*(out.split(maxsplit=3) for _, out, _ in outcomes), strict=True):
        assert a != b


def test_a_script_with_torch_trains_in_threads_and_ends_as_it_should(
    torch_template: TemplateStarter, scripts: Scripts
) -> None:
    text = """
import sys, torch
torch.set_num_threads(2)
model = torch.nn.Linear(512, 512)
model(torch.ones(512, 512)).sum().backward()
print(float(torch.ones(1 << 20).sum()))
sys.exit(9)
"""
    status, out, err = outcome(torch_template, scripts.script(text))
    assert (status, out, err) == (ExitStatus(code=9), "1048576.0\n", "")


def test_an_environment_may_be_large_and_need_not_be_utf8(starter: Starter, scripts: Scripts) -> None:
    large = "x" * 100_000
    text = """
import os
print(len(os.environ["A"]), len(os.environ["B"]), os.environb[b"C"], "OMP_NUM_THREADS" in os.environ)
"""
    status, out, _ = outcome(starter, scripts.script(text, A=large, B=large, C="\udcff"))
    assert (status.code, out) == (0, "100000 100000 b'\\xff' True\n")


def test_the_exit_status_of_each_signal_is_its_own(starter: Starter, scripts: Scripts) -> None:
    with Worker(starter, scripts.script("import signal\nprint('up')\nsignal.pause()")) as worker:
        assert worker.read_line() == "up"
        wait_until(lambda: worker.process.state() == "S", DEADLINE_S)
        worker.process.signal_group(signal.SIGTERM)
        status = worker.wait()
    assert status == ExitStatus(signal=signal.SIGTERM)
    assert status.describe() == "signal 15 (SIGTERM)"
    assert worker.process.state() == ""
    worker.process.signal_group(signal.SIGTERM)
