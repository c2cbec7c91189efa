"""The demo's workers as processes: started, read, told to stop, killed, and gone at the end."""

import contextlib
import dataclasses
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

STOP_S = 10.0


@dataclasses.dataclass
class Worker:
    """One start of one replica group."""

    group: int
    process: subprocess.Popen[bytes]
    started_at: float
    log: Path
    rest: bytes = b""

    @property
    def stdout(self) -> IO[bytes]:
        assert self.process.stdout is not None
        return self.process.stdout


@dataclasses.dataclass(frozen=True)
class Report:
    """A line that a worker wrote; `fields` as in demo/worker.py. None: its output has ended."""

    worker: Worker
    fields: dict[str, Any] | None


class Workers:
    """Context manager: every process that it started has ended when the block has."""

    def __init__(self, environment: dict[str, str], folder: Path) -> None:
        self._environment = environment
        self._folder = folder
        self._selector = selectors.DefaultSelector()
        self._all: list[Worker] = []

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._all:
            with contextlib.suppress(OSError):
                assert worker.process.stdin is not None
                worker.process.stdin.close()  # it ends by itself when its orders do
        deadline = time.monotonic() + STOP_S
        for worker in self._all:
            try:
                worker.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.kill(worker)
            worker.stdout.close()
        self._selector.close()

    def start(self, group: int) -> Worker:
        log = self._folder / f"group{group}-{len(self._all)}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "everstep.demo.worker"],
                env={**self._environment, "REPLICA_GROUP_ID": str(group)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
            )
        worker = Worker(group, process, time.monotonic(), log)
        os.set_blocking(worker.stdout.fileno(), False)
        self._selector.register(worker.stdout, selectors.EVENT_READ, worker)
        self._all.append(worker)
        return worker

    def kill(self, worker: Worker) -> float:
        """SIGKILL, and the instant of it."""
        killed_at = time.monotonic()
        worker.process.send_signal(signal.SIGKILL)
        worker.process.wait()
        return killed_at

    def tell_stop(self, worker: Worker, step: int) -> None:
        assert worker.process.stdin is not None
        worker.process.stdin.write(f"stop {step}\n".encode())
        worker.process.stdin.flush()

    def reports(self, timeout_s: float) -> Iterator[Report]:
        """What arrives within the time; returns early once something did."""
        for key, _ in self._selector.select(timeout_s):
            worker: Worker = key.data
            chunk = worker.stdout.read()
            if not chunk:
                self._selector.unregister(worker.stdout)
                yield Report(worker, None)
                continue
            *lines, worker.rest = (worker.rest + chunk).split(b"\n")
            for line in lines:
                yield Report(worker, json.loads(line))
