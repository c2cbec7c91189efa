"""What happens between GPUs, without any: CPU tensors play a device's, and TCP plays NCCL."""

import queue
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any

import torch

from everstep.collectives import torch_private
from everstep.collectives.nccl_peers import DevicePlace, NcclPeers
from everstep.core.types import QuorumId
from everstep.recovery import Meeting, Peer, Place, Snapshot, Transfer
from everstep.recovery.conversation import DIRECT_BYTES
from everstep.recovery.over_group import GroupTransport
from everstep.recovery.snapshot import memory_of
from everstep.recovery.staging import Staging
from everstep.train.transports import check_place, membership_of, over_gloo

CHUNK_BYTES = 1 << 20
ON_CPU = torch.device("cpu")
RUBBISH = 0xAB
_WAIT_S = 20.0
BIG = 3 * DIRECT_BYTES // 4  # floats
SIZES = [("weight", BIG), ("bias", 33), ("norm", 700)]


class PlayedStaging(Staging):
    """The tensors that it was made of, and those that it makes, are on the device."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.device = ON_CPU
        self._there = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}
        self.made = 0

    def holds(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._there

    @contextmanager
    def beside(self) -> Iterator[None]:
        yield

    def empty(self, size: int) -> torch.Tensor:
        made = torch.empty(size, dtype=torch.uint8)
        self._there[made.untyped_storage().data_ptr()] = made
        self.made += size
        return made

    def gather(self, parts: Any) -> torch.Tensor:
        return torch.cat(list(parts))

    def copy(self, parts: Any, places: Any) -> None:
        for place, part in zip(places, parts, strict=True):
            place.copy_(part)


class PlayedWork:
    """An operation; it ends in its turn, or with its communicator."""

    def __init__(self, tensor: torch.Tensor, *, is_send: bool) -> None:
        self.tensor = tensor
        self.is_send = is_send
        self.ended = threading.Event()
        self.error: str | None = None

    def is_completed(self) -> bool:
        return self.ended.is_set()

    def wait(self, timeout: object = None) -> bool:
        assert self.ended.is_set(), "asked only of what has ended"
        if self.error is not None:
            raise torch.distributed.DistBackendError(self.error)
        return True


class PlayedNccl:
    """A communicator of two. Its thread is the stream: one operation after another, as the peer takes part."""

    def __init__(self, rank: int, theatre: "Theatre") -> None:
        self.store: Any = torch.distributed.HashStore()  # type: ignore[attr-defined]  # documented, not in __all__
        self.is_aborting = threading.Event()
        self.now: PlayedWork | None = None
        self.done = 0
        self.is_held = False
        self._rank = rank
        self._theatre = theatre
        self._listener: socket.socket | None = None
        self._socket: socket.socket | None = None
        self._posted: queue.SimpleQueue[PlayedWork | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="played-nccl", daemon=True)

    def eager_connect_single_device(self, device: torch.device) -> None:
        if self._rank == 0:
            self._listener = socket.create_server(("127.0.0.1", 0))
            self._listener.settimeout(_WAIT_S)
            self.store.set("0", str(self._listener.getsockname()[1]))
        self._thread.start()

    def broadcast(self, tensors: list[torch.Tensor], opts: Any) -> PlayedWork:
        (tensor,) = tensors
        work = PlayedWork(tensor, is_send=opts.rootRank == self._rank)
        self._posted.put(work)
        return work

    def abort(self) -> None:
        self.is_aborting.set()
        for sock in (self._socket, self._listener):
            if sock is not None:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        self._posted.put(None)
        assert self._theatre.aborts_end.wait(_WAIT_S)
        self._thread.join(_WAIT_S)
        for sock in (self._socket, self._listener):
            if sock is not None:
                sock.close()

    def allreduce(self, tensors: list[torch.Tensor], opts: object) -> PlayedWork:
        raise NotImplementedError

    def _allgather_base(self, output: torch.Tensor, source: torch.Tensor) -> PlayedWork:
        raise NotImplementedError

    def _run(self) -> None:
        lost = ""
        while (work := self._posted.get()) is not None:
            self.now = work
            try:
                if lost:
                    raise ConnectionError(lost)
                self._connect()
                self._perform(work)
            except OSError as error:
                lost = lost or str(error)
                assert self._theatre.aborts_end.wait(_WAIT_S)
                if not work.is_send:
                    work.tensor.fill_(RUBBISH)
                work.error = None if self.is_aborting.is_set() else f"NCCL error: remote process exited: {lost}"
            self.now = None
            self.done += 1
            work.ended.set()

    def _connect(self) -> None:
        if self._socket is not None:
            return
        if self._listener is not None:
            self._socket = self._listener.accept()[0]
        else:
            self._socket = socket.create_connection(("127.0.0.1", int(self.store.get("0"))))
        if self.is_aborting.is_set():
            raise ConnectionError("aborted")

    def _perform(self, work: PlayedWork) -> None:
        assert self._socket is not None
        memory = memory_of(work.tensor.view(torch.uint8).view(-1))
        if work.is_send:
            if len(memory) > 4:  # more than a greeting
                memory = memory_of(self._theatre.sending(work.tensor))
            while not self._theatre.may_send.wait(0.01) and not self.is_aborting.is_set():
                self.is_held = True
            self.is_held = False
            self._socket.sendall(memory)
        while not work.is_send and memory:
            count = self._socket.recv_into(memory)
            if not count:
                raise ConnectionError("the peer is gone")
            memory = memory[count:]


class Theatre:
    """Members' communicators, and what is to become of what they send: `strike(number, tensor)` -> what is sent."""

    def __init__(self, strike: Callable[[int, torch.Tensor], torch.Tensor] = lambda _, tensor: tensor) -> None:
        self.may_send = threading.Event()
        self.may_send.set()
        self.aborts_end = threading.Event()
        self.aborts_end.set()
        self.made: list[PlayedNccl] = []
        self.sent = 0
        self.sent_bytes = 0
        self._strike = strike

    def is_held(self) -> bool:
        """A device waits to be let send, and another one for that."""
        held = [nccl.done for nccl in self.made if nccl.is_held]
        waits = [nccl.done for nccl in self.made if nccl.now is not None and not nccl.now.is_send]
        return bool(held) and held == waits

    def make(self, rank: int, size: int, timeout_s: float) -> tuple[torch_private.TorchNccl, Any]:
        assert size == 2
        self.made.append(PlayedNccl(rank, self))
        return self.made[-1], self.made[-1].store

    def refuse(self, rank: int, size: int, timeout_s: float) -> tuple[torch_private.TorchNccl, Any]:
        raise torch.distributed.DistBackendError("NCCL error: duplicate GPU detected")

    def sending(self, tensor: torch.Tensor) -> torch.Tensor:
        self.sent += 1
        self.sent_bytes += tensor.numel()
        return self._strike(self.sent, tensor)


class PlayedTransport(GroupTransport):
    """Of a member whose device this is."""

    def __init__(self, staging: Staging, theatre: Theatre, name: str, make: Any = None) -> None:
        super().__init__(self._peers, check_place, stage=lambda _: staging, device_bytes_min=1)
        self.made: list[NcclPeers] = []
        self.reason_s = 0.05
        self._theatre = theatre
        self._name = name
        self._make = make or theatre.make
        self._has_failed = threading.Event()

    def _peers(self, place: Place, transfer: Transfer, number: int) -> NcclPeers:
        there = DevicePlace(
            membership=membership_of(place, transfer, number),
            device=ON_CPU,
            name=self._name,
            has_failed=self._has_failed,
            reason_s=self.reason_s,
            make=self._make,
        )
        self.made.append(NcclPeers(over_gloo(place, transfer, number), there))
        return self.made[-1]


def state_of(seed: int, layers: int = 3) -> dict[str, Any]:
    """Large tensors and small ones, and an optimizer's counters between them."""
    noise = torch.Generator().manual_seed(seed)
    model = {f"{n}.{kind}": torch.rand(size, generator=noise) for n in range(layers) for kind, size in SIZES}
    slots = {
        n: {"step": torch.tensor(7.0), "avg": torch.rand(size, generator=noise)} for n, size in enumerate((BIG, 5))
    }
    return {"model": model, "optimizer": slots, "rng": torch.full((5000,), seed, dtype=torch.uint8), "step": 7}


def device_of(state: dict[str, Any]) -> PlayedStaging:
    """The model and the optimizer's averages are there, its counters and the rest are not."""
    averages = [slot["avg"] for slot in state["optimizer"].values()]
    return PlayedStaging([*state["model"].values(), *averages])


def lent(state: dict[str, Any]) -> Snapshot:
    return Snapshot.lend(state, CHUNK_BYTES, device_of(state))


def transfer_of(store: str, rank: int, donors: int, number: int) -> Transfer:
    """To member 0 from those that follow, in quorum 1.`number`."""
    meeting = Meeting(quorum_id=QuorumId(1, number), store=store, prefix="recovery0")
    return Transfer(
        key=f"1.{number}/7/abc",
        rank=rank,
        joiner=Peer(rank=0, name="0#1"),
        donors=tuple(Peer(rank=n, name=f"{n}#1") for n in range(1, donors + 1)),
        meeting=meeting,
    )


def donate(store: str, rank: int, layers: int, pipe: Connection) -> None:
    """A process's work: donor `rank` of two, and then of one."""
    torch.set_num_threads(1)
    state = state_of(1, layers)
    transport = PlayedTransport(device_of(state), Theatre(), f"GPU {rank}")
    transport.open(Place(host="127.0.0.1", timeout_s=20.0))
    for number, (donor, donors) in enumerate(((rank, 2), (1, 1)), 1):
        transport.offer(lent(state), [transfer_of(store, donor, donors, number)])
        pipe.send("offered")
        pipe.recv()
    transport.close()
