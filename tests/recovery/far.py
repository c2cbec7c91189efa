"""Donors and joiners in processes of their own, to be killed and stopped with real signals."""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import Any

import torch

from everstep.recovery import Fetch, RecoveryServer, ServerOptions, Snapshot, TransferAuth
from tests.recovery.wires import KEY, request_to, state_of

CHUNK_BYTES = 1 << 16
START_S = 60.0  # the first child of a test run imports torch

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.train.preloaded"])


class Far:
    """One process; `with` ends it."""

    def __init__(self, target: Any, *args: Any) -> None:
        self.pipe, theirs = _context.Pipe()
        self.process: ForkServerProcess = _context.Process(target=target, args=(*args, theirs))
        self.process.start()
        theirs.close()

    def __enter__(self) -> "Far":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.is_alive():
            self.process.kill()
        self.process.join(10)
        self.pipe.close()

    def hear(self) -> Any:
        assert self.pipe.poll(START_S), "the other process said nothing"
        return self.pipe.recv()

    def send(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)


@contextlib.contextmanager
def far_donors(count: int, mib: float, auth: TransferAuth | None = None) -> Iterator[list[tuple[Far, str]]]:
    """Each with its URL; they lend the same state, `state_of(mib)`."""
    with contextlib.ExitStack() as stack:
        donors = [stack.enter_context(Far(_donate, mib, auth)) for _ in range(count)]
        yield [(donor, donor.hear()) for donor in donors]


def _donate(mib: float, auth: TransferAuth | None, pipe: Connection) -> None:
    torch.set_num_threads(1)
    with RecoveryServer(ServerOptions(auth=auth)) as server:
        url = server.start("127.0.0.1", "127.0.0.1")
        server.offer(KEY, Snapshot.lend(state_of(mib), CHUNK_BYTES))
        pipe.send(url)
        pipe.poll(None)


def join_and_die(url: str, auth: TransferAuth | None, pipe: Connection) -> None:
    """A joiner that is killed when it has half of the state."""
    torch.set_num_threads(1)

    def die(done: int, total: int) -> None:
        if done >= total / 2:
            os.kill(os.getpid(), signal.SIGKILL)

    Fetch(request_to(url, auth=auth), die).run()
    pipe.send("it lived")
