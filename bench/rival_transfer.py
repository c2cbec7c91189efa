"""The rival's transports of live state, as live_recovery.py measures ours: two processes, CPU tensors, loopback."""

import statistics
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = timedelta(seconds=120)


def measure(mib: int, times: int) -> dict[str, float]:
    """GB/s, medians: over HTTP, over a process group, and over one into tensors that are there already."""
    from live_recovery import spawn

    store = dist.TCPStore("localhost", 0, is_master=True, timeout=TIMEOUT, wait_for_workers=False)
    ours, theirs = spawn.Pipe()
    donor = spawn.Process(target=donate, args=(mib, f"localhost:{store.port}", theirs), daemon=True)
    donor.start()
    try:
        return _receive(mib, times, f"localhost:{store.port}", ours)
    finally:
        ours.send("end")
        donor.join(10)
        if donor.is_alive():
            donor.kill()


def donate(mib: int, store: str, pipe: Any) -> None:
    from live_recovery import state_of
    from torchft.checkpointing.http_transport import HTTPTransport

    torch.set_num_threads(1)
    state = state_of(mib, 1)
    group_transport = _over_group(store, 0, None)
    http = HTTPTransport(TIMEOUT, num_chunks=0)
    pipe.send(http.metadata())
    while (order := pipe.recv()) != "end":
        if order == "http":
            http.send_checkpoint(dst_ranks=[1], step=1, state_dict=state, timeout=TIMEOUT)
            pipe.send("offered")
        else:
            group_transport.send_checkpoint(dst_ranks=[1], step=1, state_dict=state, timeout=TIMEOUT)


def _over_group(store: str, rank: int, state: dict[str, Any] | None) -> Any:
    from torchft import ProcessGroupGloo
    from torchft.checkpointing.pg_transport import PGTransport

    group = ProcessGroupGloo(timeout=TIMEOUT)
    group.configure(store, "bench", rank, 2)
    in_place = None if state is None else lambda: state
    return PGTransport(group, TIMEOUT, torch.device("cpu"), in_place)


def _receive(mib: int, times: int, store: str, pipe: Any) -> dict[str, float]:
    from live_recovery import state_of
    from torchft.checkpointing.http_transport import HTTPTransport

    own = state_of(mib)
    in_place = _over_group(store, 1, own)
    address = pipe.recv()
    http = HTTPTransport(TIMEOUT, num_chunks=0)
    took: dict[str, list[float]] = {"http": [], "group": [], "group_in_place": []}
    for _ in range(times):
        for name, seconds in took.items():
            pipe.send(name)
            if name == "http":
                pipe.recv()
            in_place._state_dict = (lambda: own) if name == "group_in_place" else None
            transport = http if name == "http" else in_place
            began_at = time.perf_counter()
            transport.recv_checkpoint(src_rank=0, metadata=address, step=1, timeout=TIMEOUT)
            seconds.append(time.perf_counter() - began_at)
    return {name: (mib << 20) / statistics.median(seconds) / 1e9 for name, seconds in took.items()}
