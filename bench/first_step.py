"""How long does a process take from its start to the first step that it contributed to? For live_recovery.py.

    python bench/first_step.py LIGHTHOUSE GROUP    (one replica group: its state is 1 MB, its steps take 10 ms)

Two groups train; a third one is started, makes a step with them, and is killed, again and again. In turns with it a
process that does nothing but `import torch`.
"""

import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

import everstep as es

DEADLINE_S = 120.0


def train(lighthouse: str, group: str) -> None:
    """Prints the monotonic clock whenever a step was made with more or fewer groups than the one before."""
    torch.set_num_threads(1)
    before = 0
    with es.Manager(lighthouse=lighthouse, replica_group_id=group, min_replicas=2) as manager:
        net = torch.nn.Linear(512, 512, bias=False)
        model = es.DistributedDataParallel(manager, net)
        optimizer = es.Optimizer(manager, torch.optim.SGD(net.parameters(), lr=0.1))
        while True:
            optimizer.zero_grad()
            model(torch.ones(4, 512)).sum().backward()
            time.sleep(0.01)  # stands for an accelerator that is busy
            result = optimizer.step()
            if result and result.participants != before:
                before = result.participants
                print(before, time.monotonic(), flush=True)


def measure(times: int) -> dict[str, float]:
    """Seconds, medians."""
    from everstep.config import LighthouseSettings
    from everstep.lighthouse.app import Lighthouse

    alone: list[float] = []
    joined: list[float] = []
    with Lighthouse.in_thread(LighthouseSettings(port=0)) as lighthouse:
        with _running(lighthouse.address, 0) as first, _running(lighthouse.address, 1) as second:
            survivors = (first, second)
            for number in range(times):
                for survivor in survivors:
                    _wait_for(survivor, 2)
                began_at = time.monotonic()
                command = [sys.executable, "-c", "import torch, time; print(time.monotonic())"]
                done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=DEADLINE_S)
                alone.append(float(done.stdout) - began_at)
                began_at = time.monotonic()
                with _running(lighthouse.address, 2 + number) as joiner:  # one that dies again and again has to wait
                    joined.append(_wait_for(joiner, 3) - began_at)
    beyond = statistics.median(both - one for both, one in zip(joined, alone, strict=True))
    return {"start_s": statistics.median(joined), "torch_s": statistics.median(alone), "beyond_s": beyond}


@contextmanager
def _running(lighthouse: str, group: int) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, __file__, lighthouse, str(group)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _wait_for(process: "subprocess.Popen[str]", participants: int) -> float:
    """The time of its first step with so many since it was asked last."""
    assert process.stdout is not None
    late = threading.Timer(DEADLINE_S, process.kill)
    late.start()
    try:
        for line in process.stdout:
            count, at = line.split()
            if int(count) == participants:
                return float(at)
    finally:
        late.cancel()
    raise RuntimeError("a group ended early, or did not get on")


if __name__ == "__main__":
    train(*sys.argv[1:3])
