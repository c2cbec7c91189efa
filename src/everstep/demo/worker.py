"""One replica group of the demo, in a process of its own: the five-line loop, and reports as JSON lines.

Standard input takes `stop N`: finish after committed step N. When it ends, the demo is gone, and so is this process.
"""

import json
import logging
import os
import sys
import threading
import time
from typing import Any

import torch
import xxhash
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import everstep as es
from everstep.demo.gpt import GPT, GPTConfig
from everstep.demo.text import standard_library_text

BATCH_SIZE = 8
LEARNING_RATE = 2e-3


class Windows(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Every window of `length` bytes, and the same shifted by one."""

    def __init__(self, text: bytes, length: int) -> None:
        self._bytes = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        self._length = length

    def __len__(self) -> int:
        return (len(self._bytes) - 1) // self._length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        start = index * self._length
        window = self._bytes[start : start + self._length + 1]
        return window[:-1], window[1:]


class Orders:
    """What the demo tells this worker."""

    def __init__(self) -> None:
        self.stop_step = sys.maxsize
        threading.Thread(target=self._read, name="orders", daemon=True).start()

    def _read(self) -> None:
        for line in sys.stdin:
            self.stop_step = int(line.split()[1])
        if self.stop_step == sys.maxsize:
            os._exit(1)  # from a thread, sys.exit would end only the thread


def report(event: str, **fields: Any) -> None:
    sys.stdout.write(json.dumps({"event": event, "at": time.monotonic(), **fields}) + "\n")
    sys.stdout.flush()


def digest_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Over every bit of the parameters and the optimizer's state."""
    digest = xxhash.xxh3_128()
    for tensor in model.state_dict().values():
        digest.update(tensor.contiguous().numpy().tobytes())
    for state in optimizer.state_dict()["state"].values():
        for value in state.values():
            digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def main() -> None:
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    orders = Orders()
    config = GPTConfig()
    dataset = Windows(standard_library_text(), config.context)
    report("started")
    with es.Manager() as manager:
        model = es.DistributedDataParallel(manager, GPT(config))
        optimizer = es.Optimizer(manager, torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE))
        sampler = es.DistributedSampler(manager, dataset, batch_size=BATCH_SIZE)
        loader = DataLoader(dataset, batch_sampler=sampler)
        for epoch in range(1_000_000):
            sampler.set_epoch(epoch)
            for tokens, targets in sampler.batches(loader):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
                loss.backward()  # type: ignore[no-untyped-call]
                result = optimizer.step()
                report(
                    "step",
                    step=result.step,
                    committed=result.committed,
                    participants=result.participants,
                    loss=loss.item(),
                )
                if result.step >= orders.stop_step:
                    report("done", step=result.step, digest=digest_of(model, optimizer), lineage=manager.lineage())
                    return


if __name__ == "__main__":
    main()
