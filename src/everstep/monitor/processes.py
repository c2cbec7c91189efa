"""What /proc says of a rank's process and of those that it started."""

import dataclasses
import os

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclasses.dataclass(frozen=True)
class Process:
    pid: int
    state: str  # "" when it is gone
    group: int
    cpu_s: float


def process(pid: int) -> Process:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
        fields = text[text.rindex(b")") + 2 :].split()
        return Process(pid, fields[0].decode(), int(fields[2]), (int(fields[11]) + int(fields[12])) / _TICKS_PER_S)
    except (OSError, ValueError, IndexError):
        return Process(pid, "", 0, 0.0)


def in_group(group: int) -> list[int]:
    """Every process of a group, the oldest first."""
    pids = sorted(int(name) for name in os.listdir("/proc") if name.isdecimal())
    return [pid for pid in pids if process(pid).group == group]


def catches(pid: int, signal_number: int) -> bool:
    return _mask(f"/proc/{pid}/status", "SigCgt") >> (signal_number - 1) & 1 == 1


def is_handling(pid: int, signal_number: int, blocked_before: frozenset[int]) -> bool:
    """The signal waits, or a thread is in its handler: it blocks the signal, and did not before."""
    if _mask(f"/proc/{pid}/status", "ShdPnd") >> (signal_number - 1) & 1:
        return True
    return not blocking(pid, signal_number) <= blocked_before


def blocking(pid: int, signal_number: int) -> frozenset[int]:
    """Threads that block the signal now."""
    try:
        threads = [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except OSError:
        return frozenset()
    bit = signal_number - 1
    return frozenset(t for t in threads if _mask(f"/proc/{pid}/task/{t}/status", "SigBlk") >> bit & 1)


def _mask(path: str, name: str) -> int:
    try:
        with open(path, "rb") as file:
            text = file.read()
        at = text.index(name.encode())
        return int(text[at:].split(None, 2)[1], 16)
    except (OSError, ValueError, IndexError):
        return 0
