"""Two replica groups; one leaves, dies or is stopped at step 3, and the other goes on. See the README here."""

import argparse
import logging
import os
import signal
import threading
import time

import torch
from torch.utils.data import DataLoader, TensorDataset

import everstep as es

log = logging.getLogger("everstep.example")


def listen(failures: es.Subscription) -> None:
    """On a thread of its own: what happens to the job's members, as it happens. It informs; it decides nothing."""
    log.info("listener started")
    for event in failures:
        if event.kind is es.EventKind.MEMBER_FAILED:
            log.info("listener: group %s failed in quorum %s: %s", event.replica_id, event.quorum_id, event.evidence)
    log.info("listener stopped")


def fail(how: str, manager: es.Manager) -> None:
    log.info("this group is going to %s", how)
    if how == "leave":
        manager.drain()
    elif how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fail", choices=["leave", "die", "stop"], help="what this group does after step --at-step")
    parser.add_argument("--at-step", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--collective-timeout", type=float, default=10.0, metavar="SECONDS")
    args = parser.parse_args()
    es.configure_logging()
    torch.manual_seed(0)
    inputs = torch.randn(4096, 16)
    dataset = TensorDataset(inputs, inputs.sum(1, keepdim=True).sin())
    net = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))

    with es.subscribe_failures() as failures, es.Manager(collective_timeout_s=args.collective_timeout) as manager:
        listener = threading.Thread(target=listen, args=(failures,))
        listener.start()
        try:
            train(manager, net, dataset, args)
        finally:
            failures.close()
            listener.join()


def train(manager: es.Manager, net: torch.nn.Module, dataset: TensorDataset, args: argparse.Namespace) -> None:
    model = es.DistributedDataParallel(manager, net)
    optimizer = es.Optimizer(manager, torch.optim.AdamW(model.parameters(), lr=1e-3))
    sampler = es.DistributedSampler(manager, dataset, batch_size=32)
    committed_at = time.monotonic()
    for x, y in sampler.batches(DataLoader(dataset, batch_sampler=sampler)):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        result = optimizer.step()
        now = time.monotonic()
        took = "" if now - committed_at < 0.5 else f", {now - committed_at:.1f} s after the last"
        committed_at = now
        log.info("step %d committed by %d groups, loss %.4f%s", result.step, result.participants, loss.item(), took)
        if result.step >= args.steps:
            return
        if args.fail and result.step == args.at_step:
            fail(args.fail, manager)


if __name__ == "__main__":
    main()
