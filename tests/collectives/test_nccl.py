"""The NCCL process group: on GPUs where there are any; its own logic everywhere, over a stand-in for torch's NCCL."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ClassVar

import pytest
import torch

from everstep.collectives import nccl, nccl_group, torch_private
from everstep.collectives.gloo import GlooProcessGroup
from everstep.collectives.local import LocalProcessGroup
from everstep.collectives.nccl_group import NcclGroup, NcclPlace
from everstep.collectives.process_group import Membership, ReduceOp, Work
from everstep.collectives.rebuilt import RebuiltProcessGroup
from everstep.collectives.store import HostedStore, host_store
from everstep.core.types import QuorumId
from everstep.errors import ConfigError, PeerLost, StepInterrupted
from tests.support.processes import Spawned, Spawner
from tests.support.waiting import wait_until

DEADLINE_S = 20.0
QUIET = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}
HAS_NCCL = torch.cuda.is_available() and torch.distributed.is_nccl_available()
GPUS = torch.cuda.device_count() if HAS_NCCL else 0
needs_a_gpu = pytest.mark.skipif(GPUS < 1, reason="needs a GPU and a torch with NCCL")
needs_two_gpus = pytest.mark.skipif(GPUS < 2, reason="needs two GPUs: NCCL refuses two members on one")


@pytest.fixture
def store() -> Iterator[HostedStore]:
    with host_store() as hosted:
        yield hosted


# ---- settings


def test_asking_for_nccl_where_it_cannot_work_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"nccl was asked for, .* gloo$"):
        nccl.NcclProcessGroup(torch.device("cuda" if not HAS_NCCL else "cpu"), environ=QUIET)


def test_an_environment_in_which_the_watchdog_ends_the_process_is_refused_with_what_to_export() -> None:
    nccl.check_environment(QUIET)
    for missing in QUIET:
        with pytest.raises(ConfigError, match=f"export {missing}=0$"):
            nccl.check_environment({name: value for name, value in QUIET.items() if name != missing})
    with pytest.raises(ConfigError, match=r"TORCH_DISTRIBUTED_DEBUG=DETAIL lets .* unset it"):
        nccl.check_environment(QUIET | {"TORCH_DISTRIBUTED_DEBUG": "DETAIL"})


# ---- a stand-in for torch's NCCL


class StandInWork:
    """Ends when every member has brought its tensor, or with its communicator."""

    def __init__(self, communicator: "StandIn", brought: dict[int, torch.Tensor]) -> None:
        self._communicator = communicator
        self._brought = brought

    def is_completed(self) -> bool:
        mine = self._communicator
        return len(self._brought) == mine.size or mine.is_aborted.is_set() or mine.error is not None

    def wait(self, timeout: object = None) -> bool:
        assert self.is_completed(), "the group asks only of what has ended that a stream waits for it"
        if self._communicator.error is not None:
            raise torch.distributed.DistBackendError(self._communicator.error)
        return True


class StandIn:
    """Reduces when the last member has come, as NCCL's kernels do; an abort leaves rubbish, as NCCL's may."""

    # By the id that rank 0 made: each operation's tensors, by rank.
    operations: ClassVar[dict[bytes, list[dict[int, torch.Tensor]]]] = {}
    lock = threading.Lock()

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.store: Any = torch.distributed.HashStore()  # type: ignore[attr-defined]  # documented, not in __all__
        self.is_aborted = threading.Event()
        self.error: str | None = None  # as when NCCL finds that a peer's connection has ended
        self._issued: list[tuple[StandInWork, torch.Tensor]] = []

    def eager_connect_single_device(self, device: torch.device) -> None:
        if self.rank == 0:
            with self.lock:
                self.store.set("0", f"id {len(self.operations)}")
                self.operations[self.store.get("0")] = []
        assert self.store.check(["0"]), "this rank connects before it knows the id"

    def allreduce(self, tensors: list[torch.Tensor], opts: object) -> StandInWork:
        (tensor,) = tensors
        with self.lock:
            all_ = self.operations[self.store.get("0")]
            while len(all_) <= len(self._issued):
                all_.append({})
            brought = all_[len(self._issued)]
            if len(brought) == self.size - 1:
                total = torch.stack([*brought.values(), tensor]).sum(0)
                for each in (*brought.values(), tensor):
                    each.copy_(total)
            brought[self.rank] = tensor
        work = StandInWork(self, brought)
        self._issued.append((work, tensor))
        return work

    def broadcast(self, tensors: list[torch.Tensor], opts: object) -> StandInWork:
        raise NotImplementedError

    def _allgather_base(self, output: torch.Tensor, source: torch.Tensor) -> StandInWork:
        output.zero_()
        output[self.rank].copy_(source[0])
        return self.allreduce([output], None)

    def abort(self) -> None:
        for work, tensor in self._issued:
            if not work.is_completed():
                tensor.fill_(-1.0)
        self.is_aborted.set()


class Party:
    """Members in one process, each on a thread of its own, over stand-ins."""

    def __init__(self, count: int, store: HostedStore) -> None:
        self._store = store.address
        self.stand_ins: list[StandIn] = []
        place = NcclPlace(device=torch.device("cpu"), make=self._make)
        self.groups = [RebuiltProcessGroup(lambda m: NcclGroup(m, place), nccl_group.HELPER_NAME) for _ in range(count)]
        self._threads = [ThreadPoolExecutor(1) for _ in range(count)]

    def _make(self, rank: int, size: int, timeout_s: float) -> tuple[torch_private.TorchNccl, Any]:
        stand_in = StandIn(rank, size)
        self.stand_ins.append(stand_in)
        return stand_in, stand_in.store

    def begin(self, member: int, order: Callable[..., Any], *args: Any) -> "Future[Any]":
        """`order(group, *args)` on the member's own thread."""
        return self._threads[member].submit(order, self.groups[member], *args)

    def do(self, member: int, order: Callable[..., Any], *args: Any) -> Any:
        return self.begin(member, order, *args).result(DEADLINE_S)

    def do_all(self, order: Callable[..., Any], *args: Any) -> list[Any]:
        begun = [self.begin(member, order, *args) for member in range(len(self.groups))]
        return [each.result(DEADLINE_S) for each in begun]

    def configure(self, seq: int, members: list[int], timeout_s: float = DEADLINE_S) -> None:
        begun = [
            self.begin(member, RebuiltProcessGroup.configure, self.membership(seq, rank, len(members), timeout_s))
            for rank, member in enumerate(members)
        ]
        for each in begun:
            each.result(DEADLINE_S)

    def membership(self, seq: int, rank: int, size: int, timeout_s: float = DEADLINE_S) -> Membership:
        return Membership(quorum_id=QuorumId(1, seq), rank=rank, size=size, store=self._store, timeout_s=timeout_s)

    def close(self) -> None:
        for group in self.groups:
            group.close()
        for executor in self._threads:
            executor.shutdown()
        for thread in threading.enumerate():
            if thread.name == nccl_group.HELPER_NAME:
                thread.join(DEADLINE_S)


@pytest.fixture
def party(store: HostedStore) -> Iterator[Callable[[int], Party]]:
    made: list[Party] = []

    def make(count: int) -> Party:
        made.append(Party(count, store))
        return made[-1]

    yield make
    for each in made:
        each.close()
    StandIn.operations.clear()


def issued(group: RebuiltProcessGroup, tensor: torch.Tensor) -> Work:
    return group.allreduce(tensor)


def reduced(group: RebuiltProcessGroup) -> list[float]:
    tensor = torch.ones(2)
    group.allreduce(tensor).wait()
    return list(tensor.tolist())


def gathered(group: RebuiltProcessGroup) -> list[list[float]]:
    return list(group.allgather(torch.tensor([float(group.rank), 7.0])).tolist())


def awaited(_: RebuiltProcessGroup, work: Work) -> None:
    work.wait()


def test_members_pass_the_id_on_then_sum_and_gather(party: Callable[[int], Party]) -> None:
    members = party(3)
    members.configure(1, [0, 1, 2])
    assert members.do_all(reduced) == [[3.0, 3.0]] * 3
    assert members.do_all(gathered) == [[[0.0, 7.0], [1.0, 7.0], [2.0, 7.0]]] * 3


def test_after_an_abort_in_the_middle_of_an_allreduce_the_survivors_form_a_group(party: Callable[[int], Party]) -> None:
    members = party(3)
    members.configure(1, [0, 1, 2])
    stuck = [members.begin(member, reduced) for member in (0, 1)]  # the third never comes
    for group in members.groups[:2]:
        began_at = time.monotonic()
        group.abort(QuorumId(1, 1))
        assert time.monotonic() - began_at < 0.5
    for order in stuck:
        with pytest.raises(StepInterrupted, match="was aborted"):
            order.result(DEADLINE_S)
    members.configure(2, [0, 1])
    assert [order.result(DEADLINE_S) for order in [members.begin(m, reduced) for m in (0, 1)]] == [[2.0, 2.0]] * 2


def test_what_completed_before_the_abort_is_kept_and_nothing_else_is_believed(party: Callable[[int], Party]) -> None:
    members = party(2)
    members.configure(1, [0, 1])
    first, second = torch.ones(2), torch.ones(2)
    works = [members.do(0, issued, tensor) for tensor in (first, second)]
    assert members.do(1, reduced) == [2.0, 2.0]
    members.groups[0].abort(QuorumId(1, 1))
    members.do(0, awaited, works[0])
    assert first.tolist() == [2.0, 2.0]
    with pytest.raises(StepInterrupted):
        members.do(0, awaited, works[1])
    with pytest.raises(StepInterrupted):
        members.do(0, reduced)


def test_an_error_of_nccl_is_the_loss_of_a_peer(party: Callable[[int], Party]) -> None:
    members = party(2)
    members.configure(1, [0, 1])
    work = members.do(0, issued, torch.ones(2))
    assert not work.is_completed()
    (mine,) = [stand_in for stand_in in members.stand_ins if stand_in.rank == 0]
    mine.error = "NCCL error: remote process exited or there was a network error"
    with pytest.raises(PeerLost, match=r"quorum 1\.1: NCCL error: remote process exited") as lost:
        work.wait()
    assert lost.value.peer == 1
    with pytest.raises(PeerLost):
        members.do(0, reduced)


def test_a_collective_that_outlives_its_timeout_severs_the_group(party: Callable[[int], Party]) -> None:
    members = party(2)
    members.configure(1, [0, 1], timeout_s=0.5)
    with pytest.raises(PeerLost, match="did not end in time"):
        members.do(0, reduced)


def test_a_build_that_waits_for_a_member_ends_when_it_is_aborted(party: Callable[[int], Party]) -> None:
    members = party(2)
    waiting = members.begin(0, RebuiltProcessGroup.configure, members.membership(1, 0, 2))
    wait_until(lambda: members.stand_ins, what="the first member has made its communicator")
    members.groups[0].abort(QuorumId(1, 1))
    with pytest.raises(StepInterrupted):
        waiting.result(DEADLINE_S)
    wait_until(members.stand_ins[0].is_aborted.is_set, what="what was half built is aborted")
    members.configure(2, [0, 1])


def test_a_group_of_one_is_the_identity_without_nccl(party: Callable[[int], Party]) -> None:
    members = party(1)
    members.configure(1, [0])
    assert members.do(0, reduced) == [1.0, 1.0]
    assert members.stand_ins == []


def test_cpu_tensors_travel_over_the_group_for_the_cpu() -> None:
    with nccl.ProcessGroupByDevice(GlooProcessGroup(), LocalProcessGroup()) as group:
        group.configure(Membership(quorum_id=QuorumId(1, 1), rank=0, size=1))
        assert (group.quorum_id, group.rank, group.size) == (QuorumId(1, 1), 0, 1)
        tensor = torch.tensor([1.0])
        group.allreduce(tensor, ReduceOp.MAX).wait()
        assert group.allgather(tensor).tolist() == [[1.0]]
        group.abort(QuorumId(1, 1))
        with pytest.raises(StepInterrupted):
            group.allreduce(tensor)


# ---- on GPUs

MEMBER = """
import os, sys, threading, time, torch
from everstep.collectives.nccl import NcclProcessGroup
from everstep.collectives.process_group import Membership, ReduceOp
from everstep.core.types import QuorumId
from everstep.errors import StepInterrupted

rank, size, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
device = torch.device("cuda", rank)
torch.cuda.set_device(device)

def reduce():
    tensor = torch.full((1 << 20,), float(rank + 1), device=device)
    group.allreduce(tensor).wait()
    return tensor.unique().tolist()

with NcclProcessGroup(device, environ=os.environ, even_alone=True) as group:
    for line in sys.stdin:
        order, seq = line.split()
        began_at = time.monotonic()
        try:
            if order == "configure":
                group.configure(Membership(
                    quorum_id=QuorumId(1, int(seq)), rank=rank, size=size, store=store, timeout_s=60.0))
                answer = group.size
            elif order == "reduce":
                answer = reduce()
            elif order == "gather":
                answer = group.allgather(torch.tensor([rank], device=device)).tolist()
            elif order == "reduce-aborted":
                threading.Timer(0.3, group.abort, [QuorumId(1, int(seq))]).start()
                answer = reduce()
        except StepInterrupted as error:
            answer = f"{type(error).__name__} {time.monotonic() - began_at < 10.0}"
        print(order, answer, flush=True)
"""


def start_members(spawn: Spawner, count: int, store: HostedStore) -> list[Spawned]:
    return [spawn(["-c", MEMBER, str(rank), str(count), store.address], env=dict(QUIET)) for rank in range(count)]


def order_all(members: list[Spawned], order: str, seq: int) -> list[str]:
    for member in members:
        member.send(f"{order} {seq}")
    return [member.expect_line(order, deadline_s=90.0).partition(" ")[2] for member in members]


def end(members: list[Spawned]) -> None:
    for member in members:
        assert member.process.stdin is not None
        member.process.stdin.close()
    for member in members:
        assert member.wait(60.0) == 0, member.output()


@needs_a_gpu
def test_one_member_on_one_gpu_builds_reduces_aborts_and_builds_again(spawn: Spawner, store: HostedStore) -> None:
    members = start_members(spawn, 1, store)
    for seq in (1, 2):
        assert order_all(members, "configure", seq) == ["1"]
        assert order_all(members, "reduce", seq) == ["[1.0]"]
        assert order_all(members, "gather", seq) == ["[[0]]"]
    end(members)


@needs_two_gpus
def test_two_members_survive_an_abort_in_the_middle_of_an_allreduce(spawn: Spawner, store: HostedStore) -> None:
    members = start_members(spawn, 2, store)
    assert order_all(members, "configure", 1) == ["2", "2"]
    assert order_all(members, "reduce", 1) == ["[3.0]", "[3.0]"]
    assert order_all(members[:1], "reduce-aborted", 1) == ["StepInterrupted True"]  # its peer does not take part
    assert order_all(members, "configure", 2) == ["2", "2"]
    assert order_all(members, "reduce", 2) == ["[3.0]", "[3.0]"]
    end(members)
