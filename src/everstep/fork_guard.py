"""Forked children let go of the sockets they inherit, so that a peer sees at once when their parent dies.

A DataLoader worker is a fork of the trainer. It inherits the sockets of the collectives, of the stores and of the
link, and keeps them open after the trainer is SIGKILLed: no FIN goes out, and every peer waits for a deadline.
So each owner of such descriptors says how to list them, and the child puts an inert descriptor in the place of each.
Replaced, not closed: the child's copies of C++ objects still believe that the number is theirs, and a number set free
would soon be somebody else's file.
"""

import contextlib
import os
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
    for list_fds in tuple(_guards.values()):
        try:
            fds = list(list_fds())
        except Exception:  # boundary: one owner's fault must neither fail the fork nor leave the others' sockets open
            continue
        for fd in fds:
            if fd not in _inert_fds:
                with contextlib.suppress(OSError):
                    os.dup2(_inert_fds[0], fd, inheritable=False)


os.register_at_fork(after_in_child=_replace_in_child)
