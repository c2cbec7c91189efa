"""Plain torch.distributed, without a Manager: who hangs in a collective is told by stacks."""

from pathlib import Path

import pytest

from everstep.monitor.events import RankHung
from tests.monitor.agent import Agent, limits
from tests.support.processes import Spawner

SOURCE = """
import threading, torch, torch.distributed as dist
import everstep as es
torch.set_num_threads(1)
rank = {rank}
dist.init_process_group("gloo", init_method="file://{store}", rank=rank, world_size=4)
def slow_layer():
    threading.Event().wait()
for step in range(4):
    es.heartbeat()
    if step == 3 and rank == 2:
        slow_layer()
    dist.all_reduce(torch.ones(4))
"""


@pytest.mark.soak
def test_of_four_ranks_in_a_collective_the_one_that_is_not_is_named(spawn: Spawner, tmp_path: Path) -> None:
    with Agent(spawn, limits(heartbeat=3.0)) as agent:
        for rank in range(4):
            agent.start(rank, SOURCE.format(rank=rank, store=tmp_path / "store"))
        event = agent.expect(RankHung, deadline_s=90.0)
        assert event.culprit == 2, event.report()
        assert "in slow_layer" in event.stacks[2]
        assert sum(rank != 2 for rank, _ in event.waiting) >= 2
        for process in (rank.spawned for rank in agent.ranks.values()):
            if process.is_alive():
                process.kill()
            process.wait()


LOADER = """
from everstep.monitor.first import show_stacks_on_request
show_stacks_on_request()  # as whoever starts a worker does, before its script
import threading, torch
from torch.utils.data import DataLoader, Dataset
import everstep as es
torch.set_num_threads(1)
class Stuck(Dataset):
    def __len__(self): return 8
    def __getitem__(self, number):
        if number == 5:
            reads_a_file()
        return torch.ones(2)
def reads_a_file():
    threading.Event().wait()
if __name__ == "__main__":
    for batch in DataLoader(Stuck(), num_workers=1, multiprocessing_context="fork"):
        es.heartbeat()
"""


@pytest.mark.soak
def test_a_data_loaders_worker_that_hangs_is_shown_with_the_rank_that_waits_for_it(
    spawn: Spawner, tmp_path: Path
) -> None:
    with Agent(spawn, limits(heartbeat=3.0)) as agent:
        agent.start(0, LOADER)
        event = agent.expect(RankHung, deadline_s=90.0)
        agent.ranks[0].spawned.wait()
    rank, _, child = event.stacks[0].partition("a child of it")
    assert "torch/utils/data/dataloader.py" in rank
    assert "in reads_a_file" in child, event.report()
