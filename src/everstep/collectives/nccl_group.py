"""One quorum's NCCL communicator: built on a thread of its own, aborted by another, freed by a third.

NCCL waits in kernels on the GPU and in calls that cannot be interrupted; `ncclCommAbort` is its one way out. It takes
milliseconds to some hundreds of them, so no thread that must answer calls it: `condemn` is a flag, and a helper aborts.
Not yet run on a GPU: written from the sources of torch's ProcessGroupNCCL, with its bindings of torch 2.6 to 2.15.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from everstep.collectives import torch_private
from everstep.collectives.fate import GroupFate
from everstep.collectives.gloo_work import Alone
from everstep.collectives.nccl_work import NcclWork, pauses
from everstep.collectives.process_group import Membership, ReduceOp
from everstep.collectives.sockets import host_and_port
from everstep.collectives.store_client import StoreClient, connect_store
from everstep.core.types import LocalProtocolError
from everstep.errors import PeerLost, StepInterrupted

ABORT_TIMEOUT_S = 10.0
HELPER_NAME = "everstep-nccl"
_OPTIONS = {op: torch_private.allreduce_options(op) for op in ReduceOp}

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class NcclPlace:
    """`device` is this process's own GPU. `even_alone`: a communicator for one member, too, not the identity.

    `make(rank, size, timeout_s)` is torch's NCCL; tests on machines without a GPU hand in a stand-in for it.
    """

    device: torch.device
    even_alone: bool = False
    make: Callable[[int, int, float], tuple[torch_private.TorchNccl, torch_private.Store]] = torch_private.new_nccl


class NcclGroup(GroupFate[NcclWork]):
    """A QuorumGroup (rebuilt.py) over NCCL."""

    def __init__(self, membership: Membership, place: NcclPlace) -> None:
        super().__init__(membership)
        self.judged = threading.Event()  # of each operation it is known whether it had ended before the abort
        self.broken = threading.Event()  # the abort is over: kernels that waited for peers end
        self._place = place
        self._nccl: torch_private.TorchNccl | Alone | None = None  # once it is of use
        self._raw: torch_private.TorchNccl | None = None  # as soon as there is something to abort
        self._client: StoreClient | None = None
        self._breaker: threading.Thread | None = None
        self._lock = threading.Lock()  # for `_breaker`, for an instant

    @property
    def is_usable(self) -> bool:
        return self._nccl is not None and not self.is_severed

    # ---- operations

    def allreduce(self, tensor: Tensor, op: ReduceOp) -> NcclWork:
        nccl = self._in_use()
        try:
            return self._note(NcclWork(self, nccl.allreduce([tensor], _OPTIONS[op])))
        except torch.distributed.DistError as error:
            raise self.lost_by(str(error)) from None

    def allgather(self, tensor: Tensor) -> Tensor:
        nccl = self._in_use()
        gathered = torch.empty((self.membership.size, *tensor.shape), dtype=tensor.dtype, device=tensor.device)
        try:
            work = self._note(NcclWork(self, torch_private.gather_into(nccl, gathered, tensor)))
        except torch.distributed.DistError as error:
            raise self.lost_by(str(error)) from None
        work.wait()
        return gathered

    def lost_by(self, error: str) -> BaseException:
        """What NCCL's error means. It does not say which peer it was."""
        if self._failure is None:
            me = self.membership
            self._failure = PeerLost(
                f"quorum {me.quorum_id}: {' '.join(error.split())[:500]}", 1 - me.rank if me.size == 2 else None
            )
        return self.failure()

    def _in_use(self) -> torch_private.TorchNccl | Alone:
        if self._nccl is None or self._failure is not None:
            raise self.failure()
        return self._nccl

    # ---- severing and taking down

    def cut(self) -> None:
        if self._client is not None:
            self._client.sever()
        # One that is being built looks at `is_severed` by itself. It may be in a call that holds the communicator's
        # lock, which an abort would wait for; `take_down` aborts when the call has returned.
        if self.ended.is_set():
            self._start_breaking()

    def drain(self, deadline: float) -> bool:
        return all(work.settle(deadline) for work in tuple(self._pending))

    def give_up(self) -> None:
        """Not here: a kernel that does not end keeps the GPU, and what else the script would run on it, waiting."""
        raise LocalProtocolError("an operation of an aborted quorum still holds its tensor; only a restart frees it")

    def take_down(self) -> None:
        """Also frees the communicator, on a thread that nobody waits for.

        Freeing joins torch's watchdog, which after an error sleeps for a minute before it looks up.
        """
        self.condemn()
        self._start_breaking()
        deadline = time.monotonic() + ABORT_TIMEOUT_S
        self.broken.wait(ABORT_TIMEOUT_S)
        self.drain(deadline)
        self._nccl = None
        last = [self._raw]
        self._raw = None
        if last[0] is not None:
            threading.Thread(target=last.clear, name=HELPER_NAME, daemon=True).start()
        if self._client is not None and self.ended.is_set():
            self._client.close()

    def fds(self) -> list[int]:
        """NCCL does not tell which sockets are its own; a forked child keeps them open until it ends."""
        fd = -1 if self._client is None else self._client.fileno()
        return [] if fd < 0 else [fd]

    def keep(self) -> None:
        if self._raw is not None:
            torch_private.keep_beyond_exit(self._raw)

    def _start_breaking(self) -> None:
        with self._lock:
            if self._breaker is None:
                self._breaker = threading.Thread(target=self._break, name=HELPER_NAME, daemon=True)
                self._breaker.start()

    def _break(self) -> None:
        # An abort lets kernels end, too, with whatever they have: first see which had ended by themselves.
        for work in tuple(self._pending):
            work.judge()
        self.judged.set()
        raw, began_at = self._raw, time.monotonic()
        if raw is not None:
            try:
                raw.abort()
            except RuntimeError as error:  # torch's own deadline for it, or the GPU is gone
                _log.warning("quorum %s: NCCL's abort failed: %s", self.membership.quorum_id, error)
            took_ms = (time.monotonic() - began_at) * 1e3
            _log.info("quorum %s: communicator aborted in %.1f ms", self.membership.quorum_id, took_ms)
        self.broken.set()

    # ---- building

    def build(self) -> None:
        try:
            self._build()
        except StepInterrupted as error:
            self._failure = self._failure or error
        except torch.distributed.DistError as error:
            self._failure = self._failure or self.lost_by(str(error))
        except BaseException as error:  # boundary: it is for the thread that called configure, not for this one
            self._failure = self._failure or error
        self.ended.set()
        self.changed.set()

    def after_build(self) -> None:
        if self._client is not None:
            self._client.close()

    def _build(self) -> None:
        me, device = self.membership, self._place.device
        if me.size == 1 and not self._place.even_alone:
            self._nccl = Alone()
            return
        raw, store = self._place.make(me.rank, me.size, me.timeout_s)
        self._raw = raw
        own_id = b""
        if me.rank == 0:
            raw.eager_connect_single_device(device)  # returns at once, and leaves the communicator's id in the store
            own_id = torch_private.nccl_id_in(store)
        if me.size > 1:
            self._client = connect_store(host_and_port(me.store), lambda: self.is_severed)
            ids = self._gather(own_id)
            if me.rank != 0:
                torch_private.put_nccl_id(store, ids[0])
                raw.eager_connect_single_device(device)
        self._greet(raw)
        self._nccl = raw

    def _gather(self, own_id: bytes) -> list[bytes]:
        me, client = self.membership, self._client
        self._raise_if_severed()
        assert client is not None
        try:
            return client.gather(f"{me.quorum_id}/{me.prefix}/nccl", me.rank, me.size, own_id, me.timeout_s)
        except PeerLost as error:
            self._raise_if_severed()
            raise PeerLost(f"quorum {me.quorum_id}: {error}", error.peer) from None

    def _greet(self, raw: torch_private.TorchNccl) -> None:
        """One allreduce, so that what NCCL does late, it does here: connecting to the peers, and failing to.

        The call itself may block, uninterruptibly, for as long as a peer that answered the store does not answer NCCL:
        at most TORCH_NCCL_NONBLOCKING_TIMEOUT (half an hour if unset). This helper thread then stays behind that long.
        """
        me, device = self.membership, self._place.device
        deadline = time.monotonic() + me.timeout_s
        with _own_stream(device):
            present = torch.ones(1, dtype=torch.int32, device=device)
            work = self._greeting(raw, present)
            for pause_s in pauses():
                self._raise_if_severed()
                if work.is_completed():
                    break
                if time.monotonic() >= deadline:
                    raise PeerLost(f"quorum {me.quorum_id}: NCCL did not connect within {me.timeout_s:g} s")
                self.changed.wait(pause_s)
            work.wait()
            count = int(present.item())
        self._check_greeted(count)

    def _greeting(self, raw: torch_private.TorchNccl, present: Tensor) -> torch_private.TorchWork:
        return raw.allreduce([present], _OPTIONS[ReduceOp.SUM])

    def _check_greeted(self, count: int) -> None:
        me = self.membership
        if count != me.size:
            raise PeerLost(f"quorum {me.quorum_id}: NCCL counted {count} members instead of {me.size}")

    def _raise_if_severed(self) -> None:
        if self.is_severed:
            raise StepInterrupted(f"quorum {self.membership.quorum_id} was aborted")


@contextlib.contextmanager
def _own_stream(device: torch.device) -> Iterator[None]:
    """What the script has queued on its own stream is not waited for."""
    if device.type != "cuda":  # a stand-in's
        yield
        return
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):  # type: ignore[no-untyped-call]
        yield
