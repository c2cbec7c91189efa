"""Hosts in network namespaces of their own, behind one router that can lose any packets between any two of them.

What the router loses it loses in silence, as a switch or a firewall does: no RST, no ICMP. Only for root, on Linux.
"""

import contextlib
import ctypes
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator

_CLONE_NEWNET = 0x40000000
_numbers = itertools.count()
_libc = ctypes.CDLL(None, use_errno=True)


def why_not() -> str:
    """Why namespaces cannot be made here; "" where they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need the `ip` command (iproute2)"
    probe = subprocess.run(["unshare", "--net", "true"], capture_output=True, text=True)
    return f"this kernel gives no network namespaces: {probe.stderr.strip()}" if probe.returncode else ""


def enter(namespace: str) -> None:
    """Move the calling thread, and the threads that it starts from here on, into a namespace given by its file."""
    fd = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.setns(fd, _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"setns {namespace}")
    finally:
        os.close(fd)


@contextlib.contextmanager
def inside(namespace: str) -> Iterator[None]:
    """The calling thread is in this namespace until the block ends."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        enter(namespace)
        try:
            yield
        finally:
            enter(f"/proc/self/fd/{home}")
    finally:
        os.close(home)


class Hosts:
    """`with Hosts(["lighthouse", "0", "1"]) as hosts`: all can reach each other until `cut` or `lose`."""

    def __init__(self, names: Iterable[str]) -> None:
        self._prefix = f"es{os.getpid()}-{next(_numbers)}"
        self._router = f"{self._prefix}-router"
        self._numbers = {name: number for number, name in enumerate(names)}
        self._made: list[str] = []
        self._lost: dict[tuple[str, str], None] = {}

    def __enter__(self) -> "Hosts":
        try:
            self._make(self._router)
            _ip("netns", "exec", self._router, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
            for name, number in self._numbers.items():
                self._add(self._namespace(name), number)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def file(self, name: str) -> str:
        return f"/run/netns/{self._namespace(name)}"

    def address(self, name: str) -> str:
        return f"10.77.{self._numbers[name]}.2"

    def lose(self, sender: str, receiver: str) -> None:
        """From here on nothing that `sender` sends to `receiver` arrives."""
        if (sender, receiver) not in self._lost:
            self._lost[sender, receiver] = None
            self._rule("add", sender, receiver)

    def cut(self, these: Iterable[str], those: Iterable[str]) -> None:
        """Nothing arrives, either way."""
        for a, b in itertools.product(these, list(those)):
            self.lose(a, b)
            self.lose(b, a)

    def cut_off(self, *names: str) -> None:
        """These can reach each other, and nobody else."""
        self.cut(names, [name for name in self._numbers if name not in names])

    def slow(self, receiver: str, bytes_per_s: int) -> None:
        """From here on no more than that arrives at `receiver`, of everything together."""
        limit = ("tbf", "rate", f"{8 * bytes_per_s}bit", "burst", "128kb", "latency", "100ms")
        _run("tc", "-n", self._router, "qdisc", "add", "dev", f"v{self._numbers[receiver]}", "root", *limit)

    def heal(self) -> None:
        for sender, receiver in self._lost:
            self._rule("del", sender, receiver)
        self._lost.clear()

    def _rule(self, what: str, sender: str, receiver: str) -> None:
        rule = ("from", self.address(sender), "to", self.address(receiver), "blackhole")
        _ip("-n", self._router, "rule", what, *rule)

    def _namespace(self, name: str) -> str:
        return f"{self._prefix}-{name}"

    def _make(self, namespace: str) -> None:
        _ip("netns", "add", namespace)
        self._made.append(namespace)
        _ip("-n", namespace, "link", "set", "lo", "up")

    def _add(self, namespace: str, number: int) -> None:
        self._make(namespace)
        _ip("-n", self._router, "link", "add", f"v{number}", "type", "veth", "peer", "name", "eth0", "netns", namespace)
        _ip("-n", self._router, "addr", "add", f"10.77.{number}.1/30", "dev", f"v{number}")
        _ip("-n", self._router, "link", "set", f"v{number}", "up")
        _ip("-n", namespace, "addr", "add", f"10.77.{number}.2/30", "dev", "eth0")
        _ip("-n", namespace, "link", "set", "eth0", "up")
        _ip("-n", namespace, "route", "add", "default", "via", f"10.77.{number}.1")

    def _remove(self) -> None:
        while self._made:
            namespace = self._made.pop()
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)


def _ip(*words: str) -> None:
    _run("ip", *words)


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"{' '.join(words)}: {done.stderr.strip()}")
