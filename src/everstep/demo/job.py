"""The demo's job: `everstep run` as anybody would start it, and a socket on which its workers report.

What the agent and the workers write goes into one file, which is shown when something fails. The workers take the
demo's end for theirs, and the agent follows them.
"""

import contextlib
import dataclasses
import json
import selectors
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

STOP_S = 5.0  # for the workers to end, once their agent was killed
FINISH_S = 20.0
MESSAGE_BYTES_MAX = 4096
LINES_SHOWN = 20
# What would make another job of it: settings of one that this shell belongs to, or of the shell's cluster.
FOREIGN = ("EVERSTEP_", "PET_", "SLURM_", "TORCHELASTIC_", "REPLICA_GROUP_", "NUM_REPLICA_", "JOB_COMPLETION_INDEX")


@dataclasses.dataclass(frozen=True)
class Report:
    """What a worker said, as in demo/worker.py; None: its connection has ended, and most likely it has, too."""

    connection: socket.socket
    fields: dict[str, Any] | None


class Job:
    """Context manager: every process of the job has ended when the block has."""

    def __init__(self, groups: int, environ: Mapping[str, str], folder: Path) -> None:
        self._arguments = ["run", "--replica-groups", str(groups), "--max-restarts", "1", "-m", "everstep.demo.worker"]
        # On the CPU whatever the machine has: its devices might not divide among the groups.
        own = {"CUDA_VISIBLE_DEVICES": "", "TORCH_CPP_LOG_LEVEL": "ERROR", "TMPDIR": str(folder)}
        self._environment = {name: value for name, value in environ.items() if not name.startswith(FOREIGN)} | own
        self._address = str(folder / "reports")
        self._log = folder / "job.log"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._selector = selectors.DefaultSelector()
        self._agent: subprocess.Popen[bytes] | None = None

    @property
    def command(self) -> str:
        """What starts the same job by hand; its workers print their reports, and train until they are told to end."""
        return shlex.join(["everstep", *self._arguments])

    def __enter__(self) -> "Job":
        self._listener.bind(self._address)
        self._listener.listen()
        self._selector.register(self._listener, selectors.EVENT_READ)
        with self._log.open("wb") as log:
            self._agent = subprocess.Popen(
                [sys.executable, "-m", "everstep.cli", *self._arguments, self._address],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a Ctrl-C is the demo's to answer
            )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._agent is not None
        if self._agent.poll() is None:  # on the way of an error, or a Ctrl-C
            self._agent.kill()  # its workers end with it
            self._agent.wait()
            deadline = time.monotonic() + STOP_S
            while self._connections() and time.monotonic() < deadline:
                list(self.reports(STOP_S))  # their connections' ends
        self._dismiss()
        self._listener.close()
        self._selector.close()

    @property
    def exit_code(self) -> int | None:
        """Of the agent; None while it runs."""
        assert self._agent is not None
        return self._agent.poll()

    def reports(self, timeout_s: float) -> Iterator[Report]:
        """What arrives within the time; returns early once something did."""
        for key, _ in self._selector.select(timeout_s):
            if key.fileobj is self._listener:
                self._selector.register(self._listener.accept()[0], selectors.EVENT_READ)
                continue
            connection = key.fileobj
            assert isinstance(connection, socket.socket)
            try:
                message = connection.recv(MESSAGE_BYTES_MAX)
            except ConnectionResetError:  # it died with orders unread
                message = b""
            if not message:
                self._selector.unregister(connection)
                connection.close()
            yield Report(connection, json.loads(message) if message else None)

    def tell_stop(self, step: int) -> None:
        for connection in self._connections():
            with contextlib.suppress(OSError):  # one that has died: its end is reported, too
                connection.send(str(step).encode())

    def finish(self) -> int | None:
        """Dismiss the workers; the agent's exit code, None where it does not end in time."""
        self._dismiss()
        assert self._agent is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._agent.wait(FINISH_S)
        return None

    def last_lines(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return "\n".join(lines[-LINES_SHOWN:]) or "nothing was logged"

    def _connections(self) -> list[socket.socket]:
        found = [key.fileobj for key in self._selector.get_map().values()]
        return [file for file in found if isinstance(file, socket.socket) and file is not self._listener]

    def _dismiss(self) -> None:
        for connection in self._connections():
            self._selector.unregister(connection)
            connection.close()
