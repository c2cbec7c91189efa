"""Who dies with whom, and who becomes the parent of orphans: prctl(2), which Python does not offer."""

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PR_GET_CHILD_SUBREAPER = 37

_prctl = ctypes.CDLL(None, use_errno=True).prctl


def die_with_parent(pid: int) -> None:
    """Have SIGKILL sent to this process when the parent's *thread* ends that started it; `pid` is that parent.

    A process that was adopted is bound to its new parent's main thread. Raises OSError.
    """
    if _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() not in (pid, 0):  # 0: it is outside of this process's pid namespace
        os.kill(os.getpid(), signal.SIGKILL)  # it ended before the line above


def adopt_orphans(adopts: bool) -> bool:
    """Become, or cease to be, the parent of descendants whose own is gone; returns what it was. Raises OSError."""
    was = ctypes.c_int(0)
    if _prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(was), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_GET_CHILD_SUBREAPER) failed")
    if _prctl(_PR_SET_CHILD_SUBREAPER, int(adopts), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")
    return bool(was.value)
