"""The rival, torchft, where it is installed: an environment of its own, never one of Everstep's dependencies."""

import contextlib
import importlib.util
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

START_S = 20.0

HOW = (
    "torchft is not installed here. `make bench-venv` makes .venv-bench with it; then run this with\n"
    "    .venv-bench/bin/python {}"
)


def require() -> None:
    if importlib.util.find_spec("torchft") is None:
        sys.exit(HOW.format(" ".join(sys.argv)))


@contextlib.contextmanager
def lighthouse(**options: int) -> Iterator[str]:
    """Its lighthouse, as a process of its own; the options are those of its command line. Yields its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).parent / "torchft_lighthouse"), "--bind", f"127.0.0.1:{port}"]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _until_listening(port)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def _until_listening(port: int) -> None:
    deadline = time.monotonic() + START_S
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if time.monotonic() > deadline:
            raise TimeoutError("torchft's lighthouse does not listen")


@contextlib.contextmanager
def manager(lighthouse_address: str, group: int, store_port: int, **options: Any) -> Iterator[Any]:
    """One replica group of one rank. `state_dict` and `load_state_dict` are needed only where groups rejoin."""
    from torchft import Manager, ProcessGroupGloo

    made = Manager(
        pg=ProcessGroupGloo(timeout=timedelta(seconds=options.pop("timeout_s", 60.0))),
        rank=0,
        world_size=1,
        store_addr="localhost",
        store_port=store_port,
        lighthouse_addr=lighthouse_address,
        replica_id=f"bench_{group}",
        hostname="localhost",
        **{"load_state_dict": None, "state_dict": None, "min_replica_size": 1, **options},
    )
    try:
        yield made
    finally:
        made.shutdown(wait=False)


def steady_loop(model: Any, inputs: Any, managing: Any) -> Callable[[], None]:
    """Its DistributedDataParallel and its optimizer wrapper, as its README has them."""
    import torch
    import torchft

    wrapped = torchft.DistributedDataParallel(managing, model)
    optimizer = torchft.Optimizer(managing, torch.optim.SGD(wrapped.parameters(), lr=1e-3))

    def step() -> None:
        optimizer.zero_grad()
        wrapped(inputs).square().mean().backward()
        optimizer.step()

    return step
