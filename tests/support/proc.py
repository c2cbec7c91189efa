"""What /proc says about processes and sockets: read-only, and tolerant of processes that end meanwhile."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LISTENING = "0A"  # state column of /proc/net/tcp


@dataclass(frozen=True, kw_only=True)
class Stat:
    """The fields of /proc/PID/stat that tests ask for. `started` (clock ticks) tells a reused pid apart."""

    pid: int
    state: str
    parent: int
    session: int
    started: int


def stat_of(pid: int) -> Stat | None:
    """None when there is no such process any more."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text[text.rindex(")") + 2 :].split()  # the name in parentheses may hold anything
    return Stat(pid=pid, state=fields[0], parent=int(fields[1]), session=int(fields[3]), started=int(fields[19]))


def is_alive(pid: int) -> bool:
    """Whether it still runs. A zombie is dead: it holds no socket, file or memory."""
    stat = stat_of(pid)
    return stat is not None and stat.state not in "ZX"


def is_same_alive(seen: Stat) -> bool:
    """Whether the process seen then still runs, and its pid has not passed to another."""
    stat = stat_of(seen.pid)
    return stat is not None and stat.started == seen.started and stat.state not in "ZX"


def every_process() -> Iterator[Stat]:
    for name in os.listdir("/proc"):
        if name.isdigit() and (stat := stat_of(int(name))) is not None and stat.state not in "ZX":
            yield stat


def of_session(leader: int) -> list[Stat]:
    """Live processes of the session that `leader` started; orphans stay in it."""
    return [stat for stat in every_process() if stat.session == leader]


def descendants(pid: int) -> list[Stat]:
    """Live children, grandchildren, ...; orphans are no longer among them."""
    children: dict[int, list[Stat]] = {}
    for stat in every_process():
        children.setdefault(stat.parent, []).append(stat)
    found: list[Stat] = []
    parents = [pid]
    while parents:
        below = children.get(parents.pop(), [])
        found += below
        parents += [stat.pid for stat in below]
    return found


def with_environment(entry: str) -> list[Stat]:
    """Live processes that were started with `NAME=value` in their environment."""
    wanted = entry.encode()
    found = []
    for stat in every_process():
        try:
            environment = Path(f"/proc/{stat.pid}/environ").read_bytes()
        except OSError:
            continue
        if wanted in environment.split(b"\0"):
            found.append(stat)
    return found


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return "(ended)"


def listening_sockets(pid: int) -> set[str]:
    """TCP sockets that this process listens on, as `address:port` in the kernel's hexadecimal, and their inode."""
    inodes = set()
    for fd in _listdir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(f"/proc/{pid}/fd/{fd}")
        except OSError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    found = set()
    for table in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == LISTENING and fields[9] in inodes:
                found.add(f"port {int(fields[1].rpartition(':')[2], 16)} (inode {fields[9]})")
    return found


def mapped_files() -> set[str]:
    """Paths of all files that some live process has mapped or open under /dev/shm."""
    found = set()
    for stat in every_process():
        try:
            maps = Path(f"/proc/{stat.pid}/maps").read_text()
        except OSError:
            continue
        found |= {line[line.index("/dev/shm/") :] for line in maps.splitlines() if "/dev/shm/" in line}
        for fd in _listdir(f"/proc/{stat.pid}/fd"):
            try:
                target = os.readlink(f"/proc/{stat.pid}/fd/{fd}")
            except OSError:
                continue
            if target.startswith("/dev/shm/"):
                found.add(target)
    return found


def _listdir(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []
