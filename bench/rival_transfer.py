"""The rival's transports of live state, as live_recovery.py measures ours: two processes, CPU tensors, loopback."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = timedelta(seconds=120)
NAMES = ("http", "group", "group_in_place")


@contextmanager
def receiver(mib: int, own: dict[str, Any]) -> Iterator["Receiver"]:
    """Of a donor with so much state; `own`: where it lands in place."""
    from live_recovery import spawn

    store = dist.TCPStore("localhost", 0, is_master=True, timeout=TIMEOUT, wait_for_workers=False)
    ours, theirs = spawn.Pipe()
    donor = spawn.Process(target=donate, args=(mib, f"localhost:{store.port}", theirs), daemon=True)
    donor.start()
    try:
        yield Receiver(f"localhost:{store.port}", ours, own)
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


class Receiver:
    """`fetch` one of NAMES, in seconds."""

    def __init__(self, store: str, pipe: Any, own: dict[str, Any]) -> None:
        from torchft.checkpointing.http_transport import HTTPTransport

        self._pipe = pipe
        self._own = own
        self._group = _over_group(store, 1, own)
        self._address = pipe.recv()
        self._http = HTTPTransport(TIMEOUT, num_chunks=0)

    def fetch(self, name: str) -> float:
        self._pipe.send(name)
        if name == "http":
            self._pipe.recv()
        self._group._state_dict = (lambda: self._own) if name == "group_in_place" else None
        transport = self._http if name == "http" else self._group
        began_at = time.perf_counter()
        transport.recv_checkpoint(src_rank=0, metadata=self._address, step=1, timeout=TIMEOUT)
        return time.perf_counter() - began_at
