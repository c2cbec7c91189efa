"""Cost of a step over plain torch DDP: two processes, all ways in the same processes, alternating blocks of steps.

    python bench/steady_state.py [--blocks 20] [--steps 50] [--with torchft] [--json]

Prints milliseconds a step (min / median / max over blocks), and of each block the difference from the plain DDP block
beside it and the ratio to it, for 1.2 k and 1 M parameters.
"""

import argparse
import contextlib
import datetime
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

GROUPS = 2
SIZES = {"1.2 k": 32, "1 M": 1000}  # name: width of a square hidden layer


def make_model(width: int) -> Any:
    import torch

    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.ReLU(), torch.nn.Linear(width, width))


def everstep_loop(width: int, manager: Any, name: str) -> Callable[[], None]:
    import torch

    import everstep as es

    model = es.DistributedDataParallel(manager, make_model(width), name=f"model {name}")
    optimizer = es.Optimizer(manager, torch.optim.SGD(model.parameters(), lr=1e-3), name=f"optimizer {name}")
    inputs = torch.randn(8, 4)

    def step() -> None:
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        if not optimizer.step():
            raise RuntimeError("a step was aborted without a fault")

    return step


def ddp_loop(width: int) -> Callable[[], None]:
    import torch
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(make_model(width))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    inputs = torch.randn(8, 4)

    def step() -> None:
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()

    return step


def timed(step: Callable[[], None], steps: int) -> float:
    """Seconds a step."""
    began_at = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - began_at) / steps


def worker(rank: int, store_port: int, lighthouse: str, rival: str, options: argparse.Namespace, results: Any) -> None:
    import torch
    import torch.distributed as dist

    import everstep as es

    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", store_port, GROUPS, rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=GROUPS)
    found = {}
    for name, width in SIZES.items():
        with es.Manager(
            lighthouse=lighthouse, job_id=f"bench-{width}", replica_group_id=str(rank), replica_groups=GROUPS
        ) as manager:
            loops = {"everstep": everstep_loop(width, manager, name), "ddp": ddp_loop(width)}
            stack = contextlib.ExitStack()
            if rival:
                from rival import manager as rival_manager
                from rival import steady_loop

                own = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
                rivals = stack.enter_context(rival_manager(rival, rank + GROUPS * width, own.port, init_sync=False))
                loops["torchft"] = steady_loop(make_model(width), torch.randn(8, 4), rivals)
            blocks: dict[str, list[float]] = {kind: [] for kind in loops}
            for loop in loops.values():
                timed(loop, options.steps)  # warm-up
            for block in range(options.blocks):
                for kind in sorted(loops, reverse=bool(block % 2)):
                    blocks[kind].append(timed(loops[kind], options.steps) * 1e3)
            dist.barrier()
            stack.close()
        found[name] = blocks
    if rank == 0:
        results.put(found)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--with", dest="rival", choices=["torchft"], help="measure it in the same run")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

    from everstep.config import LighthouseSettings
    from everstep.lighthouse.app import Lighthouse

    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with contextlib.ExitStack() as stack:
        lighthouse = stack.enter_context(Lighthouse.in_thread(LighthouseSettings(port=0)))
        rival = ""
        if options.rival:
            import rival as rivals

            rivals.require()
            rival = stack.enter_context(rivals.lighthouse(min_replicas=GROUPS))
        processes = [
            context.Process(target=worker, args=(rank, port, lighthouse.address, rival, options, results))
            for rank in range(GROUPS)
        ]
        for process in processes:
            process.start()
        found = results.get(timeout=600)
        for process in processes:
            process.join(60)
    rows = []
    for name, blocks in found.items():
        row: dict[str, Any] = {"parameters": name} | {kind: spread(times) for kind, times in blocks.items()}
        for kind in blocks.keys() - {"ddp"}:
            pairs = list(zip(blocks[kind], blocks["ddp"], strict=True))
            row[f"{kind}_over_ddp"] = spread([ours - plain for ours, plain in pairs])
            row[f"{kind}_ratio"] = spread([ours / plain for ours, plain in pairs])
        rows.append(row)
    if options.json:
        print(json.dumps({"benchmark": "steady_state", "rows": rows}))
        return
    today = datetime.date.today()
    print(f"{today}, {platform.machine()}, {os.cpu_count()} cores; {' '.join(sys.argv)}")
    print("ms a step (min / median / max over blocks)")
    kinds = [
        "ddp",
        *(
            f"{kind}{over}"
            for kind in ("everstep", *([options.rival] * bool(options.rival)))
            for over in ("", "_over_ddp", "_ratio")
        ),
    ]
    print(f"{'parameters':>10}  " + "  ".join(f"{kind:>22}" for kind in kinds))
    for row in rows:
        cells = [format_spread(row[kind]) for kind in kinds]
        print(f"{row['parameters']:>10}  " + "  ".join(f"{cell:>22}" for cell in cells))


def spread(values: list[float]) -> list[float]:
    return [round(v, 3) for v in (min(values), statistics.median(values), max(values))]


def format_spread(values: Any) -> str:
    return " / ".join(f"{value:.2f}" for value in values)


if __name__ == "__main__":
    main()
