"""torchrun's agents as real processes on one lighthouse, for tests: started, killed by pid, and gone at the end."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from everstep.config import LighthouseSettings
from everstep.lighthouse.app import Lighthouse
from everstep.link.auth import Credentials
from everstep.link.dial import LinkTarget
from everstep.link.operate import job_status
from tests.support import proc
from tests.support.processes import Spawned, Spawner

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
DEADLINE_S = 90.0  # torchrun imports torch, and so does its worker; on a busy machine that takes a while

# What torchrun starts: all ranks add up ones, until the file is there. Says its place once, then every tenth step.
SCRIPT = """
import os, sys, torch, torch.distributed as dist
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
print(f"worker {os.getpid()} rank {rank} of {size} restarts {os.environ['TORCHELASTIC_RESTART_COUNT']}", flush=True)
step = 0
while True:
    total = torch.tensor([1.0, float(os.path.exists(sys.argv[1]))])
    dist.all_reduce(total)
    assert total[0] == size
    step += 1
    if step == 10:
        print(f"trains rank {rank} of {size}", flush=True)
    if total[1] > 0:
        break
dist.destroy_process_group()
print(f"done rank {rank} of {size}", flush=True)
"""


class ElasticJob:
    """One job id on one lighthouse."""

    def __init__(self, spawn: Spawner, folder: Path, address: str) -> None:
        self._spawn = spawn
        self._stop = folder / "stop"
        self._script = folder / "script.py"
        self._metadata = folder / "metadata"
        self._agents: list[Spawned] = []
        self.address = address

    def prepare(self) -> None:
        self._script.write_text(SCRIPT)
        _write_entry_points(self._metadata)

    def agent(self, nnodes: str, node_id: str, *more: str) -> Spawned:
        """`torchrun` with one worker; its conf may be added to by `--rdzv-conf=…` in `more`."""
        conf = ",".join([f"node_id={node_id}", "last_call_timeout=60", *more])
        path = os.pathsep.join([str(self._metadata), *filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)])])
        agent = self._spawn(
            [
                "-m",
                "torch.distributed.run",
                "--rdzv-backend=everstep",
                f"--rdzv-endpoint={self.address}",
                "--rdzv-id=elastic",
                f"--rdzv-conf={conf}",
                f"--nnodes={nnodes}",
                "--nproc-per-node=1",
                "--local-addr=127.0.0.1",
                "--monitor-interval=0.05",
                str(self._script),
                str(self._stop),
            ],
            env={"PYTHONPATH": path, "TORCH_CPP_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        )
        self._agents.append(agent)
        return agent

    def kill_all(self) -> None:
        """Workers have sessions of their own: what ends the agents does not end them."""
        for agent in self._agents:
            if agent.is_alive():
                kill_host(agent)

    def nodes(self) -> int:
        """How many the lighthouse has, those that wait for a place among them."""
        where = LinkTarget(url=f"http://{self.address}", credentials=Credentials(job_id="elastic"))
        (group,) = job_status(where)["rendezvous"].values()
        return int(group["nodes"])

    def end(self) -> None:
        """Let the workers finish."""
        self._stop.touch()


@contextlib.contextmanager
def elastic_job(spawn: Spawner, folder: Path) -> Iterator[ElasticJob]:
    with Lighthouse.in_thread(LighthouseSettings(port=0)) as lighthouse:
        job = ElasticJob(spawn, folder, lighthouse.address)
        job.prepare()
        try:
            yield job
        finally:
            job.kill_all()


def kill_host(agent: Spawned) -> None:
    """What the loss of a machine is: the agent and its workers end at once."""
    workers = proc.descendants(agent.pid)
    agent.kill()
    for worker in workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker.pid, signal.SIGKILL)


def _write_entry_points(folder: Path) -> None:
    """The project's entry points as its installation would have them, whatever is installed here."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        groups = tomllib.load(file)["project"]["entry-points"]
    info = folder / "everstep-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: everstep\nVersion: 0\n")
    lines = [
        line for group, names in groups.items() for line in (f"[{group}]", *(f"{k} = {v}" for k, v in names.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
