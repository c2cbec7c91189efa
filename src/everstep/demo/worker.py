"""One replica group of the demo: the five-line loop, and a report of each step.

With a path as its argument it reports to the demo that listens there, takes `N` from it as "finish after committed step
N", and leaves when the demo has gone. Without, it prints its reports, and trains until it is told to end.
"""

import contextlib
import json
import logging
import os
import socket
import sys
import time
from typing import Any

import torch
import xxhash
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import everstep as es
from everstep.config import manager_settings
from everstep.demo.gpt import GPT, GPTConfig
from everstep.demo.text import standard_library_text
from everstep.exit_codes import ExitCode

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


class Audience:
    """Who hears this worker's reports: the demo at that path, or without one whoever reads its output."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._demo = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) if path else None
        self._stop_step = sys.maxsize

    def __enter__(self) -> "Audience":
        if self._demo is not None:
            try:
                self._demo.connect(self._path)
            except OSError:
                sys.exit(ExitCode.DO_NOT_RESTART)
        return self

    def __exit__(self, *_: object) -> None:
        if self._demo is not None:
            self._demo.close()

    def tell(self, event: str, **fields: Any) -> None:
        line = json.dumps({"event": event, "at": time.monotonic(), **fields})
        if self._demo is None:
            sys.stdout.write(line + "\n")
            return
        try:
            self._demo.send(line.encode())
        except OSError:
            sys.exit(ExitCode.DO_NOT_RESTART)

    def stop_step(self) -> int:
        """As asked for by now; a large number before."""
        if self._demo is not None:
            try:
                self._stop_step = int(self._demo.recv(64, socket.MSG_DONTWAIT))
            except BlockingIOError:
                pass
            except (OSError, ValueError):  # the demo has gone
                sys.exit(ExitCode.DO_NOT_RESTART)
        return self._stop_step

    def await_end(self) -> None:
        if self._demo is not None:
            with contextlib.suppress(OSError):
                self._demo.recv(64)


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
    settings = manager_settings()
    with Audience("".join(sys.argv[1:2])) as audience:
        place = {"group": settings.replica_group_id, "lighthouse": settings.lighthouse, "job": settings.job_id}
        audience.tell("started", pid=os.getpid(), **place)
        with es.Manager() as manager:
            train(manager, audience)
        audience.tell("left")
        audience.await_end()  # the demo asks the lighthouse for the ledger, and that one ends with the last worker


def train(manager: es.Manager, audience: Audience) -> None:
    config = GPTConfig()
    dataset = Windows(standard_library_text(), config.context)
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
            audience.tell(
                "step",
                step=result.step,
                committed=result.committed,
                participants=result.participants,
                loss=loss.item(),
            )
            if result.step >= audience.stop_step():
                audience.tell("done", digest=digest_of(model, optimizer) + manager.lineage())
                return


if __name__ == "__main__":
    main()
