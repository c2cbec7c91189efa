"""Replica groups under torchrun's own agents: over several nodes, restarted by them, and of different sizes."""

import contextlib
import dataclasses
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from everstep.config import LighthouseSettings
from everstep.lighthouse.app import Lighthouse
from tests.support.processes import Spawned, Spawner
from tests.support.waiting import wait_until
from tests.train.ranks import reserved_port

DEADLINE_S = 90.0
MARGIN_STEPS = 200  # that nobody has made when all have read where to stop

# Each rank appends to a file of its own; all ranks of all groups end after the step that `stop` names.
SCRIPT = """
import os, sys, threading
from pathlib import Path
import torch
import everstep as es

folder = Path(sys.argv[1])
group, rank = os.environ["REPLICA_GROUP_ID"], os.environ["RANK"]
torch.set_num_threads(1)
torch.manual_seed(int(group))
net = torch.nn.Linear(8, 1)
with open(folder / f"{group}.{rank}.log", "a", buffering=1) as log, es.Manager() as manager:
    print("PID", os.getpid(), file=log)
    model = es.DistributedDataParallel(manager, net)
    optimizer = es.Optimizer(manager, torch.optim.SGD(net.parameters(), lr=0.01))
    torch.manual_seed(7 + int(rank))
    step, stop = 0, folder / "stop"
    while not (stop.exists() and step >= int(stop.read_text())):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().mean().backward()
        result = optimizer.step()
        step = result.step
        print("STEP", step, int(result.committed), result.participants, file=log)
        threading.Event().wait(0.02)
    weights = " ".join(f"{w:.9g}" for p in net.parameters() for w in p.flatten().tolist())
    print("WEIGHTS", manager.lineage(), weights, file=log)
"""


@dataclasses.dataclass
class Rank:
    """What one rank of one group has written so far, over all of its starts."""

    path: Path

    def lines(self, kind: str) -> list[list[str]]:
        text = self.path.read_text() if self.path.exists() else ""
        whole = text[: text.rfind("\n") + 1].splitlines()
        return [line.split() for line in whole if line.startswith(kind + " ")]

    @property
    def pids(self) -> list[int]:
        return [int(line[1]) for line in self.lines("PID")]

    @property
    def step(self) -> int:
        steps = self.lines("STEP")
        return int(steps[-1][1]) if steps else 0

    @property
    def participants(self) -> int:
        steps = self.lines("STEP")
        return int(steps[-1][3]) if steps else 0


class Cluster:
    """Starts torchruns with the script; each of a group's runs is a node."""

    def __init__(self, spawn: Spawner, folder: Path, lighthouse: str, ports: contextlib.ExitStack) -> None:
        self.spawn = spawn
        self.folder = folder
        self.lighthouse = lighthouse
        self.ports = ports
        self.runs: list[Spawned] = []
        (folder / "script.py").write_text(SCRIPT)

    def start(self, group: int, *, nodes: int = 1, ranks_per_node: int, restarts: int = 0) -> list[Spawned]:
        endpoint = f"127.0.0.1:{self.ports.enter_context(reserved_port())}"
        options = ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", f"--rdzv-id={group}", f"--nnodes={nodes}"]
        options += [f"--nproc-per-node={ranks_per_node}", "--local-addr=127.0.0.1", f"--max-restarts={restarts}"]
        command = ["-m", "torch.distributed.run", *options, str(self.folder / "script.py"), str(self.folder)]
        env = {
            "EVERSTEP_LIGHTHOUSE": self.lighthouse,
            "REPLICA_GROUP_ID": str(group),
            "OMP_NUM_THREADS": "1",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
        }
        started = [self.spawn(command, env=env) for _ in range(nodes)]
        self.runs += started
        return started

    def rank(self, group: int, rank: int) -> Rank:
        return Rank(self.folder / f"{group}.{rank}.log")

    def until(self, is_reached: Callable[[], bool], what: str) -> None:
        try:
            wait_until(is_reached, DEADLINE_S, what=what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n" + "\n".join(run.output() for run in self.runs)) from None

    def stop(self, ranks: list[Rank], runs: list[Spawned]) -> None:
        """All end after the same step."""
        partial = self.folder / "stop.new"
        partial.write_text(str(max(rank.step for rank in ranks) + MARGIN_STEPS))
        partial.rename(self.folder / "stop")
        for run in runs:
            assert run.wait(DEADLINE_S) == 0, run.output()
        said = {tuple(rank.lines("WEIGHTS")[-1]) for rank in ranks if rank.path.name.endswith(".0.log")}
        assert len(said) == 1, said
        assert all(rank.lines("WEIGHTS") for rank in ranks)


@pytest.fixture
def cluster(spawn: Spawner, tmp_path: Path) -> Iterator[Cluster]:
    with contextlib.ExitStack() as ports, Lighthouse.in_thread(LighthouseSettings(port=0)) as lighthouse:
        yield Cluster(spawn, tmp_path, lighthouse.address, ports)


@pytest.mark.soak
@pytest.mark.parametrize("victim", [0, 1])
def test_a_group_over_two_nodes_trains_through_the_kill_of_a_rank_that_torchrun_starts_again(
    cluster: Cluster, victim: int
) -> None:
    """Two agents of one rank each, beside a group of two ranks on one node."""
    cluster.start(0, ranks_per_node=2)
    cluster.start(1, nodes=2, ranks_per_node=1, restarts=3)
    ranks = [cluster.rank(group, rank) for group in range(2) for rank in range(2)]
    cluster.until(lambda: all(r.participants == 2 and r.step >= 5 for r in ranks), "the two groups train together")
    stayers, returners = ranks[:2], ranks[2:]
    starts = [len(rank.pids) for rank in returners]
    os.kill(returners[victim].pids[-1], signal.SIGKILL)
    cluster.until(lambda: all(r.participants == 1 for r in stayers), "the other group goes on")
    cluster.until(
        lambda: all(len(r.pids) > n for r, n in zip(returners, starts, strict=True)), "both ranks start again"
    )
    cluster.until(lambda: all(r.participants == 2 for r in ranks), "the group is back")
    cluster.stop(ranks, cluster.runs)
    for rank in stayers:
        assert all(committed == "1" for _, _, committed, _ in rank.lines("STEP")), "no step was lost"


@pytest.mark.soak
def test_a_group_of_another_size_is_refused_and_the_others_go_on(cluster: Cluster) -> None:
    first = cluster.start(0, ranks_per_node=2)
    stayers = [cluster.rank(0, rank) for rank in range(2)]
    cluster.until(lambda: all(rank.step >= 5 for rank in stayers), "the first group trains")
    [other] = cluster.start(1, ranks_per_node=1)
    assert other.wait(DEADLINE_S) != 0
    assert "this replica group has 1 ranks, the others have 2: start every group" in other.output()
    step = max(rank.step for rank in stayers)
    cluster.until(lambda: all(r.step > step + 10 and r.participants == 1 for r in stayers), "the first group goes on")
    cluster.start(2, ranks_per_node=2)
    ranks = [*stayers, *(cluster.rank(2, rank) for rank in range(2))]
    cluster.until(lambda: all(rank.participants == 2 for rank in ranks), "one of the right size is let in")
    cluster.stop(ranks, [*first, cluster.runs[-1]])
    for rank in stayers:
        assert all(committed == "1" for _, _, committed, _ in rank.lines("STEP")), "no step was lost"
