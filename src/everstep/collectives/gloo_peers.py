"""Sends and receives between two members, on a Gloo group of their own: for bulk that must not block training's group.

Gloo starts a send or a receive at once, on its own thread. What it offers is a wait that blocks until the end or a
timeout, and a timeout closes every connection; so for receives on lane TALK each link has a thread that waits, in the
order of the posts. When a connection ends, Gloo wakes whoever waits for a message that has not begun to arrive, and
forgets those in the middle of one, coming or going (see gloo_work.py): they would sleep until the timeout. So nobody
waits for what is large: a small message that was sent after it says that it is there.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor

from everstep import fork_guard
from everstep.collectives import torch_private
from everstep.collectives.gloo_group import GlooGroup
from everstep.collectives.process_group import Membership
from everstep.collectives.rebuilt import await_build, build_aside
from everstep.collectives.sockets import is_open

HELPER_NAME = "everstep-peers"
LANES = 2  # of a link: the order of messages on one says nothing of those on the other; a third is in nccl_peers.py
TALK = 0  # the lane of what is small
_LOOK_S = 0.01
_SETTLE_LOOK_S = 0.001
_JOIN_S = 1.0

Start = Callable[[torch_private.TorchGloo, Tensor, int, int], torch_private.TorchWork]


class PeerMessage:
    """One message on its way. It is kept, with its tensor, until it is known to have ended or the group is closed."""

    def __init__(self, link: "PeerLink", work: torch_private.TorchWork, patience_s: float) -> None:
        self.is_watched = False  # its link's thread waits for it
        self._link = link
        self._work: torch_private.TorchWork | None = work
        self._patience = timedelta(seconds=patience_s)
        self._ended = threading.Event()
        self._error = ""

    def wait(self, is_over: Callable[[], bool] = lambda: False) -> None:
        """Raises StepInterrupted, PeerLost; ConnectionAbortedError as soon as `is_over`, and leaves it on its way.

        But for receives on lane TALK only for what the peer has shown to have ended: by a message that followed it.
        """
        group = self._link.group
        if not self.is_watched and not group.is_severed:
            self.run()
        while not self._ended.wait(_LOOK_S):
            group.watch()
            if group.is_severed:
                raise group.failure()
            if is_over():
                raise ConnectionAbortedError("no longer wanted")
        if self._error:
            raise group.lost_by(self._error)

    def is_completed(self) -> bool:
        """Of a receive on lane TALK."""
        return self._ended.is_set()

    def run(self) -> None:
        work, self._work = self._work, None
        try:
            if work is not None:
                work.wait(self._patience)
        except RuntimeError as error:
            self._error = str(error)
        self._link.forget(self)
        self._ended.set()


class PeerLink:
    """To one peer. One thread at a time posts; messages of one lane arrive in order, and must be of equal size.

    `patience_s` is for a message that is waited for, from when those before it have ended.
    """

    def __init__(self, group: "_PeerGroup", peer: int, number: int) -> None:
        self.group = group
        self._peer = peer
        self._first_tag = number * LANES
        self._kept: set[PeerMessage] = set()
        self._posted: queue.SimpleQueue[PeerMessage | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._wait_for_each, name=HELPER_NAME, daemon=True)
        self._thread.start()

    @property
    def has_device(self) -> bool:
        return False

    def send(self, tensor: Tensor, lane: int, patience_s: float) -> PeerMessage:
        """`tensor` (CPU, contiguous) is sent as it is then, or later. Raises StepInterrupted, PeerLost."""
        return self._post(torch_private.send_to, tensor, lane, patience_s)

    def receive(self, tensor: Tensor, lane: int, patience_s: float) -> PeerMessage:
        """Into `tensor` (CPU, contiguous), whose size is the message's. Raises StepInterrupted, PeerLost."""
        message = self._post(torch_private.receive_from, tensor, lane, patience_s)
        if lane == TALK:
            message.is_watched = True
            self._posted.put(message)
        return message

    def forget(self, message: PeerMessage) -> None:
        self._kept.discard(message)

    def end(self, deadline: float) -> None:
        """When its group has been taken down. A thread that Gloo does not wake ends by itself, later."""
        self._posted.put(None)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        self._kept.clear()

    def _post(self, start: Start, tensor: Tensor, lane: int, patience_s: float) -> PeerMessage:
        message = PeerMessage(self, self.group.start(start, tensor, self._peer, self._first_tag + lane), patience_s)
        self._kept.add(message)
        return message

    def _wait_for_each(self) -> None:
        while (message := self._posted.get()) is not None:
            message.run()
            del message


@dataclass(frozen=True, kw_only=True)
class PeerPlace:
    """`membership` is of those who exchange something, and of nobody else; `bind_host` is the address to listen on."""

    membership: Membership
    bind_host: str | None = None


class GlooPeers:
    """`connect`, `link`s, `settle`, `close`, in this order; `abort` from any thread at any moment."""

    def __init__(self, place: PeerPlace) -> None:
        self._group = _PeerGroup(place.membership, place.bind_host, 1)
        self._lock = threading.Lock()
        self._links: dict[tuple[int, int], PeerLink] = {}
        self._helper: threading.Thread | None = None
        self._lift_guard: Callable[[], None] | None = None

    def connect(self) -> None:
        """Block until all members are connected. Raises StepInterrupted (`abort`), PeerLost, ConfigError."""
        group = self._group
        self._lift_guard = fork_guard.guard(self._fds_in_child)
        self._helper = threading.Thread(target=build_aside, args=(group,), name=HELPER_NAME, daemon=True)
        self._helper.start()
        await_build(group)
        if not group.is_usable:
            raise group.failure()

    def link(self, peer: int, number: int) -> PeerLink:
        """A link to that member, apart from those of other numbers. Any thread."""
        with self._lock:
            if self._group.is_severed:
                raise self._group.failure()
            if (peer, number) not in self._links:
                self._links[peer, number] = PeerLink(self._group, peer, number)
            return self._links[peer, number]

    @property
    def device(self) -> torch.device | None:
        return None

    @property
    def device_name(self) -> str:
        return ""

    def open_device(self, peer: int) -> None:
        """There is none."""

    def check(self) -> None:
        """Raises StepInterrupted, PeerLost once the group has ended; who waits for something else asks often."""
        self._group.watch()
        if self._group.is_severed:
            raise self._group.failure()

    def abort(self) -> None:
        """Whatever waits raises StepInterrupted within milliseconds, and so does whatever comes. Does not block."""
        self._group.condemn()
        if self._group.ended.is_set():  # while it is being built, who waits for that cuts it
            self._group.cut()

    def settle(self, timeout_s: float) -> bool:
        """After `abort`: wait until nothing writes into a tensor any more; False when that was not seen in time."""
        return self._group.settle(time.monotonic() + timeout_s)

    def close(self) -> None:
        """Sever it, and free its threads and descriptors; takes some 120 ms."""
        self.abort()
        with self._lock:
            links = list(self._links.values())
        if self._helper is not None:
            await_build(self._group)
            self._helper.join(_JOIN_S)
            if not self._helper.is_alive():  # or it takes the group down itself, when Gloo lets go of it
                self._group.take_down()
        deadline = time.monotonic() + _JOIN_S
        self._group.settle(deadline)
        for link in links:
            link.end(deadline)
        if self._lift_guard is not None:
            self._lift_guard()

    def _fds_in_child(self) -> Iterable[int]:
        self._group.keep()
        return self._group.fds()


class _PeerGroup(GlooGroup):
    """A GlooGroup whose operations have two ends each."""

    def start(self, start: Start, tensor: Tensor, peer: int, tag: int) -> torch_private.TorchWork:
        gloo = self._gloo
        if gloo is None or self._failure is not None:
            raise self.failure()
        try:
            return start(gloo, tensor, peer, tag)
        except RuntimeError as error:
            text = str(error)
        raise self.lost_by(text)

    def settle(self, deadline: float) -> bool:
        if not self.ended.is_set():
            return True  # nothing was ever posted
        while True:
            still_open = [c for c in self._connections if is_open(c)]
            if not still_open or self._are_emptied(still_open):
                return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(_SETTLE_LOOK_S)
