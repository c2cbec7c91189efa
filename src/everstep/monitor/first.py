"""Stacks on request from a worker's first line on, before it has imported anything: for a hang in an import.

The agent's own starter calls this; a script need not. monitor/attach.py does the same again, with the page.
"""

import contextlib
import faulthandler
import os
import signal

from everstep.worker_environment import monitor_paths

# Real-time, so that no script or scheduler means anything by it; glibc keeps the first two for itself.
STACKS_SIGNAL = signal.SIGRTMIN + 6
STACKS_OFFSET = 65536  # of the page's file: a multiple of every page size of the kernel
# Appending: a child that was forked before its parent opened the page again has a place in the file of its own.
OPEN_FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_APPEND

_fds: list[int] = []


def show_stacks_on_request() -> None:
    """Main thread. Where there is no monitor, or it is gone, nothing."""
    paths = monitor_paths()
    if paths is None:
        return
    with contextlib.suppress(OSError):
        write_stacks_to(os.open(paths[0], OPEN_FLAGS))


def write_stacks_to(fd: int) -> None:
    """All threads' stacks, whenever STACKS_SIGNAL comes. `fd`: opened with OPEN_FLAGS; it is ours from now on."""
    with contextlib.suppress(ValueError, RuntimeError):  # without it a hang shows no stacks, and is ended all the same
        faulthandler.register(STACKS_SIGNAL, file=fd, all_threads=True, chain=False)
    for old in _fds:
        os.close(old)
    _fds[:] = [fd]
