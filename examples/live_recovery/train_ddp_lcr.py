"""A replica group joins a job that trains already, with its peers' live state. See the README beside this file."""

import argparse
import logging
import time

import torch
from torch.utils.data import DataLoader, TensorDataset

import everstep as es

SHOW_EVERY_S = 2.0

log = logging.getLogger("everstep.example")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps-together", type=int, default=200, help="end this many steps after the second came")
    args = parser.parse_args()
    es.configure_logging()
    inputs = torch.randn(4096, 16, generator=torch.Generator().manual_seed(0))
    dataset = TensorDataset(inputs, inputs.sum(1, keepdim=True).sin())
    net = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))

    with es.Manager() as manager:
        model = es.DistributedDataParallel(manager, net)
        optimizer = es.Optimizer(manager, torch.optim.AdamW(model.parameters(), lr=1e-3))
        sampler = es.DistributedSampler(manager, dataset, batch_size=32)
        loader = DataLoader(dataset, batch_sampler=sampler)
        shown_at, last_step = 0.0, 0
        for epoch in range(1_000_000):
            sampler.set_epoch(epoch)
            for x, y in sampler.batches(loader):
                optimizer.zero_grad()
                loss = torch.nn.functional.mse_loss(model(x), y)
                loss.backward()
                result = optimizer.step()
                if not last_step and result.participants == 2:
                    last_step = result.step + args.steps_together
                    log.info("step %d is the first that 2 groups committed", result.step)
                is_last = result.step == last_step
                if is_last or time.monotonic() - shown_at > SHOW_EVERY_S:
                    shown_at = time.monotonic()
                    log.info("step %d, %d groups, loss %.4f", result.step, result.participants, loss.item())
                if is_last:
                    log.info("the end: parameters sum to %.6f", sum(p.sum().item() for p in net.parameters()))
                    return


if __name__ == "__main__":
    main()
