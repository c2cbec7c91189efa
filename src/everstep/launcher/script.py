"""Inside a worker: takes its place under the agent, then becomes the user's script, module or program.

A plain worker's interpreter runs `main`; a worker forked from the template calls `take_place` and `run` itself. From
then on it behaves as `python script.py` does: its own `__main__`, argv, path, traceback, exit status.

On the channel to the agent, a SOCK_SEQPACKET: `Report` once the place is taken; back comes one message, the word to go
on (an end instead: leave, nobody knows of this process); then `GOING`, and the channel's end, or why a program could
not be run.
"""

import builtins
import contextlib
import ctypes
import importlib.machinery
import io
import os
import runpy
import signal
import socket
import struct
import sys
import threading
import time
import types
import zipimport

from everstep.launcher.parenthood import die_with_parent
from everstep.launcher.robust_mutex import RobustMutex
from everstep.monitor.first import show_stacks_on_request

__all__ = [
    "GO",
    "GOING",
    "NOT_RUN",
    "PROBLEM",
    "REPORT",
    "STARTED",
    "close_all_but",
    "main",
    "run",
    "set_first_path",
    "set_title",
    "take_place",
    "tell_going",
    "tell_problem",
]

REPORT = struct.Struct("!cIB")  # STARTED, pid, whether its main thread holds the mutex
STARTED = b"S"
PROBLEM = b"E"  # and why, in UTF-8
GO = b"G"
GOING = b"R"
MODULE, COMMAND = "module", "command"  # RunAs by value: importing it takes a plain worker 0.1 s
ADOPTION_S = 10.0
PROBLEM_BYTES_MAX = 4096
NOT_RUN = 126  # exit code of a worker that never came to its script; the agent has read why

# Who a forked child compares its parent with, and whether the thread that forked is this process's main one.
_me: tuple[int, int] = (0, 0)


def main() -> None:
    """Of a plain worker: `-c` CHANNEL MUTEX AGENT_PID CWD RUN_AS TARGET ARGS..., the first two are descriptors."""
    channel_fd, mutex_fd, agent_pid, cwd, run_as, target, *args = sys.argv[1:]
    close_all_but({int(channel_fd), int(mutex_fd)})
    os.set_inheritable(int(channel_fd), False)
    channel = socket.socket(fileno=int(channel_fd))
    try:
        mutex = int(mutex_fd) if run_as != COMMAND else -1
        take_place(channel, int(agent_pid), int(agent_pid), mutex)
        if not channel.recv(1):
            os._exit(NOT_RUN)
        os.chdir(cwd)
    except OSError as error:
        tell_problem(channel, str(error))
        os._exit(NOT_RUN)
    run(channel, run_as, target, args)


def take_place(channel: socket.socket, agent_pid: int, parent_pid: int, mutex_fd: int) -> None:
    """Lead a session, die with the agent, hold the mutex, and report. Main thread. Raises OSError.

    `parent_pid` is the process that forked this one; if it is not the agent, its end makes the agent the parent.
    """
    os.setsid()
    deadline = time.monotonic() + ADOPTION_S
    while (parent := os.getppid()) != agent_pid:
        if parent != parent_pid or time.monotonic() >= deadline:
            raise OSError("the agent is gone, or the system does not hand orphans to it (PR_SET_CHILD_SUBREAPER)")
        time.sleep(0.0002)
    # Not before: the end of the parent that forked this process would count.
    die_with_parent(agent_pid)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    global _me
    _me = os.getpid(), threading.get_ident()
    os.register_at_fork(after_in_child=_renew)
    is_held = mutex_fd >= 0 and _hold(mutex_fd)
    channel.send(REPORT.pack(STARTED, os.getpid(), is_held))


def close_all_but(kept: set[int]) -> None:
    """The agent may hold descriptors that it inherited itself, and that are open to whoever it starts."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) not in kept:
            with contextlib.suppress(OSError):  # the listing's own is closed by now
                os.close(int(name))


def tell_problem(channel: socket.socket, text: str) -> None:
    with contextlib.suppress(OSError):  # nobody listens any more: so be it
        channel.send(PROBLEM + text.encode(errors="replace")[:PROBLEM_BYTES_MAX])


def tell_going(channel: socket.socket) -> None:
    """An end of the channel without this word is the end of a process that never came to its work."""
    with contextlib.suppress(OSError):
        channel.send(GOING)


def run(channel: socket.socket, run_as: str, target: str, args: list[str]) -> None:
    """Become it. To be called with as little as can be on the stack; what it raises is for the interpreter itself.

    The caller unwinds and lets the interpreter finish: threads are joined, atexit runs, SystemExit sets the code.
    """
    set_title([sys.executable, "-u", *(["-m"] if run_as == MODULE else []), target, *args])
    if run_as != COMMAND:  # an exec would turn the signal into death
        show_stacks_on_request()
    tell_going(channel)
    if run_as == COMMAND:
        _exec(channel, [target, *args])
    channel.close()
    old_main, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
    namespace = vars(sys.modules["__main__"])
    namespace["__builtins__"] = builtins
    if sys.version_info < (3, 14):
        namespace["__annotations__"] = {}
    code = None
    # What the interpreter itself calls for `-m`; the public run_module takes the namespace away at its end.
    run_module_as_main = getattr(runpy, "_run_module_as_main")  # noqa: B009  # not in the stubs
    try:
        if run_as == MODULE:
            sys.argv = ["-m", *args]
            set_first_path(os.getcwd())
            as_module = target
        else:
            sys.argv = [target, *args]
            as_module = "" if _set_path_of_script(target) else "__main__"
            code = _load(target, namespace) if not as_module else None
    except BaseException as error:
        _show_without(error, None)
        raise
    # These two are called from here, so that their frames are the first below this one, which no traceback shows.
    try:
        if code is not None:
            exec(code, namespace)
        else:
            run_module_as_main(as_module, as_module != "__main__")
    except BaseException as error:
        _show_without(error, error.__traceback__.tb_next if error.__traceback__ else None)
        raise
    if code is not None:
        _forget_file(namespace)
    del old_main  # kept so long: frames below this one run in it


def _renew() -> None:
    """In each forked child of the worker: die with the worker, unless a thread forked that may end before."""
    global _me
    (parent, main_thread), _me = _me, (os.getpid(), threading.get_ident())
    if _me[1] == main_thread:
        # The signal comes when the forking *thread* ends; of a thread other than the main one that is no evidence.
        with contextlib.suppress(OSError):
            die_with_parent(parent)


def _hold(mutex_fd: int) -> bool:
    try:
        RobustMutex.attach(mutex_fd).hold()
    except (OSError, AttributeError):  # the agent goes by the pidfd then
        return False
    finally:
        os.close(mutex_fd)
    return True


def _exec(channel: socket.socket, command: list[str]) -> None:
    # Python ignores these two, and an exec hands that on.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)  # the channel closes with it: that is how the agent learns of success
    except (OSError, ValueError) as error:
        tell_problem(channel, f"{command[0]}: {error}")
        os._exit(NOT_RUN)


def _set_path_of_script(target: str) -> bool:
    """As the interpreter does. Whether it is a file of code; else a folder or archive with a `__main__` in it."""
    if os.path.isdir(target) or _is_archive(target):
        sys.path.insert(0, os.path.abspath(target))  # in spite of -P: it is where `__main__` is found
        return False
    set_first_path(os.path.dirname(os.path.realpath(target)))
    return True


def _is_archive(target: str) -> bool:
    try:
        zipimport.zipimporter(target)
    except (zipimport.ZipImportError, OSError):
        return False
    return True


def set_first_path(folder: str) -> None:
    if not getattr(sys.flags, "safe_path", False):
        sys.path.insert(0, folder)


def _load(target: str, namespace: dict[str, object]) -> types.CodeType:
    path = os.path.abspath(target)
    loader: importlib.machinery.SourceFileLoader | importlib.machinery.SourcelessFileLoader
    try:
        with io.open_code(path) as file:
            if path.endswith(".pyc"):
                loader = importlib.machinery.SourcelessFileLoader("__main__", path)
                code = loader.get_code("__main__")
                assert code is not None
            else:
                loader = importlib.machinery.SourceFileLoader("__main__", path)
                code = compile(file.read(), path, "exec", dont_inherit=True)
    except OSError as error:
        sys.stderr.write(f"{sys.executable}: can't open file {path!r}: [Errno {error.errno}] {error.strerror}\n")
        sys.exit(2)
    namespace |= {"__file__": path, "__cached__": None, "__loader__": loader}
    return code


def _forget_file(namespace: dict[str, object]) -> None:
    """As the interpreter does, once a script is through: what runs at exit does not see these."""
    namespace.pop("__file__", None)
    namespace.pop("__cached__", None)


def _show_without(error: BaseException, stripped: types.TracebackType | None) -> None:
    """Have the interpreter show this exception, when it gets there, with `stripped` for a traceback."""
    if isinstance(error, SystemExit):
        return
    shown_by = getattr(sys, "excepthook", sys.__excepthook__)

    def hook(kind: type[BaseException], value: BaseException, _: types.TracebackType | None) -> None:
        sys.excepthook = shown_by
        value.__traceback__ = sys.last_traceback = stripped
        try:
            shown_by(kind, value, stripped)
        finally:
            _forget_file(vars(sys.modules["__main__"]))

    sys.excepthook = hook


def set_title(command: list[str]) -> None:
    """What `ps` shows, written over the arguments that the process was started with; cut to the room there is."""
    sys.orig_argv[:] = command
    with contextlib.suppress(OSError, ValueError, IndexError):
        with open("/proc/self/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
        start, end = int(fields[45]), int(fields[46])  # arg_start and arg_end, 48 and 49 in proc(5)
        if 0 < start < end:
            title = b"\0".join(os.fsencode(word) for word in command)[: end - start - 1]
            ctypes.memmove(start, title.ljust(end - start, b"\0"), end - start)
