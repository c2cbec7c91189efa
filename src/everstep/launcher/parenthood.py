"""Who dies with whom, and who becomes the parent of orphans: prctl(2), which Python does not offer."""

import ctypes
import os
import signal
import threading

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

_prctl = ctypes.CDLL(None, use_errno=True).prctl
# The kernel keeps one flag for the whole process.
_lock = threading.Lock()
_adopters = 0


def die_with_parent(pid: int) -> None:
    """Have SIGKILL sent to this process when the parent's *thread* ends that started it; `pid` is that parent.

    A process that was adopted is bound to its new parent's main thread. Raises OSError.
    """
    if _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() not in (pid, 0):  # 0: it is outside of this process's pid namespace
        os.kill(os.getpid(), signal.SIGKILL)  # it ended before the line above


def adopt_orphans() -> None:
    """Become the parent of descendants whose own is gone, until as many `abandon_orphans`. Raises OSError."""
    global _adopters
    with _lock:
        _set_subreaper(True)
        _adopters += 1


def abandon_orphans() -> None:
    """Undo one `adopt_orphans`; the adopted stay. Raises OSError."""
    global _adopters
    with _lock:
        _adopters -= 1
        if not _adopters:
            _set_subreaper(False)


def _set_subreaper(is_one: bool) -> None:
    if _prctl(_PR_SET_CHILD_SUBREAPER, int(is_one), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")
