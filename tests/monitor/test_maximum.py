"""Timeouts that are calculated over all ranks of the default process group."""

import json
from pathlib import Path

import pytest
import torch.distributed as dist

from everstep.core.limits import WARM_UP
from everstep.monitor.beats import Beats
from everstep.monitor.client import RankMonitorClient
from tests.support.processes import Spawner

# Forks of one process that has imported torch: ranks 1, 2 of this one, 0.
RANKS = """
import json, os, signal, sys, threading, time
import torch, torch.distributed as dist
import everstep as es
from everstep.monitor import RankMonitorClient
torch.set_num_threads(1)
pause = threading.Event().wait
rank, pids = 0, []
for other in (1, 2):
    pid = os.fork()
    if pid == 0:
        rank = other
        break
    pids.append(pid)
dist.init_process_group("gloo", init_method="file://{store}", rank=rank, world_size=3)
client = RankMonitorClient(safety_factor=1.0, maximum_timeout_s={timeout})
client.init_workload_monitoring()
for _ in range(6):
    client.send_heartbeat()
    with es.section(("load", "save", "step")[rank]): pause(0.05 * (rank + 1))
    with es.section("all"): pass
def said():
    limits = {{**client.section_timeouts.section, "hb": client.hb_timeouts.subsequent}}
    line = json.dumps([rank, {{name: round(limit, 3) for name, limit in limits.items()}}])
    os.write(1, f"{{line}}\\n".encode())  # in one piece: the ranks share the pipe
{calls}
dist.destroy_process_group()
for pid in pids if rank == 0 else ():
    os.waitpid(pid, 0)
"""
MEET = """
client.calculate_and_set_hb_timeouts()
client.calculate_and_set_section_timeouts()
said()
"""
ONE_DIES = """
dist.barrier()
if rank == 2:
    os.kill(os.getpid(), signal.SIGKILL)
begun = time.monotonic()
client.calculate_and_set_hb_timeouts()
assert time.monotonic() - begun < 20.0
client.calculate_and_set_section_timeouts()
said()
"""
ONE_DOES_NOT_COME = """
if rank == 2:
    pause(3.0)
begun = time.monotonic()
client.calculate_and_set_hb_timeouts()
assert time.monotonic() - begun < 2.5
said()
ones = torch.ones(1)
dist.all_reduce(ones)  # the ranks have kept in step: those after it meet, each with its own
assert ones.item() == 3.0, ones
"""


def test_a_process_group_of_one_rank_has_its_own_intervals(tmp_path: Path) -> None:
    beats = Beats()
    client = RankMonitorClient(beats=beats, safety_factor=2.0)
    for _ in range(WARM_UP + 1):
        with beats.section("step"):
            pass
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        assert client.calculate_and_set_section_timeouts(["step"], calc_out_of_section=False)
        assert not client.calculate_and_set_section_timeouts(["never"], skip_if_not_ready=True)
    finally:
        dist.destroy_process_group()
    assert client.section_timeouts.section["step"] == pytest.approx(2.0 * beats.observed()["step"].longest_s)


@pytest.mark.soak
def test_the_largest_of_all_ranks_counts_though_they_were_in_other_sections(spawn: Spawner, tmp_path: Path) -> None:
    child = spawn(["-c", RANKS.format(store=tmp_path / "store", timeout=30.0, calls=MEET)])
    told = dict(json.loads(child.read_line(60.0)) for _ in range(3))
    assert child.wait(60.0) == 0
    assert len({limits["hb"] for limits in told.values()}) == 1
    assert len({limits["all"] for limits in told.values()}) == 1
    assert [sorted(told[rank]) for rank in range(3)] == [["all", "hb", name] for name in ("load", "save", "step")]
    assert told[0]["hb"] >= 0.15 > told[0]["load"]


@pytest.mark.soak
@pytest.mark.parametrize("calls", [ONE_DIES, ONE_DOES_NOT_COME], ids=["dies", "does not come"])
def test_when_a_rank_is_missing_the_others_have_their_own_and_go_on(spawn: Spawner, tmp_path: Path, calls: str) -> None:
    child = spawn(["-c", RANKS.format(store=tmp_path / "store", timeout=1.0, calls=calls)])
    told = dict(json.loads(child.read_line(60.0)) for _ in range(2 if calls is ONE_DIES else 3))
    assert child.wait(60.0) == 0
    assert told[0]["hb"] < told[1]["hb"]
    said = child.stderr_path.read_text()
    assert said.count("timeouts are calculated from this rank's intervals alone") == 2
