"""A forked child lets go of guarded descriptors; its parent keeps them."""

import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterable

from everstep import fork_guard

DEADLINE_S = 10.0


def run_in_child(act: str, fd: int) -> int:
    """Fork; the child exits with whether `fd` is a socket (1) or not (0), as `act` names it."""
    pid = os.fork()
    if pid == 0:
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
            os._exit(1 if target.startswith(act) else 0)
        except BaseException:  # boundary: nothing of the child may reach the test runner
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_child_holds_an_inert_descriptor_in_place_of_a_guarded_one() -> None:
    with socket.socket() as guarded, socket.socket() as other:
        lift = fork_guard.guard(lambda: [guarded.fileno()])
        assert run_in_child("/dev/null", guarded.fileno()) == 1
        assert run_in_child("socket:", other.fileno()) == 1
        assert os.readlink(f"/proc/self/fd/{guarded.fileno()}").startswith("socket:")
        lift()
        lift()
        assert run_in_child("socket:", guarded.fileno()) == 1


def test_a_child_lets_go_of_a_duplicate_of_a_guarded_socket_too() -> None:
    with socket.socket() as guarded, guarded.dup() as duplicate, socket.socket() as other:
        lift = fork_guard.guard(lambda: [guarded.fileno()])
        assert run_in_child("/dev/null", duplicate.fileno()) == 1
        assert run_in_child("socket:", other.fileno()) == 1
        lift()


def test_a_guard_that_fails_or_lists_a_closed_descriptor_hinders_neither_the_fork_nor_the_others() -> None:
    def broken() -> Iterable[int]:
        raise RuntimeError("broken")

    with socket.socket() as guarded:
        lifts = [fork_guard.guard(broken), fork_guard.guard(lambda: [10_000_000, guarded.fileno()])]
        assert run_in_child("/dev/null", guarded.fileno()) == 1
        for lift in lifts:
            lift()


def test_the_peer_sees_the_end_although_a_forked_child_lives_on() -> None:
    near, far = socket.socketpair()
    lift = fork_guard.guard(lambda: [near.fileno()])
    release_read, release_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(release_write)
        os.read(release_read, 1)
        os._exit(0)
    try:
        near.close()
        far.settimeout(DEADLINE_S)
        assert select.select([far], [], [], DEADLINE_S)[0]
        assert far.recv(1) == b""
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    finally:
        lift()
        far.close()
        os.close(release_read)
        os.close(release_write)
        os.waitpid(pid, 0)


def test_it_needs_no_torch() -> None:
    code = "import sys, everstep.fork_guard; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=DEADLINE_S, check=False).returncode == 0
