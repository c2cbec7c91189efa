"""A mutex in shared memory whose owner's end wakes whoever waits for it, before the owner's memory is given back.

The kernel walks a dying thread's list of robust futexes first of all; a pidfd, and the FINs of its sockets, come only
once its memory is freed, which takes 0.05 to 0.25 s per GB. The worker's main thread locks, and a thread of the agent
waits. That ends on an exec of the owner and at the end of its main thread alone, too: the waiter must look again.
"""

import ctypes
import errno
import mmap
import os

_SIZE = mmap.PAGESIZE
_ATTRIBUTE_BYTES = 64  # of a pthread_mutexattr_t, amply
_PTHREAD_PROCESS_SHARED = 1
_PTHREAD_MUTEX_ROBUST = 1
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class RobustMutex:
    """One process's mapping of the mutex that lies in the memory behind `fd`."""

    def __init__(self, fd: int, address: int) -> None:
        self.fd = fd
        self._address: int | None = address

    @classmethod
    def create(cls) -> "RobustMutex":
        """Raises OSError or AttributeError where the system has no such thing."""
        fd = os.memfd_create("everstep-worker", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, _SIZE)
            mutex = cls(fd, _map(fd))
            attributes = ctypes.create_string_buffer(_ATTRIBUTE_BYTES)
            _check(_libc.pthread_mutexattr_init(attributes))
            _check(_libc.pthread_mutexattr_setpshared(attributes, _PTHREAD_PROCESS_SHARED))
            _check(_libc.pthread_mutexattr_setrobust(attributes, _PTHREAD_MUTEX_ROBUST))
            _check(_libc.pthread_mutex_init(ctypes.c_void_p(mutex._address), attributes))
        except BaseException:
            os.close(fd)
            raise
        return mutex

    @classmethod
    def attach(cls, fd: int) -> "RobustMutex":
        """Of another process. The mapping lasts as long as this process: unmapped while held, it would tell nobody."""
        return cls(fd, _map(fd))

    def hold(self) -> None:
        """Take it, for the rest of the calling thread's life. Raises OSError."""
        _check(_libc.pthread_mutex_trylock(ctypes.c_void_p(self._address)))

    def wait(self) -> bool:
        """Wait until its holder is gone; whether there was one. Without a deadline: a process may live for months."""
        result = _libc.pthread_mutex_lock(ctypes.c_void_p(self._address))
        # Not made consistent: nobody shall ever take it again.
        if result in (0, errno.EOWNERDEAD):
            _libc.pthread_mutex_unlock(ctypes.c_void_p(self._address))
        return bool(result == errno.EOWNERDEAD)

    def close_fd(self) -> None:
        """The other process has it by now, or never will."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def unmap(self) -> None:
        """Once nothing in this process waits for it any more."""
        if self._address is not None:
            _libc.munmap(self._address, _SIZE)
            self._address = None


def _map(fd: int) -> int:
    address = _libc.mmap(None, _SIZE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
    if address is None or address == _MAP_FAILED:
        raise OSError(ctypes.get_errno(), "mmap failed")
    return int(address)


def _check(result: int) -> None:
    if result != 0:
        raise OSError(result, os.strerror(result))
