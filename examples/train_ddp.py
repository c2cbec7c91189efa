"""Data-parallel training that survives its replica groups: the usual loop, with five lines of Everstep.

One shell for the lighthouse, one for each replica group (kill any of them, start it again):

    everstep lighthouse --min-replicas 1
    EVERSTEP_LIGHTHOUSE=localhost:29520 NUM_REPLICA_GROUPS=2 REPLICA_GROUP_ID=0 python examples/train_ddp.py
    EVERSTEP_LIGHTHOUSE=localhost:29520 NUM_REPLICA_GROUPS=2 REPLICA_GROUP_ID=1 python examples/train_ddp.py

Without EVERSTEP_LIGHTHOUSE the same script trains alone.
"""

import argparse
import logging

import torch
from torch.utils.data import DataLoader, TensorDataset

import everstep as es


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")

    inputs = torch.randn(4096, 16, generator=torch.Generator().manual_seed(0))
    dataset = TensorDataset(inputs, inputs.sum(1, keepdim=True).sin())
    net = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))

    with es.Manager() as manager:
        model = es.DistributedDataParallel(manager, net)
        optimizer = es.Optimizer(manager, torch.optim.AdamW(model.parameters(), lr=1e-3))
        sampler = es.DistributedSampler(manager, dataset, batch_size=32)
        loader = DataLoader(dataset, batch_sampler=sampler)
        for epoch in range(1000):
            sampler.set_epoch(epoch)
            for x, y in sampler.batches(loader):
                optimizer.zero_grad()
                loss = torch.nn.functional.mse_loss(model(x), y)
                loss.backward()
                result = optimizer.step()
                if result.step % 20 == 0:
                    print(f"step {result.step} loss {loss.item():.4f} participants {result.participants}", flush=True)
                if result.step >= args.steps:
                    return


if __name__ == "__main__":
    main()
