"""What went wrong, for people: torchrun's table of failed workers, the first one last.

First is the one whose exception was written first (`@record`'s error file), or whose death was seen first.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import shutil
import signal
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from everstep.launcher.starting import ExitStatus

__all__ = ["Failure", "failure_table", "first_failure", "hand_on_error_file"]

ERROR_BYTES_MAX = 1 << 20
NOT_AVAILABLE = "<N/A>"
HINT = "To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failure:
    """A worker that did not end cleanly. `at`: seconds since the epoch. `was_told`: it was asked to end before."""

    group: str
    rank: int
    local_rank: int
    pid: int
    status: ExitStatus
    at: float
    error_file: str = ""
    detail: str = ""  # why it never came to be, where it did not
    was_told: bool = False

    @property
    def since(self) -> float:
        """When it failed: the exception is older than the process's end."""
        with contextlib.suppress(OSError, ValueError):
            if self.error_file:
                return min(self.at, os.stat(self.error_file).st_mtime)
        return self.at


def first_failure(failures: Sequence[Failure]) -> Failure:
    """The root cause, as far as can be told: what was asked to end comes after what failed by itself."""
    return min(failures, key=lambda f: (f.was_told and not _message(f), f.since))


def failure_table(name: str, failures: Sequence[Failure]) -> str:
    """`name` is what was run."""
    first = first_failure(failures)
    others = [failure for failure in failures if failure is not first]
    texts = {id(failure): _described(number, failure) for number, failure in enumerate(failures)}
    title = f"{name} FAILED"
    width = min(60, max(len(title), *(len(line) for text in texts.values() for line in text.split("\n"))))
    return "\n".join(
        [
            "=" * width,
            title,
            "-" * width,
            "Failures:",
            *([texts[id(failure)] for failure in others] or ["  <NO_OTHER_FAILURES>"]),
            "-" * width,
            "Root Cause (first observed failure):",
            texts[id(first)],
            "=" * width,
        ]
    )


def hand_on_error_file(failure: Failure, target: str) -> None:
    """Where somebody above wants it (TORCHELASTIC_ERROR_FILE of the agent itself): the root cause's error file."""
    with contextlib.suppress(OSError):
        if failure.error_file and target and Path(failure.error_file).exists():
            shutil.copyfile(failure.error_file, target)


def _described(number: int, failure: Failure) -> str:
    status = failure.status
    name = f" ({_signal_name(status.signal)})" if status.signal is not None else ""
    oom = " out of memory" if status.is_oom_killed else ""
    code = -status.signal if status.signal is not None else status.code if status.code is not None else NOT_AVAILABLE
    message = _message(failure)
    group = f"\n  group     : {failure.group}" if failure.group else ""
    has_file = bool(failure.error_file) and Path(failure.error_file).exists()
    return (
        f"[{number}]:\n"
        f"  time      : {datetime.datetime.fromtimestamp(int(failure.since)).isoformat(sep='_')}\n"
        f"  host      : {socket.getfqdn()}{group}\n"
        f"  rank      : {failure.rank} (local_rank: {failure.local_rank})\n"
        f"  exitcode  : {code} (pid: {failure.pid}){name}{oom}\n"
        f"  error_file: {failure.error_file if has_file else NOT_AVAILABLE}\n"
        f"  traceback : {message or _without_message(failure)}"
    )


def _without_message(failure: Failure) -> str:
    status = failure.status
    if failure.detail:
        return failure.detail
    if status.signal is not None:
        return f"Signal {status.signal} ({_signal_name(status.signal)}) received by PID {failure.pid}"
    return HINT


def _message(failure: Failure) -> str:
    """From the error file; "" without one, or where it is no such thing: workers write it."""
    if not failure.error_file:
        return ""
    try:
        with open(failure.error_file, encoding="utf-8", errors="replace") as file:
            content: Any = json.loads(file.read(ERROR_BYTES_MAX))
        message = content["message"]
        if isinstance(message, dict):
            extra = message.get("extraInfo")
            stack = extra.get("py_callstack") if isinstance(extra, dict) else None
            message = stack or message.get("message") or NOT_AVAILABLE
        return str(message).replace("\n", "\n  ")
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _signal_name(number: int | None) -> str:
    try:
        return signal.Signals(number or 0).name
    except ValueError:
        return NOT_AVAILABLE
