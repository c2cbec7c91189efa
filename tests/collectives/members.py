"""Real member processes for the tests: each holds a GlooProcessGroup and does what the test tells it.

A member has two threads that matter, as a trainer has: one runs the operations in order, the other takes orders at any
time (the link's part: it aborts). They are forked from a server that has imported torch, and killed with real signals.
"""

import faulthandler
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from everstep.collectives import gloo_work, torch_private
from everstep.collectives.gloo import GlooProcessGroup
from everstep.collectives.process_group import Membership, ReduceOp, Work
from everstep.collectives.sockets import host_and_port
from everstep.collectives.store import HostedStore, host_store
from everstep.collectives.store_client import connect_store
from everstep.core.types import QuorumId
from everstep.errors import PeerLost

DEADLINE_S = 20.0
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload([__name__])


@dataclass(frozen=True)
class Outcome:
    """How an order ended; instants are of the monotonic clock, which all processes share."""

    value: Any = None
    error: str = ""  # the exception's type
    message: str = ""
    peer: int | None = None
    began_at: float = 0.0
    ended_at: float = 0.0

    @property
    def took_s(self) -> float:
        return self.ended_at - self.began_at


class Member:
    """The test's handle of one member process."""

    def __init__(self) -> None:
        self._pipe, theirs = _forks.Pipe()
        self._process = _forks.Process(target=_serve, args=(theirs,))
        self._process.start()
        theirs.close()
        self._answers: dict[int, Outcome] = {}
        self._orders = 0

    @property
    def pid(self) -> int:
        pid = self._process.pid
        assert pid is not None
        return pid

    def begin(self, order: str, *args: Any) -> int:
        """Give an order; `outcome` awaits its end."""
        self._orders += 1
        self._pipe.send((self._orders, order, args))
        return self._orders

    def outcome(self, order: int, timeout_s: float = DEADLINE_S) -> Outcome:
        deadline = time.monotonic() + timeout_s
        while order not in self._answers:
            assert self._pipe.poll(max(0.0, deadline - time.monotonic())), f"member {self.pid} does not answer"
            number, answer = self._pipe.recv()
            self._answers[number] = answer
        return self._answers.pop(order)

    def has_answered(self, order: int) -> bool:
        while order not in self._answers and self._pipe.poll(0.0):
            number, answer = self._pipe.recv()
            self._answers[number] = answer
        return order in self._answers

    @property
    def pipe(self) -> Connection:
        """To wait for several members at once."""
        return self._pipe

    def do(self, order: str, *args: Any, timeout_s: float = DEADLINE_S) -> Any:
        """Give an order, await its end, and return its value; fails when it raised there."""
        outcome = self.outcome(self.begin(order, *args), timeout_s)
        assert not outcome.error, f"{order}: {outcome.error}: {outcome.message}"
        return outcome.value

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        if self._process.exitcode is None:  # else the fork server has reaped it, and the number may be another's by now
            with suppress(ProcessLookupError):
                self.signal(signal.SIGKILL)
        self._process.join(DEADLINE_S)

    def close(self) -> None:
        self.kill()
        self._pipe.close()
        self._process.close()


@contextmanager
def members(count: int) -> Iterator[list[Member]]:
    made: list[Member] = []
    try:
        made.extend(Member() for _ in range(count))
        for member in made:
            member.do("ping")
        yield made
    finally:
        for member in made:
            member.close()


def configure(group: list[Member], seq: int, store: str) -> list[Outcome]:
    """Make the members, in this order, quorum 1.`seq`; fails unless all succeed."""
    orders = [m.begin("configure", seq, rank, len(group), store) for rank, m in enumerate(group)]
    outcomes = [m.outcome(order) for m, order in zip(group, orders, strict=True)]
    assert not any(o.error for o in outcomes), outcomes
    return outcomes


def outcomes_in_any_order(group: list[Member], orders: list[int], timeout_s: float) -> list[Outcome]:
    """As many as are asked for, or AssertionError with those that came: who waits may wait for one that has failed."""
    deadline = time.monotonic() + timeout_s
    asked = list(zip(group, orders, strict=True))
    while silent := [member for member, order in asked if not member.has_answered(order)]:
        if not wait([member.pipe for member in silent], max(0.0, deadline - time.monotonic())):
            came = [member.outcome(order) for member, order in asked if member not in silent]
            raise AssertionError(f"members {[member.pid for member in silent]} do not answer; the others: {came}")
    return [member.outcome(order) for member, order in asked]


# ---- in the member process


class _State:
    def __init__(self) -> None:
        self.pg = GlooProcessGroup()
        self.store: HostedStore | None = None
        self.works: list[tuple[Work, torch.Tensor]] = []


def _serve(pipe: Connection) -> None:
    faulthandler.register(signal.SIGUSR1)  # shows where a member is that does not answer
    # OpenMP's threads spin for milliseconds after each loop: more than half of all CPU time of a storm.
    torch.set_num_threads(1)
    state = _State()
    orders: queue.SimpleQueue[tuple[int, str, tuple[Any, ...]]] = queue.SimpleQueue()
    sending = threading.Lock()

    def obey(number: int, order: str, args: tuple[Any, ...]) -> None:
        began_at = time.monotonic()
        value, error, message, peer = None, "", "", None
        try:
            value = ORDERS[order](state, *args)
        except Exception as raised:  # boundary of the process: the test decides what it means
            error, message = type(raised).__name__, str(raised)
            peer = raised.peer if isinstance(raised, PeerLost) else None
        answer = Outcome(value, error, message, peer, began_at, time.monotonic())
        with sending:
            pipe.send((number, answer))

    def take_orders() -> None:
        while True:
            try:
                number, order, args = pipe.recv()
            except (EOFError, OSError):  # the test is over, one way or the other
                os._exit(0)
            if order in AT_ONCE:
                obey(number, order, args)
            else:
                orders.put((number, order, args))

    threading.Thread(target=take_orders, daemon=True).start()
    while True:
        obey(*orders.get())


def _configure(state: _State, seq: int, rank: int, size: int, store: str, timeout_s: float = 6.0) -> float:
    began_at = time.monotonic()
    membership = Membership(quorum_id=QuorumId(1, seq), rank=rank, size=size, store=store, timeout_s=timeout_s)
    state.pg.configure(membership)
    return time.monotonic() - began_at


def _allreduce(state: _State, values: list[float], op: ReduceOp = ReduceOp.SUM) -> list[float]:
    tensor = torch.tensor(values, dtype=torch.float64)
    state.pg.allreduce(tensor, op).wait()
    return list(tensor.tolist())


def _reduce_many(state: _State, elements: int) -> None:
    """Allreduces without end: whoever kills a member hits it in the middle of one."""
    tensor = torch.ones(elements)
    while True:
        state.pg.allreduce(tensor, ReduceOp.MAX).wait()


def _reduce_in_threads(state: _State, threads: int) -> None:
    """From now on with as many of Gloo's threads; before the first configure."""
    state.pg = GlooProcessGroup(threads=threads)


def _reduce_several(state: _State, sizes: list[int]) -> None:
    """Allreduces without end, so many at once, as the buckets of a backward pass are."""
    tensors = [torch.ones(size) for size in sizes]
    while True:
        works = [state.pg.allreduce(tensor, ReduceOp.MAX) for tensor in tensors]
        for work in works:
            work.wait()


def _issue(state: _State, values: list[float]) -> None:
    tensor = torch.tensor(values, dtype=torch.float64)
    state.works.append((state.pg.allreduce(tensor), tensor))


def _wait(state: _State) -> list[float]:
    work, tensor = state.works.pop(0)
    work.wait()
    return list(tensor.tolist())


def _allreduce_unreducible(state: _State) -> None:
    state.pg.allreduce(torch.ones(2, dtype=torch.int16)).wait()


def _overwrite(state: _State, value: float) -> None:
    """The tensor of an operation that was given up belongs to its owner again."""
    state.works[0][1].fill_(value)


def _unchanged(state: _State, value: float) -> bool:
    return bool((state.works[0][1] == value).all())


def _forget(state: _State) -> None:
    state.works.clear()


def _allgather(state: _State, values: list[float]) -> list[list[float]]:
    return list(state.pg.allgather(torch.tensor(values)).tolist())


def _abort(state: _State, seq: int) -> None:
    state.pg.abort(QuorumId(1, seq))


def _host(state: _State) -> str:
    state.store = host_store("127.0.0.1")
    return state.store.address


def _census(state: _State) -> tuple[int, int]:
    """Open descriptors and threads of this process, when the helpers and the stuck operations of past groups ended."""
    gloo_work.free_parked()
    deadline = time.monotonic() + DEADLINE_S
    for thread in threading.enumerate():
        if thread.name == "everstep-gloo":
            thread.join(max(0.0, deadline - time.monotonic()))
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def _fork_idle_child(state: _State) -> int:
    """A child that lives on after its parent, as a DataLoader worker may; the test ends it by its pid."""
    pid = os.fork()
    if pid == 0:
        signal.pause()
        os._exit(0)
    return pid


def _fork_and_finalize(state: _State) -> int:
    """The exit status of a child that drops everything it inherited and ends as a program does."""
    pid = os.fork()
    if pid == 0:
        state.pg.close()
        state.pg = GlooProcessGroup()
        os._exit(7)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _load_data(state: _State) -> list[float]:
    """Through a DataLoader whose workers are forks of this process."""
    data = TensorDataset(torch.arange(8.0))
    # Not the default: it is that by which this process was started, and would import torch in a server of its own.
    loader = DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context="fork")
    return [float(batch.sum()) for (batch,) in loader]


def _stop_before_connecting(state: _State, seq: int, rank: int, size: int, store: str, host: str) -> None:
    """Takes part in building a group up to the point where its peers wait for its connection, and stops there."""
    client = connect_store(host_and_port(store), lambda: False)

    def gather(what: str, mine: bytes) -> list[bytes]:
        return client.gather(f"1.{seq}//{what}", rank, size, mine, DEADLINE_S)

    def meet_and_stop(mine: bytes) -> list[bytes]:
        everybody = gather("gloo", mine)
        os.kill(os.getpid(), signal.SIGSTOP)
        return everybody

    gather("listener", f"{host}:1".encode())
    place = torch_private.Place(rank=rank, size=size, timeout_s=DEADLINE_S, threads=1)
    torch_private.connect_gloo(place, torch_private.gloo_device(host), meet_and_stop)


ORDERS: dict[str, Callable[..., Any]] = {
    "configure": _configure,
    "allreduce": _allreduce,
    "reduce_many": _reduce_many,
    "reduce_in_threads": _reduce_in_threads,
    "reduce_several": _reduce_several,
    "allreduce_unreducible": _allreduce_unreducible,
    "overwrite": _overwrite,
    "unchanged": _unchanged,
    "forget": _forget,
    "issue": _issue,
    "wait": _wait,
    "allgather": _allgather,
    "abort": _abort,
    "release_previous": lambda state: state.pg.release_previous(),
    "close": lambda state: state.pg.close(),
    "host": _host,
    "census": _census,
    "fork": _fork_idle_child,
    "fork_and_finalize": _fork_and_finalize,
    "load_data": _load_data,
    "stop_before_connecting": _stop_before_connecting,
    "ping": lambda state: None,
}
AT_ONCE = {"abort", "ping"}
