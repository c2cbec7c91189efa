"""Sends and receives between two members' GPUs: a communicator for each pair, beside the Gloo group of all of them.

One for each pair, so that none waits for another's peer, and the end of one is no matter of the others'. They run at
the same time on one GPU, which NCCL allows as long as all their kernels fit there, and nobody who waits for a GPU holds
up what it waits for. So each occupies few thread blocks, and who asks for something receives before he asks
(recovery/taking.py): no send waits for a receive that is not there. Should it stand still all the same, the joiner
finds out by its patience, and uses NCCL for this no more.

As yet it has not run on a GPU: see nccl_group.py.
"""

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor

from everstep import fork_guard
from everstep.collectives import torch_private
from everstep.collectives.gloo_peers import LANES, GlooPeers, PeerLink, PeerMessage
from everstep.collectives.nccl_group import HELPER_NAME, NcclGroup, NcclPlace
from everstep.collectives.nccl_work import NcclWork, pauses
from everstep.collectives.process_group import Membership
from everstep.collectives.rebuilt import await_build, build_aside
from everstep.errors import PeerLost, StepInterrupted

DEVICE = LANES  # the lane, beside Gloo's
BLOCKS_MAX = 4  # a joiner has up to 8 donors, a donor some 16 joiners; a GPU has a hundred multiprocessors
_LOOK_S = 0.01
_JOIN_S = 1.0

_log = logging.getLogger(__name__)
_make = functools.partial(torch_private.new_nccl, blocks_max=BLOCKS_MAX)

_FROM_DONOR = torch_private.broadcast_options(1)


@dataclass(frozen=True, kw_only=True)
class DevicePlace:
    """`membership` is the Gloo group's: 0 is the joiner. `name` tells `device` from every other one of the job.

    `has_failed` is set when this joiner has found that NCCL does not work for it; from then on it has no device. A peer
    that has died, or withdrawn, ends both groups, and Gloo tells within `reason_s`: then it was not NCCL.
    """

    membership: Membership
    device: torch.device
    name: str
    has_failed: threading.Event = field(default_factory=threading.Event)
    reason_s: float = 0.7
    make: Callable[[int, int, float], tuple[torch_private.TorchNccl, torch_private.Store]] = _make


class NcclPair(NcclGroup):
    """A communicator of two, the joiner is 0; `peer` is the other one's rank among all.

    What is sent is broadcast: between two that is the same, and it needs nothing but the communicator (torch_private).
    """

    def __init__(self, membership: Membership, place: NcclPlace, peer: int) -> None:
        super().__init__(membership, place)
        self.peer = peer

    def lost_by(self, error: str) -> BaseException:
        if self._failure is None:
            self._failure = PeerLost(" ".join(error.split())[:500], self.peer)
        return self.failure()

    def exchange(self, tensor: Tensor) -> NcclWork:
        """The donor sends it, the joiner receives into it, after what is queued on the current stream."""
        nccl = cast(torch_private.TorchNccl, self._in_use())
        try:
            return self._note(NcclWork(self, nccl.broadcast([tensor], _FROM_DONOR)))
        except RuntimeError as error:  # torch.distributed.DistError, mostly
            raise self.lost_by(str(error)) from None

    def _greeting(self, raw: torch_private.TorchNccl, present: Tensor) -> torch_private.TorchWork:
        """The way that all else takes: NCCL connects for each when it is first used."""
        return raw.broadcast([present if self.membership.rank else present.zero_()], _FROM_DONOR)

    def _check_greeted(self, count: int) -> None:
        if count != 1:
            raise PeerLost(f"quorum {self.membership.quorum_id}: NCCL delivers {count} instead of 1")


class DeviceMessage:
    """One message on lane DEVICE."""

    def __init__(self, peers: "NcclPeers", pair: NcclPair, work: NcclWork, patience_s: float) -> None:
        self._peers = peers
        self._pair = pair
        self._work = work
        self._patience_s = patience_s

    def wait(self, is_over: Callable[[], bool] = lambda: False) -> None:
        """Until the GPU has finished it. Raises StepInterrupted, PeerLost; ConnectionAbortedError as soon as `is_over`.

        When it raises the GPU may still be at work on the tensor; `NcclPeers.settle` waits for that.
        """
        look_at = began_at = time.monotonic()
        for pause_s in pauses():
            if self._pair.is_severed:
                raise self._pair.failure()
            if self._work.is_completed():
                break
            if is_over():
                raise ConnectionAbortedError("no longer wanted")
            now = time.monotonic()
            if now >= look_at:
                look_at = now + _LOOK_S
                self._peers.check()
            if now - began_at >= self._patience_s:
                self._peers.give_up(self._pair, PeerLost(f"nothing moved for {self._patience_s:g} s", self._pair.peer))
            time.sleep(pause_s)
        try:
            self._work.wait()
        except StepInterrupted as error:
            self._peers.give_up(self._pair, error)
            raise

    def is_completed(self) -> bool:
        return self._work.is_completed()


class DeviceLink:
    """A Gloo group's link with lane DEVICE, on which donors send; one of a peer's links may use it, no matter which."""

    def __init__(self, peers: "NcclPeers", gloo: PeerLink, peer: int) -> None:
        self._peers = peers
        self._gloo = gloo
        self._peer = peer

    @property
    def has_device(self) -> bool:
        pair = self._peers.pairs.get(self._peer)
        return pair is not None and pair.is_usable

    def send(self, tensor: Tensor, lane: int, patience_s: float) -> PeerMessage | DeviceMessage:
        if lane != DEVICE:
            return self._gloo.send(tensor, lane, patience_s)
        return self._exchange(tensor, patience_s)

    def receive(self, tensor: Tensor, lane: int, patience_s: float) -> PeerMessage | DeviceMessage:
        if lane != DEVICE:
            return self._gloo.receive(tensor, lane, patience_s)
        return self._exchange(tensor, patience_s)

    def _exchange(self, tensor: Tensor, patience_s: float) -> DeviceMessage:
        pair = self._peers.pairs.get(self._peer)
        if pair is None:
            raise PeerLost(f"there is no communicator with rank {self._peer}", self._peer)
        deadline = time.monotonic() + patience_s
        while not pair.ended.wait(_LOOK_S) and time.monotonic() < deadline:
            self._peers.check()
        if not pair.is_usable:
            raise PeerLost(f"no communicator with rank {self._peer}: {pair.failure()}", self._peer)
        try:
            work = pair.exchange(tensor)
        except StepInterrupted as error:
            self._peers.give_up(pair, error)
            raise
        return DeviceMessage(self._peers, pair, work, patience_s)


class NcclPeers:
    """`GlooPeers` with lane DEVICE between the joiner and any donor, once both have called `open_device`."""

    def __init__(self, gloo: GlooPeers, place: DevicePlace) -> None:
        self.pairs: dict[int, NcclPair] = {}
        self._gloo = gloo
        self._place = place
        self._lock = threading.Lock()  # for an instant
        self._is_aborted = False
        self._helpers: list[threading.Thread] = []
        self._lift_guard: Callable[[], None] | None = None

    @property
    def device(self) -> torch.device | None:
        return None if self._place.has_failed.is_set() else self._place.device

    @property
    def device_name(self) -> str:
        return self._place.name

    def connect(self) -> None:
        self._gloo.connect()

    def link(self, peer: int, number: int) -> DeviceLink:
        return DeviceLink(self, self._gloo.link(peer, number), peer)

    def open_device(self, peer: int) -> None:
        """Begin to build; `DeviceLink.has_device` says when it is done. What fails is logged, and nothing else."""
        me, place = self._place.membership, self._place
        donor = max(me.rank, peer)
        membership = replace(me, rank=min(me.rank, 1), size=2, prefix=f"{me.prefix}device{donor}")
        with self._lock:
            if self._is_aborted or peer in self.pairs:
                return
            pair = self.pairs[peer] = NcclPair(membership, NcclPlace(device=place.device, make=place.make), peer)
            if self._lift_guard is None:
                self._lift_guard = fork_guard.guard(self._fds_in_child)
            helper = threading.Thread(target=self._build, args=(pair,), name=HELPER_NAME, daemon=True)
            self._helpers.append(helper)
            helper.start()

    def check(self) -> None:
        self._gloo.check()

    def give_up(self, pair: NcclPair, error: StepInterrupted) -> None:
        """NCCL does not do what it should. Raises StepInterrupted, PeerLost if only because the group has ended."""
        pair.condemn(error)
        pair.cut()
        self._blame(error)

    def abort(self) -> None:
        """Whatever waits raises StepInterrupted within milliseconds, and so does whatever comes. Does not block."""
        with self._lock:
            self._is_aborted = True
        self._gloo.abort()
        for pair in self.pairs.values():
            pair.condemn()
            pair.cut()

    def settle(self, timeout_s: float) -> bool:
        """After `abort`, and with no thread that posts: wait until neither the GPU nor Gloo writes into a tensor."""
        deadline = time.monotonic() + timeout_s
        have_drained = [pair.drain(deadline) for pair in self.pairs.values()]
        return self._gloo.settle(max(0.0, deadline - time.monotonic())) and all(have_drained)

    def close(self) -> None:
        """Ends them as the Gloo group; a build that NCCL does not let go of ends later, by itself."""
        self.abort()
        for pair, helper in zip(self.pairs.values(), self._helpers, strict=True):
            await_build(pair)
            helper.join(_JOIN_S)
            if not helper.is_alive():
                pair.take_down()
        self._gloo.close()
        if self._lift_guard is not None:
            self._lift_guard()

    def _build(self, pair: NcclPair) -> None:
        build_aside(pair)
        if not pair.is_usable:
            with contextlib.suppress(StepInterrupted):
                self._blame(pair.failure())

    def _blame(self, error: BaseException) -> None:
        deadline = time.monotonic() + self._place.reason_s
        while time.monotonic() < deadline:
            self.check()
            time.sleep(_LOOK_S)
        if self._place.membership.rank == 0:  # a donor's joiners may be at fault, and there will be others
            self._place.has_failed.set()
        _log.warning("nccl is not used for live state, which goes by way of the host's memory: %s", error)

    def _fds_in_child(self) -> Iterable[int]:
        for pair in self.pairs.values():
            pair.keep()
        return [fd for pair in self.pairs.values() for fd in pair.fds()]
