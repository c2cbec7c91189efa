"""A replica group for test_training.py: trains until the step that the file of its argument names, once it is there."""

import os
import sys
from pathlib import Path

import torch

import everstep as es


def say(line: str) -> None:
    """In one piece: several processes write to one stream."""
    os.write(1, line.encode() + b"\n")


def main() -> None:
    torch.set_num_threads(1)
    group, end = os.environ["REPLICA_GROUP_ID"], Path(sys.argv[1])
    say(f"starts {group} {os.environ['TORCHELASTIC_RESTART_COUNT']} {os.getpid()}")
    net = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
    inputs = torch.randn(32, 16)
    last = sys.maxsize
    with es.Manager() as manager:
        model = es.DistributedDataParallel(manager, net)
        optimizer = es.Optimizer(manager, torch.optim.SGD(model.parameters(), lr=0.01))
        while manager.current_step() < last:
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(model(inputs), inputs.sum(1, keepdim=True)).backward()  # type: ignore[no-untyped-call]
            result = optimizer.step()
            if result.step % 5 == 0:
                say(f"group {group} step {result.step} of {result.participants}")
                if end.exists():
                    last = int(end.read_text())
    say(f"group {group} done {last}")


if __name__ == "__main__":
    main()
