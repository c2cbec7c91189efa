"""A stand-in for a node's agent: it is told what runs, and tells the lighthouse over a real link what becomes of it."""

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

from everstep.core.node_messages import NodeSpec
from everstep.link.auth import Credentials
from everstep.link.dial import LinkTarget
from everstep.link.node import NodeClient
from tests.train.job import Running

OPEN_S = 10.0


class StandInAgent:
    """`with StandInAgent(address) as agent`. Watches nothing by itself: `kill` is a death that is seen at once."""

    def __init__(self, lighthouse: str) -> None:
        target = LinkTarget(url=f"http://{lighthouse}", credentials=Credentials(job_id="default", role="node"))
        self.client = NodeClient(target, "", NodeSpec(node_id="stand-in", nonce=f"stand-in {os.getpid()}"))
        self.client.on_fence = self._fence
        self.client.vouch = self._vouch
        self._pids: dict[str, int] = {}
        self.asked: list[tuple[str, str]] = []  # (worker, state that was answered)
        self.fenced: list[str] = []
        self._changed = threading.Condition()

    def __enter__(self) -> "StandInAgent":
        self.client.start()
        assert self.client.wait_changed(lambda client: client.is_open, OPEN_S)
        return self

    def __exit__(self, *_: object) -> None:
        self.client.shutdown()

    def watch(self, *members: Running) -> None:
        """These processes are its workers from now on."""
        for member in members:
            assert member.process.pid is not None
            self._pids[member.plan.agent_token] = member.process.pid
            self.client.worker_started(member.plan.agent_token, member.process.pid)

    def kill(self, member: Running, detail: str = "SIGKILL") -> float:
        """Returns when it was reported."""
        assert member.process.pid is not None
        os.kill(member.process.pid, signal.SIGKILL)
        reported_at = time.monotonic()
        self.client.worker_ended(member.plan.agent_token, detail)
        return reported_at

    def wait_fenced(self, timeout_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: bool(self.fenced), timeout_s)

    # ---- the link's thread

    def _vouch(self, worker: str) -> str:
        state = ""
        with contextlib.suppress(OSError):
            state = Path(f"/proc/{self._pids[worker]}/stat").read_text().rpartition(")")[2].split()[0]
        self.asked.append((worker, state))
        return state

    def _fence(self, worker: str) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pids[worker], signal.SIGKILL)
        self.client.worker_ended(worker, "SIGKILL (fenced)")
        with self._changed:
            self.fenced.append(worker)
            self._changed.notify_all()


def token_of(group: int, rank: int = 0) -> str:
    return f"worker-{group}-{rank}"
