"""Makes somebody else's epoll leave a connection alone (Linux): Gloo's, where Gloo reads a connection no more.

Epoll reports what can be read again at each call, so its thread would never sleep. Gloo stays the owner: the entry
remains, without its events, since Gloo ends the process when it cannot remove an entry that it has made.
"""

import contextlib
import ctypes
import os
import select
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from everstep.collectives.sockets import OpenSocket

_EPOLL_CTL_MOD = 3  # linux/eventpoll.h
_libc = ctypes.CDLL(None, use_errno=True)


class _Event(ctypes.Structure):
    """struct epoll_event (linux/eventpoll.h), packed on x86-64 alone."""

    _pack_ = 1 if os.uname().machine == "x86_64" else 0
    _fields_ = (("events", ctypes.c_uint32), ("data", ctypes.c_uint64))


@dataclass(frozen=True)
class _Entry:
    epoll_fd: int
    opened: OpenSocket
    data: int  # the owner's, to be kept as it is


def leave_alone(sockets: Iterable[OpenSocket]) -> None:
    """No epoll of this process reports these any more, but for one last time that they were closed or reset."""
    wanted = set(sockets)
    for entry in tuple(_entries()):
        if entry.opened in wanted:
            event = _Event(select.EPOLLONESHOT, entry.data)
            # Fails when its owner has removed it since it was listed: then there is nothing to do.
            _libc.epoll_ctl(entry.epoll_fd, _EPOLL_CTL_MOD, entry.opened.fd, ctypes.byref(event))


def _entries() -> Iterator[_Entry]:
    """What each epoll of this process waits for: a line `tfd: 12 events: 19 data: 5639 pos:0 ino:723d4e sdev:9`."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed since it was listed
            if os.readlink(f"/proc/self/fd/{name}") != "anon_inode:[eventpoll]":
                continue
            with open(f"/proc/self/fdinfo/{name}") as info:
                lines = [line for line in info if line.startswith("tfd:")]
            for line in lines:
                words = line.replace(":", " ").split()
                said = dict(zip(words[::2], words[1::2], strict=False))
                yield _Entry(int(name), OpenSocket(int(said["tfd"]), int(said["ino"], 16)), int(said["data"], 16))
