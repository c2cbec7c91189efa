"""Live state between devices: on GPUs where there are two; its own logic everywhere, with a device that is played."""

import contextlib
import itertools
import logging
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from everstep.collectives import nccl_group, nccl_peers
from everstep.collectives.store import host_store
from everstep.errors import PeerLost, RecoveryFailed, StepInterrupted
from everstep.recovery import Arrival, InPlace, Landing, Place, RecoveryTransport, Snapshot, Transfer
from everstep.recovery import peers as recovery_peers
from everstep.recovery.over_group import GroupTransport
from everstep.recovery.staging import Staging
from everstep.train.transports import OverNccl, check_place, over_gloo
from tests.collectives.test_nccl import QUIET, needs_a_gpu, needs_two_gpus
from tests.recovery.far import Far
from tests.recovery.played_device import (
    BIG,
    CHUNK_BYTES,
    ON_CPU,
    PlayedStaging,
    PlayedTransport,
    Theatre,
    device_of,
    donate,
    lent,
    state_of,
    transfer_of,
)
from tests.recovery.trees import assert_same
from tests.recovery.wires import Running
from tests.support.processes import Spawner
from tests.support.waiting import wait_until

ENDS_WITHIN_S = 5.0


class Party:
    """A joiner (rank 0) and donors, each with a device of its own."""

    def __init__(self, store: str, joiner: RecoveryTransport, donors: list[RecoveryTransport]) -> None:
        self.transports = [joiner, *donors]
        self._store = store
        self._transfers = itertools.count(1)
        self._number = 0
        for transport in self.transports:
            transport.open(Place(host="127.0.0.1", timeout_s=20.0))

    def transfer(self, rank: int) -> Transfer:
        return transfer_of(self._store, rank, len(self.transports) - 1, self._number)

    def begin(self, snapshots: list[Snapshot], own: dict[str, Any], landing: Landing, **more: Any) -> Any:
        """The next quorum: all donors offer, the joiner is about to fetch."""
        self._number = next(self._transfers)
        for rank, snapshot in enumerate(snapshots, 1):
            self.transports[rank].offer(snapshot, [self.transfer(rank)])
        return self.transports[0].fetch(self.transfer(0), Arrival(own, landing, **more))

    def when_connected(self, *_: int) -> None:
        """For `on_progress`: the rest of the state waits until the joiner's communicators that were begun are there."""
        wait_until_connected(self.transports[0])


def wait_until_connected(joiner: Any) -> None:
    (*_, peers) = joiner.made
    wait_until(lambda: peers.pairs and all(pair.ended.is_set() for pair in list(peers.pairs.values())), ENDS_WITHIN_S)


@contextlib.contextmanager
def party(joiner: RecoveryTransport, *donors: RecoveryTransport) -> Iterator[Party]:
    with host_store() as store:
        made = Party(store.address, joiner, list(donors))
        try:
            yield made
        finally:
            for transport in made.transports:
                transport.close()
            wait_until(lambda: not _threads(), ENDS_WITHIN_S, what=f"the end of {_threads()}")


def _threads() -> list[str]:
    names = ("everstep-peers", "everstep-recovery", nccl_group.HELPER_NAME, "played-nccl")
    return [t.name for t in threading.enumerate() if t.name.startswith(names)]


def test_lanes_are_numbered_alike_on_both_sides_of_the_seam() -> None:
    assert recovery_peers.DEVICE == nccl_peers.DEVICE


# ---- a device that is played


def test_what_lies_on_devices_at_both_ends_travels_between_them_and_lands_in_place() -> None:
    states, own, theatre = [state_of(1, 16), state_of(1, 16)], state_of(2, 16), Theatre()
    own["optimizer"] = {}  # as in a fresh process
    there = device_of(own)
    own["model"]["1.weight"] = torch.zeros(BIG)  # on the joiner's host
    donors = [device_of(state) for state in states]
    states[0]["model"]["2.weight"] = states[0]["model"]["2.weight"].clone()  # on that donor's host
    where = {name: tensor.data_ptr() for name, tensor in own["model"].items()}
    joiner = PlayedTransport(there, theatre, "GPU 0")
    with party(joiner, *(PlayedTransport(it, theatre, f"GPU {n}") for n, it in enumerate(donors, 1))) as them:
        snapshots = [Snapshot.lend(state, CHUNK_BYTES, it) for state, it in zip(states, donors, strict=True)]
        fetch = them.begin(snapshots, own, InPlace(own), on_progress=them.when_connected)
        arrived = fetch.run()
    assert_same(arrived, states[0])
    assert {name: tensor.data_ptr() for name, tensor in arrived["model"].items()} == where
    averages = sum(slot["avg"].nbytes for slot in states[0]["optimizer"].values())
    assert there.made == averages, "what the joiner did not have is on its device, too; counters are not"
    assert not fetch.report.digest_errors
    assert theatre.sent_bytes > fetch.report.total_bytes / 4


def test_it_may_land_aside_in_host_memory() -> None:
    state, own, theatre = state_of(1, 8), state_of(2, 8), Theatre()
    transports = [PlayedTransport(device_of(it), theatre, f"GPU {n}") for n, it in enumerate((own, state))]
    with party(*transports) as them:
        assert_same(them.begin([lent(state)], own, Landing(), on_progress=them.when_connected).run(), state)
    assert theatre.sent_bytes
    assert_same(own, state_of(2, 8))


def test_a_bit_flipped_on_the_way_is_counted_and_the_rest_goes_by_way_of_the_host() -> None:
    def flip(number: int, tensor: torch.Tensor) -> torch.Tensor:
        damaged = tensor.clone()
        damaged[len(damaged) // 2] ^= number == 1
        return damaged

    state, own, theatre = state_of(1, 16), state_of(2, 16), Theatre(flip)
    transports = [PlayedTransport(device_of(it), theatre, f"GPU {n}") for n, it in enumerate((own, state))]
    with party(*transports) as them:
        fetch = them.begin([lent(state)], own, InPlace(own), on_progress=them.when_connected)
        assert_same(fetch.run(), state)
    assert fetch.report.digest_errors == 1
    assert 0 < theatre.sent_bytes < fetch.report.total_bytes / 2


@contextlib.contextmanager
def in_flight(theatre: Theatre, **more: Any) -> Iterator[tuple[Party, Running, dict[str, Any], Snapshot]]:
    """A fetch that waits for what a donor's device does not send."""
    state, own = state_of(1, 8), state_of(2, 8)
    joiner, donor = (PlayedTransport(device_of(it), theatre, name) for it, name in ((own, "GPU 0"), (state, "GPU 1")))

    def hold(*_: int) -> None:
        them.when_connected()
        theatre.may_send.clear()

    with party(joiner, donor) as them:
        snapshot = lent(state)
        with Running(them.begin([snapshot], own, InPlace(own), on_progress=hold)) as running:
            wait_until(theatre.is_held, ENDS_WITHIN_S)
            yield them, running, own, snapshot


def test_an_abort_ends_the_fetch_when_the_device_writes_no_more() -> None:
    theatre = Theatre()
    with in_flight(theatre) as (_, running, own, _):
        theatre.aborts_end.clear()
        began_at = time.monotonic()
        running.fetch.abort()
        slow = threading.Timer(0.3, theatre.aborts_end.set)
        slow.start()
        running.wait()
        assert theatre.aborts_end.is_set(), "it has settled while the device still writes"
        slow.join()
        assert time.monotonic() - began_at < 2.0
        assert isinstance(running.error, StepInterrupted)
        for tensor in own["model"].values():
            tensor.fill_(-1)
        theatre.may_send.set()
    assert all(tensor.eq(-1).all() for tensor in own["model"].values())


def test_a_loan_that_is_revoked_in_the_middle_is_not_believed_and_the_donor_is_free_at_once() -> None:
    theatre = Theatre()
    with in_flight(theatre) as (them, running, own, snapshot):
        began_at = time.monotonic()
        snapshot.revoke()
        them.transports[1].withdraw(them.transfer(1).key)
        assert time.monotonic() - began_at < 0.5
        running.wait()
        assert isinstance(running.error, RecoveryFailed)
        for tensor in own["model"].values():
            tensor.fill_(-1)
        theatre.may_send.set()
    assert all(tensor.eq(-1).all() for tensor in own["model"].values())


def test_where_nccl_cannot_be_built_all_goes_by_way_of_the_host_and_a_line_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    state, own, theatre = state_of(1), state_of(2), Theatre()
    joiner = PlayedTransport(device_of(own), theatre, "GPU 0", make=theatre.refuse)
    with party(joiner, PlayedTransport(device_of(state), theatre, "GPU 1")) as them, caplog.at_level(logging.WARNING):

        def until_it_failed(*_: int) -> None:
            wait_until(lambda: joiner.made[0].device is None, ENDS_WITHIN_S)

        assert_same(them.begin([lent(state)], own, InPlace(own), on_progress=until_it_failed).run(), state)
        own["model"]["0.weight"].zero_()
        assert_same(them.begin([lent(state)], own, InPlace(own)).run(), state)  # and it is not tried again
    assert not theatre.sent
    assert sum("duplicate GPU" in record.message for record in caplog.records) == 1


def test_a_member_without_a_device_or_of_an_older_version_or_on_the_same_gpu_takes_the_way_of_the_host() -> None:
    state, own, theatre = state_of(1), state_of(2), Theatre()
    with_device = [PlayedTransport(device_of(it), theatre, "GPU 0") for it in (own, state)]
    for joiner, donor in ((0, None), (None, 1), (0, 1)):
        chosen = [GroupTransport(over_gloo, check_place) if n is None else with_device[n] for n in (joiner, donor)]
        for tensor in own["model"].values():
            tensor.zero_()
        with party(*chosen) as them:
            assert_same(them.begin([lent(state)], own, InPlace(own)).run(), state)
    assert not theatre.made


def test_a_device_that_stands_still_is_found_out_by_the_joiners_patience_and_not_asked_again() -> None:
    theatre = Theatre()
    joiner, donor = (PlayedTransport(PlayedStaging([]), theatre, f"GPU {n}") for n in range(2))
    with party(joiner, donor) as them:
        peers = [them.transports[n]._peers(Place(host="127.0.0.1"), them.transfer(n), n) for n in (0, 1)]  # type: ignore[attr-defined]
        connecting = threading.Thread(target=peers[1].connect)
        connecting.start()
        peers[0].connect()
        connecting.join()
        for n in (0, 1):
            peers[n].open_device(1 - n)
        there = peers[0].link(1, 0)
        wait_until(lambda: there.has_device, ENDS_WITHIN_S)
        message = there.receive(torch.zeros(100, dtype=torch.uint8), recovery_peers.DEVICE, 0.05)
        with pytest.raises(PeerLost, match="nothing moved"):
            message.wait()
        assert (peers[0].device, peers[1].device) == (None, ON_CPU)
        for each in peers:
            each.close()


@pytest.mark.soak
def test_a_donor_killed_while_devices_exchange_fails_the_fetch_which_goes_well_with_the_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    layers, own, theatre = 64, state_of(2, 64), Theatre()
    joiner = PlayedTransport(device_of(own), theatre, "GPU 0")
    joiner.reason_s = 2.0
    joiner.open(Place(host="127.0.0.1", timeout_s=20.0))
    with (
        host_store() as store,
        Far(donate, store.address, 1, layers) as first,
        Far(donate, store.address, 2, layers) as second,
    ):
        assert [first.hear(), second.hear()] == ["offered"] * 2
        has_struck: list[int] = []

        def strike(done: int, total: int) -> None:
            if not has_struck:
                wait_until_connected(joiner)
            if done > total / 2 and not has_struck:
                has_struck.append(done)
                first.send(signal.SIGKILL)

        began_at = time.monotonic()
        with pytest.raises(RecoveryFailed):
            joiner.fetch(transfer_of(store.address, 0, 2, 1), Arrival(own, InPlace(own), on_progress=strike)).run()
        assert has_struck
        assert time.monotonic() - began_at < 10.0
        for tensor in own["model"].values():
            tensor.fill_(-1)
        assert joiner.made[0].device is not None, "it takes a death for a fault of NCCL's"
        second.pipe.send("and another time")
        assert second.hear() == "offered"
        assert all(tensor.eq(-1).all() for tensor in own["model"].values())
        assert_same(
            joiner.fetch(transfer_of(store.address, 0, 1, 2), Arrival(own, InPlace(own))).run(), state_of(1, layers)
        )
        second.pipe.send("enough")
        second.process.join(ENDS_WITHIN_S)
        assert second.process.exitcode == 0
    joiner.close()
    caplog.clear()  # it holds errors, they hold messages that never came, and those hold Gloo's listening socket


# ---- on GPUs

MEMBER = """
import sys, threading, torch
from everstep.core.types import QuorumId
from everstep.recovery import Arrival, InPlace, Meeting, Peer, Place, Snapshot, Transfer
from everstep.recovery.over_group import GroupTransport
from everstep.train.transports import OverNccl, check_place

rank, store = int(sys.argv[1]), sys.argv[2]
torch.cuda.set_device(rank)
model = {str(n): torch.arange(n, n + (8 << 20), dtype=torch.float32, device="cuda") for n in range(4)}
state = {"model": model, "step": torch.tensor(7.0)}
meeting = Meeting(quorum_id=QuorumId(1, 1), store=store, prefix="recovery0")
transfer = Transfer(key="1.1/7/abc", rank=rank, joiner=Peer(rank=0, name="0#1"),
                    donors=(Peer(rank=1, name="1#1"),), meeting=meeting)
transport = GroupTransport(OverNccl(), check_place, device_bytes_min=1)
transport.open(Place(host="127.0.0.1", timeout_s=60.0))
if rank == 1:
    transport.offer(Snapshot.lend(state), [transfer])
    print("offered", flush=True)
    sys.stdin.readline()
else:
    for tensor in model.values():
        tensor.zero_()
    where = {name: tensor.data_ptr() for name, tensor in model.items()}
    made = []
    build = transport._make_peers
    transport._make_peers = lambda *args: made.append(build(*args)) or made[-1]
    def connected(*_):
        while not made[0].link(1, 0).has_device and made[0].device is not None:
            threading.Event().wait(0.01)
    there = transport.fetch(transfer, Arrival(state, InPlace(state), on_progress=connected)).run()
    is_whole = all(torch.equal(tensor.cpu(), torch.arange(int(n), int(n) + (8 << 20), dtype=torch.float32))
                   for n, tensor in there["model"].items())
    is_in_place = {name: tensor.data_ptr() for name, tensor in there["model"].items()} == where
    print("fetched", is_whole, is_in_place, made[0].device is not None, flush=True)
transport.close()
"""


@needs_two_gpus
def test_a_state_goes_from_one_gpu_to_another_in_place(spawn: Spawner) -> None:
    with host_store() as store:
        joiner, donor = (spawn(["-c", MEMBER, str(rank), store.address], env=dict(QUIET)) for rank in (0, 1))
        donor.expect_line("offered", deadline_s=90.0)
        assert joiner.expect_line("fetched", deadline_s=90.0) == "fetched True True True"
        donor.send("end")
        for member in (joiner, donor):
            assert member.wait(60.0) == 0, member.output()


@needs_a_gpu
def test_tensors_of_one_gpu_arrive_in_place_by_way_of_the_host() -> None:
    state, own = ({"model": {"w": torch.full((3 << 20,), n, device="cuda")}} for n in (1, 2))
    where = own["model"]["w"].data_ptr()
    with party(*(GroupTransport(OverNccl(), check_place, device_bytes_min=1) for _ in range(2))) as them:
        there = them.begin([Snapshot.lend(state, CHUNK_BYTES)], own, InPlace(own)).run()
    assert there["model"]["w"].data_ptr() == where
    assert own["model"]["w"].eq(1).all()


@needs_a_gpu
def test_a_staging_copies_what_the_training_has_queued_before_it_was_made() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    tensor = torch.zeros(1 << 24, dtype=torch.uint8, device=device)
    torch.cuda._sleep(1 << 27)  # type: ignore[no-untyped-call]
    tensor.fill_(1)
    staging = Staging(device)
    assert staging.gather([tensor[:100], torch.ones(3, dtype=torch.uint8)]).eq(1).all()
    places = [torch.zeros(2, dtype=torch.uint8), staging.empty(2)]
    staging.copy([tensor[:2], tensor[:2]], places)
    assert all(place.eq(1).all() for place in places)
