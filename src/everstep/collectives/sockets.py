"""This process's TCP sockets, found through /proc, and how to sever some of them (Linux).

torch hands out no descriptor of what it opens. A socket is therefore recognised by its two ends, and remembered by
number and inode: a number alone may name another file by the time it is used. Nothing here keeps a duplicate: it
would hold back the FIN by which a peer learns that this process died.
"""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

Address = tuple[str, int]  # numeric host, port
_Opened = TypeVar("_Opened")

TCP_CLOSE, TCP_CLOSE_WAIT = 7, 8  # linux/tcp_states.h
EMPTYING_BYTES = 1 << 18
EMPTYING_MAX = 1000
ATTEMPTS_MAX = 20
LOOKS_MAX = 200
LOOK_PAUSE_S = 0.001
_TCP_FAMILIES = (socket.AF_INET, socket.AF_INET6)


@dataclass(frozen=True)
class OpenSocket:
    """A socket by descriptor number and inode; both together name it for as long as it is open."""

    fd: int
    inode: int


@dataclass(frozen=True, kw_only=True)
class Ends:
    """The two ends of a TCP socket; `remote` is None while it is not connected."""

    local: Address
    remote: Address | None
    is_listening: bool


def open_sockets() -> set[OpenSocket]:
    """Every socket that this process has open now."""
    return set(_each_socket())


def find_sockets(matches: Callable[[Ends], bool], among: Iterable[OpenSocket] | None = None) -> list[OpenSocket]:
    """The TCP sockets (of `among`, else of the process) whose ends match. Takes no lock: fit for a forked child."""
    found = []
    for candidate in _each_socket() if among is None else among:
        ends = ends_of(candidate)
        if ends is not None and matches(ends):
            found.append(candidate)
    return found


def find_lasting(matches: Callable[[Ends], bool], among: Iterable[OpenSocket]) -> list[OpenSocket]:
    """As `find_sockets`, without the duplicates through which another thread looks at some of them at that instant.

    A duplicate taken for a connection would seem to be closed a moment later.
    """
    found = find_sockets(matches, among)
    for _ in range(LOOKS_MAX):
        if len({opened.inode for opened in found}) == len(found):
            break
        time.sleep(LOOK_PAUSE_S)
        found = [opened for opened in found if is_open(opened)]
    return found


def ends_of(opened: OpenSocket) -> Ends | None:
    """None when it is gone, or is no TCP socket."""
    sock = _duplicate(opened)
    if sock is None:
        return None
    with sock:
        try:
            local = _numeric(sock.getsockname())
            is_listening = bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
        except OSError:
            return None
        try:
            remote = _numeric(sock.getpeername())
        except OSError:
            remote = None
        return Ends(local=local, remote=remote, is_listening=is_listening)


def is_open(opened: OpenSocket) -> bool:
    try:
        return os.fstat(opened.fd).st_ino == opened.inode
    except OSError:
        return False


def sever(sockets: Iterable[OpenSocket]) -> list[socket.socket]:
    """End the receiving side of each that is still open and connected; whoever waits on it wakes at once.

    Listening sockets are left alone: Gloo's accept loop ends the process when its listener is shut down. The sending
    side stays open, as does the whole connection while the caller keeps the returned duplicates: a peer that has not
    been told yet may still send into it. Were it reset instead, Gloo there could lose track of that very send.
    """
    severed = []
    for opened in sockets:
        sock = _duplicate(opened)
        if sock is not None:
            try:
                sock.getpeername()
                sock.shutdown(socket.SHUT_RD)
                severed.append(sock)
            except OSError:  # listening, or the peer has reset it
                sock.close()
    return severed


def has_peer_gone(opened: OpenSocket) -> bool:
    """Whether the far end has closed or reset it, as the kernel knows; who reads it here may not have come to that."""
    sock = _duplicate(opened)
    if sock is None:
        return True
    with sock:
        try:
            state = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
        except OSError:
            return True
    return state in (TCP_CLOSE, TCP_CLOSE_WAIT)


def is_emptied(opened: OpenSocket) -> bool:
    """Throw away what the kernel still holds for a severed connection; True once it is at its end: nothing follows."""
    sock = _duplicate(opened)
    if sock is None:
        return True
    with sock:
        try:
            sock.shutdown(socket.SHUT_RD)
            for _ in range(EMPTYING_MAX):
                if not sock.recv(EMPTYING_BYTES, socket.MSG_DONTWAIT):
                    return True
        except BlockingIOError:
            return False
        except OSError:  # reset
            return True
    return False


def open_recognised(open_it: Callable[[], _Opened], matches: Callable[[Ends], bool]) -> tuple[_Opened, OpenSocket]:
    """What `open_it` opens without saying which socket, and that socket: new, and matching.

    So may be what another thread opens at that instant; when more than one is new, nobody can tell whose they are:
    open once more. Raises OSError when that happens ATTEMPTS_MAX times in a row.
    """
    for _ in range(ATTEMPTS_MAX):
        with _turn:
            before = open_sockets()
            opened = open_it()
            found = find_sockets(matches, among=open_sockets() - before)
        if len(found) == 1:
            close_on_exec(found)
            return opened, found[0]
        del opened
    raise OSError(f"could not tell our own new socket from others, {ATTEMPTS_MAX} times in a row")


def close_on_exec(sockets: Iterable[OpenSocket]) -> None:
    """Keep them from programs that this process starts; torch and Gloo leave them inheritable."""
    for opened in sockets:
        with contextlib.suppress(OSError):
            os.set_inheritable(opened.fd, False)


def host_and_port(text: str) -> Address:
    """`host:port` or `[v6]:port` taken apart; ValueError when it is neither."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host:
        raise ValueError(f"{text!r} is not host:port")
    return host, int(port)


def joined(address: Address) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def route_to(address: Address) -> str:
    """The numeric local address from which this host reaches `address`; nothing is sent."""
    family, kind, protocol, _, target = socket.getaddrinfo(*address, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)
        return _numeric(probe.getsockname())[0]


def _each_socket() -> Iterator[OpenSocket]:
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:  # closed since it was listed
            continue
        if target.startswith("socket:["):
            yield OpenSocket(int(name), int(target[8:-1]))


def _duplicate(opened: OpenSocket) -> socket.socket | None:
    """A duplicate for the caller to close at once; None unless it still is that very TCP socket."""
    try:
        fd = os.dup(opened.fd)
    except OSError:
        return None
    try:
        if os.fstat(fd).st_ino == opened.inode:
            # SOCK_NONBLOCK is for Python's eyes: without it socket.setdefaulttimeout() of the user's would make
            # Python change the blocking mode of the socket, which the duplicate shares with the original.
            sock = socket.socket(type=socket.SOCK_STREAM | socket.SOCK_NONBLOCK, fileno=fd)
            fd = -1
            if (
                sock.family in _TCP_FAMILIES
                and sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) == socket.SOCK_STREAM
            ):
                return sock
            sock.close()
    except OSError:
        pass
    finally:
        if fd >= 0:
            os.close(fd)
    return None


def _numeric(name: tuple[str, int] | tuple[str, int, int, int]) -> Address:
    # An IPv4 peer of a socket that serves both families is written as IPv6; the rest of us says IPv4.
    return name[0].removeprefix("::ffff:"), name[1]


# One opening at a time, so that our own threads never confuse each other.
_turn = threading.Lock()


def _renew_turn() -> None:
    """In a forked child, where the thread that may have held it is not."""
    global _turn
    _turn = threading.Lock()


os.register_at_fork(after_in_child=_renew_turn)
