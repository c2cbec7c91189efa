"""How long do the survivors of a job stand still for a joiner, beyond its transfer? For live_recovery.py."""

import logging
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import everstep as es
from everstep.config import LighthouseSettings
from everstep.lighthouse.app import Lighthouse

DEADLINE_S = 300.0
TENSORS = 64

spawn = multiprocessing.get_context("spawn")


def pauses(mib: int, times: int) -> dict[str, Any]:
    found: list[float] = []
    fetches: list[float] = []
    for _ in range(times):
        fetch_s, longest_s = _join_once(mib)
        found.append((longest_s - fetch_s) * 1e3)
        fetches.append(fetch_s * 1e3)
    return {"beyond_ms": statistics.median(found), "worst_ms": max(found), "fetch_ms": statistics.median(fetches)}


def _join_once(mib: int) -> tuple[float, float]:
    """Seconds of the joiner's transfer, and by which the slower survivor's longest step exceeded its others."""
    heard: list[list[Any]] = [[], [], []]
    groups: list[tuple[Any, Any]] = []
    with Lighthouse.in_thread(LighthouseSettings(port=0)) as lighthouse:
        try:
            groups += [_start(lighthouse.address, group, mib) for group in (0, 1)]
            _hear(groups, heard, lambda: min(_count(heard[g], 2) for g in (0, 1)) > 50)
            groups.append(_start(lighthouse.address, 2, mib))
            _hear(groups, heard, lambda: min(_count(h, 3) for h in heard) > 10)
        finally:
            for process, pipe in groups:
                process.kill()
                process.join()
                pipe.close()
    steps = [[value for kind, _, value in heard[group][50:] if kind == "step"] for group in (0, 1)]
    fetch_s = max(value for kind, _, value in heard[2] if kind == "fetched")
    return fetch_s, max(max(took) - statistics.median(took) for took in steps)


def _start(address: str, group: int, mib: int) -> tuple[Any, Any]:
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=train, args=(address, group, mib, theirs), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _count(heard: list[Any], participants: int) -> int:
    return sum(kind == "step" and count == participants for kind, count, _ in heard)


def _hear(groups: list[tuple[Any, Any]], heard: list[list[Any]], is_enough: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not is_enough():
        if time.monotonic() > deadline:
            raise TimeoutError("the job does not get on")
        for number in range(len(groups)):
            while groups[number][1].poll(0.005):
                heard[number].append(groups[number][1].recv())


def train(address: str, group: int, mib: int, pipe: Any) -> None:
    """A replica group whose steps are quick and whose state is large: most of it is frozen."""
    torch.set_num_threads(1)
    size = (mib << 20) // TENSORS // 4
    tensors = [torch.full((size,), float(group)) for _ in range(TENSORS)]
    ballast = torch.nn.ParameterList(torch.nn.Parameter(tensor, requires_grad=False) for tensor in tensors)
    net = torch.nn.Linear(16, 16)
    fetched = _Lines(pipe)
    logging.getLogger("everstep").addHandler(fetched)
    logging.getLogger("everstep").setLevel(logging.INFO)
    with es.Manager(lighthouse=address, replica_group_id=group, min_replicas=2) as manager:
        model = es.DistributedDataParallel(manager, net)
        manager.register("ballast", ballast)
        optimizer = es.Optimizer(manager, torch.optim.SGD(net.parameters(), lr=0.1))
        while not pipe.poll():
            began_at = time.monotonic()
            optimizer.zero_grad()
            model(torch.ones(4, 16)).sum().backward()
            time.sleep(0.01)  # stands for an accelerator that is busy
            optimizer.step()
            pipe.send(("step", manager.num_participants(), time.monotonic() - began_at))


class _Lines(logging.Handler):
    def __init__(self, pipe: Any) -> None:
        super().__init__()
        self._pipe = pipe

    def emit(self, record: logging.LogRecord) -> None:
        if (found := re.search(r"recovered step=.* fetch_ms=([\d.]+)", record.getMessage())) is not None:
            self._pipe.send(("fetched", 0, float(found[1]) / 1e3))
