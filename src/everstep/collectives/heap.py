"""Gives memory that was freed back to the system, now and then."""

import ctypes
import threading

_once_at_a_time = threading.Lock()


def give_back() -> None:
    """Where the C library can (glibc); about a millisecond, without the GIL. Not for a thread that has to hurry.

    Each reconfiguration frees megabytes (buffers, snapshots, a broken step's graph) between blocks that live on, and
    glibc keeps them: a member that had survived a hundred failures had grown by 40 MiB, all of them free.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None and _once_at_a_time.acquire(blocking=False):
        try:
            trim(ctypes.c_size_t(0))
        finally:
            _once_at_a_time.release()
