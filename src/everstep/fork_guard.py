"""Forked children let go of the sockets they inherit, so that a peer sees at once when their parent dies.

A DataLoader worker is a fork of the trainer. It inherits the sockets of the collectives, of the stores and of the
link, and keeps them open after the trainer is SIGKILLed: no FIN goes out, and every peer waits for a deadline.
So each owner of such descriptors says how to list them, and the child puts an inert descriptor in the place of each.
Replaced, not closed: the child's copies of C++ objects still believe that the number is theirs, and a number set free
would soon be somebody else's file.

Whatever thread of the parent looks at a socket through a duplicate at the instant of the fork, its child inherits the
duplicate, too. It is known by its inode; so every descriptor of a guarded socket is replaced, not only the one named.
"""

import contextlib
import os
import stat
from collections.abc import Callable, Iterable

# Single dict operations are atomic under the GIL: no lock, which a fork could copy while it is held.
_guards: dict[object, Callable[[], Iterable[int]]] = {}
_inert_fds: list[int] = []


def guard(list_fds: Callable[[], Iterable[int]]) -> Callable[[], None]:
    """Replace in every later forked child what `list_fds` names there; returns how to stop that (idempotent).

    `list_fds` runs in the child, between fork and the child's first line: only the forking thread lives on, so it must
    take no lock and wait for nothing. The guard keeps it alive, and with it the object that it is bound to.
    """
    if not _inert_fds:
        # Opened beforehand: a child that has used up its descriptors could not open it any more.
        _inert_fds.append(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC))
    key = object()
    _guards[key] = list_fds

    def lift() -> None:
        _guards.pop(key, None)

    return lift


def _replace_in_child() -> None:
    named: set[int] = set()
    for list_fds in tuple(_guards.values()):
        with contextlib.suppress(Exception):  # boundary: one owner's fault must not leave the others' sockets open
            named.update(list_fds())
    for fd in named | _sharing_a_socket_with(named):
        if fd not in _inert_fds:
            with contextlib.suppress(OSError):
                os.dup2(_inert_fds[0], fd, inheritable=False)


def _sharing_a_socket_with(fds: set[int]) -> set[int]:
    inodes = {inode for fd in fds if (inode := _socket_inode(fd)) is not None}
    if not inodes:
        return set()
    try:
        every = [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:  # no /proc, or no descriptor left to list it with
        return set()
    return {fd for fd in every if _socket_inode(fd) in inodes}


def _socket_inode(fd: int) -> int | None:
    try:
        status = os.fstat(fd)
    except (OSError, OverflowError):
        return None
    return status.st_ino if stat.S_ISSOCK(status.st_mode) else None


os.register_at_fork(after_in_child=_replace_in_child)
