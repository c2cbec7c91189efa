"""Ties this process to its agent's monitor, if it has one: the page, the way to wake the agent, and stacks on request.

EVERSTEP_MONITOR names two paths, `page,wake`, under /proc/PID/fd of the agent: files without names, so that nothing is
left behind however either side ends. Anything that is wrong is said once, and the script goes on unwatched.
"""

import contextlib
import logging
import os
import threading

from everstep.monitor import page
from everstep.monitor.beats import Beats
from everstep.monitor.first import write_stacks_to
from everstep.worker_environment import monitor_paths

_log = logging.getLogger("everstep.monitor")
_said: set[str] = set()


class Attachment:
    """To the agent. `letter` is what this process last told it."""

    def __init__(self, wake_path: str) -> None:
        self._wake_path = wake_path
        self._lock = threading.Lock()
        self._letter: dict[str, object] = {}
        self.pid = os.getpid()

    def send(self, **parts: object) -> bool:
        """Tell the agent at once. False where it cannot be: it is gone, or this is a forked child."""
        if os.getpid() != self.pid:
            return False
        with self._lock:
            self._letter.update(parts)
            page.write_letter(here.words, self._letter)
            return self._wake()

    def _wake(self) -> bool:
        try:
            fd = os.open(self._wake_path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            say(f"the agent does not answer ({error}); nothing watches this process")
            return False
        try:
            with contextlib.suppress(BlockingIOError):  # full: it has been woken often enough
                os.write(fd, b"\0")
        except OSError as error:
            say(f"the agent does not answer ({error}); nothing watches this process")
            return False
        finally:
            os.close(fd)
        return True


_attachment: list[Attachment] = []
_is_tried: list[int] = []  # the pid that tried


def attach() -> Attachment | None:
    """Idempotent; before the first beat it is called for you. None: nothing watches this process."""
    if _is_tried != [os.getpid()]:
        _is_tried[:] = [os.getpid()]
        _attachment.clear()
        _attach()
    return _attachment[0] if _attachment else None


def say(what: str) -> None:
    """A warning, once a process."""
    if what.partition("(")[0] not in _said:
        _said.add(what.partition("(")[0])
        _log.warning("%s", what)


def _attach() -> None:
    paths = monitor_paths()
    if paths is None:
        _log.info("no rank monitor: this process was not started by `everstep run`")
        return
    page_path, wake_path = paths
    try:
        fd, words = page.open_page(page_path)
    except (OSError, ValueError) as error:
        say(f"no rank monitor at EVERSTEP_MONITOR ({error}); nothing watches this process")
        return
    if words[page.W_PID] not in (0, os.getpid()) and _is_alive(words[page.W_PID]):
        os.close(fd)  # a child of the rank's process: its life says nothing about that one's
        return
    here.rebind(words)
    words[page.W_PID] = os.getpid()
    with contextlib.suppress(OSError):
        write_stacks_to(fd)
    _attachment.append(Attachment(wake_path))


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _attach_first() -> None:
    attach()


here = Beats(_attach_first)
heartbeat = here.heartbeat
section = here.section
