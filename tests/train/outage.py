"""A job whose lighthouse is a process of its own, which may die and be started again on the same port."""

import json
import os
import signal
import urllib.request
from pathlib import Path
from typing import Any

from tests.support.processes import Spawned, Spawner
from tests.train.job import Job, Running


class OutageJob(Job):
    """`with OutageJob(spawn, groups, state_dir) as job`: like Job, with `job.lighthouse` to kill and to start again."""

    def __init__(self, spawn: Spawner, groups: int, state_dir: Path, **settings: Any) -> None:
        super().__init__(groups)
        self._spawn = spawn
        self.state_dir = state_dir
        self.options = settings
        self.lighthouse: Spawned | None = None

    def __enter__(self) -> "OutageJob":
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        self.start_lighthouse()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.kill_lighthouse()

    def start_lighthouse(self, state_dir: Path | None = None) -> Spawned:
        """On the same port as before, if there was one."""
        port = int(self.address.rpartition(":")[2] or 0)
        settings = {"port": port, "state_dir": str(state_dir or self.state_dir), **self.options}
        self.lighthouse = self._spawn(["-m", "tests.train.doomed", json.dumps(settings)])
        self.address = self.lighthouse.expect_line("listening on").rpartition(" ")[2]
        return self.lighthouse

    def kill_lighthouse(self) -> None:
        if self.lighthouse is not None and self.lighthouse.is_alive():
            self.lighthouse.kill()
            self.lighthouse.wait()

    def doom(self, point: str) -> Spawned:
        """It dies when it comes to this point next."""
        assert self.lighthouse is not None
        self.lighthouse.send(point)
        self.lighthouse.expect_line("dies at")
        return self.lighthouse

    def kill_group(self, group: int) -> None:
        victim = self.running[group]
        assert victim.process.pid is not None
        os.kill(victim.process.pid, signal.SIGKILL)
        self.until_gone(victim)

    def status(self) -> dict[str, Any]:
        """Of the job, as the lighthouse tells it; empty when it knows no such job."""
        with urllib.request.urlopen(f"http://{self.address}/api/v1/status", timeout=10.0) as response:
            jobs: dict[str, dict[str, Any]] = json.load(response)["jobs"]
        return jobs.get("default", {})

    def living(self) -> list[Running]:
        return [member for member in self.running.values() if not member.has_ended]
