"""One replica group of a benchmark, in a process of its own: trains the demo's GPT and reports as JSON lines.

Every line has `at`, the monotonic clock, which all processes of a host share. Reports: each step, and each change of
the member's machine (notice, granted, settled, ...). Standard input takes `die POINT STEP` (SIGKILL itself there),
`hang STEP` (its training thread stands still after that step); at its end the process ends.

`--compute-s` makes every forward pass sleep so long, on a smaller model: that stands for an accelerator, so that the
groups do not share what they compute with.
"""

import argparse
import json
import logging
import os
import signal
import sys
import threading
import time
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

import everstep as es
from everstep.collectives.process_group import ReduceOp
from everstep.demo.gpt import GPT, GPTConfig
from everstep.demo.text import standard_library_text
from everstep.demo.worker import BATCH_SIZE, LEARNING_RATE, Windows

# "optimizer": committed, no parameter changed yet; "stepped": in optimizer.step(), after the parameters changed.
POINTS = ("forward", "backward", "reduction", "reduced", "vote", "optimizer", "stepped")


def report(event: str, **fields: Any) -> None:
    sys.stdout.write(json.dumps({"event": event, "at": time.monotonic(), **fields}) + "\n")
    sys.stdout.flush()


class Orders:
    """What the benchmark tells this worker."""

    def __init__(self) -> None:
        self.die_in, self.die_at = "", -1
        self.hang_at = -1
        self.step = 0  # that is being made
        threading.Thread(target=self._read, name="orders", daemon=True).start()

    def _read(self) -> None:
        for line in sys.stdin:
            match line.split():
                case ["die", point, step]:
                    self.die_in, self.die_at = point, int(step)
                case ["hang", step]:
                    self.hang_at = int(step)
        os._exit(0)  # from a thread, sys.exit would end only the thread

    def strike(self, point: str) -> None:
        if self.die_in == point and self.step >= self.die_at:
            report("died", point=point)
            os.kill(os.getpid(), signal.SIGKILL)


class Changes(logging.Handler):
    """Everstep's log lines as reports."""

    def emit(self, record: logging.LogRecord) -> None:
        fields = getattr(record, "everstep", {})
        if "event" in fields:
            report("change", what=fields["event"], quorum=fields.get("quorum", ""))
        elif record.getMessage().partition("] ")[2].startswith("recovered step="):
            report("change", what="took state", quorum="")


def watch_operations(manager: es.Manager, orders: Orders) -> None:
    """Strike when the group's operations are issued."""
    presence = manager._presence
    assert presence is not None
    allreduce = presence.group.allreduce

    def watched(tensor: torch.Tensor, op: ReduceOp = ReduceOp.SUM) -> Any:
        if op is ReduceOp.MIN:
            orders.strike("vote")
        work = allreduce(tensor, op)
        if op is not ReduceOp.MIN:
            orders.strike("reduction")
        return work

    presence.group.allreduce = watched  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compute-s", type=float, default=0.0)
    compute_s = parser.parse_args().compute_s
    torch.set_num_threads(1)
    logger = logging.getLogger("everstep")
    logger.setLevel(logging.INFO)
    logger.addHandler(Changes())
    orders = Orders()
    config = GPTConfig(context=16, layers=1, width=32) if compute_s else GPTConfig()
    dataset = Windows(standard_library_text(), config.context)
    net = GPT(config)
    next(iter(net.children())).register_forward_hook(lambda *_: orders.strike("forward"))
    if compute_s:
        net.register_forward_pre_hook(lambda *_: time.sleep(compute_s))
    next(net.parameters()).register_hook(lambda _: orders.strike("backward"))  # type: ignore[no-untyped-call]
    with es.Manager() as manager:
        watch_operations(manager, orders)
        model = es.DistributedDataParallel(manager, net)
        inner = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE)
        inner.register_step_pre_hook(lambda *_: orders.strike("optimizer"))
        inner.register_step_post_hook(lambda *_: orders.strike("stepped"))
        optimizer = es.Optimizer(manager, inner, before_step=lambda: orders.strike("reduced"))
        sampler = es.DistributedSampler(manager, dataset, batch_size=BATCH_SIZE)
        loader = DataLoader(dataset, batch_sampler=sampler)
        for epoch in range(1_000_000):
            sampler.set_epoch(epoch)
            for tokens, targets in sampler.batches(loader):
                orders.step = manager.current_step() + 1
                if 0 <= orders.hang_at <= orders.step:
                    report("hung")
                    threading.Event().wait()
                optimizer.zero_grad()
                F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()).backward()  # type: ignore[no-untyped-call]
                result = optimizer.step()
                fields = {"step": result.step, "committed": result.committed, "participants": result.participants}
                report("step", **fields, why=result.why)


if __name__ == "__main__":
    main()
