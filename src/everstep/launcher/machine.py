"""What this machine is, as far as settings depend on it: its devices, CPUs, names and addresses. No torch."""

import ast
import importlib.util
import ipaddress
import os
import re
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from everstep.config import is_loopback

LINE = re.compile(r"^(cuda|hip)\b[^=]*=\s*(.+)$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """`devices`: as CUDA_VISIBLE_DEVICES would list those that a process here sees. `is_here`: is that host this one?

    `accelerator`: what the installed torch was built for, "cuda", "hip" or "cpu".
    """

    environ: Mapping[str, str] = field(repr=False)
    hostname: str
    pid: int
    python: str
    cpus: int
    accelerator: str
    devices: tuple[str, ...]
    is_here: Callable[[str], bool]


def this_machine(environ: Mapping[str, str]) -> Machine:
    """Looks at /proc, /dev and the installed torch's version file; asks no name server yet."""
    accelerator = torch_accelerator()
    return Machine(
        environ=environ,
        hostname=socket.gethostname(),
        pid=os.getpid(),
        python=sys.executable,
        cpus=len(os.sched_getaffinity(0)),
        accelerator=accelerator,
        devices=cuda_devices(environ) if accelerator == "cuda" else (),
        is_here=is_this_host,
    )


def cuda_devices(environ: Mapping[str, str], root: Path = Path("/")) -> tuple[str, ...]:
    """Those that the CUDA driver would show: as CUDA_VISIBLE_DEVICES says, up to the first that is not there.

    A container has all devices in /proc but only its own in /dev; a machine whose driver sleeps has them only in /proc.
    """
    in_proc = _count(root / "proc/driver/nvidia/gpus", re.compile(r"[0-9a-fA-F]+:.*"))
    in_dev = _count(root / "dev", re.compile(r"nvidia[0-9]+"))
    count = min(in_proc, in_dev) if in_proc and in_dev else max(in_proc, in_dev)
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return tuple(str(index) for index in range(count))
    found: list[str] = []
    for entry in (entry.strip() for entry in visible.split(",")):
        is_index = entry.isascii() and entry.isdigit() and int(entry[:9]) < count
        is_uuid = entry.startswith(("GPU-", "MIG-")) and count > 0
        if not (is_index or is_uuid):
            break
        if entry in found:
            return ()  # the driver shows none then
        found.append(entry)
    return tuple(found)


def torch_accelerator() -> str:
    """What the installed torch was built for, read from its version file: importing it would take seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return "cuda"  # workers may have another interpreter
    try:
        text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
        built_for = {name: ast.literal_eval(value.strip()) for name, value in LINE.findall(text)}
    except (OSError, ValueError, SyntaxError):
        return "cuda"
    if built_for.get("hip"):
        return "hip"
    return "cuda" if built_for.get("cuda", True) else "cpu"


def is_this_host(host: str) -> bool:
    """Whether `host` (a name or an address) is one of this machine's. Asks the resolver."""
    if is_loopback(host) or host in (socket.gethostname(), socket.getfqdn()):
        return True
    return any(_is_own(address) for address in _addresses(host))


def _addresses(host: str) -> list[str]:
    try:
        return [str(ipaddress.ip_address(host))]
    except ValueError:
        pass
    try:
        return [str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    except (OSError, UnicodeError):
        return []


def _is_own(address: str) -> bool:
    """A packet to an address of one's own has it as its sender, too. Nothing is sent."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))
            return str(probe.getsockname()[0]) == address
    except OSError:
        return False


def _count(folder: Path, pattern: re.Pattern[str]) -> int:
    try:
        return sum(bool(pattern.fullmatch(name)) for name in os.listdir(folder))
    except OSError:
        return 0
