"""Sends and receives between two members, on a Gloo group of their own: for bulk that must not block training's group.

Gloo starts a send or a receive at once, on its own thread. What it offers is a wait that blocks until the end or a
timeout, and on a timeout it closes every connection; so each link has a thread that waits, in the order of the posts.
When a connection ends in the middle of a message Gloo forgets to wake who waits for that message (see gloo_work.py):
that thread then sleeps until the timeout, without touching anything, and nobody waits for it.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta

from torch import Tensor

from everstep import fork_guard
from everstep.collectives import torch_private
from everstep.collectives.gloo_group import GlooGroup
from everstep.collectives.process_group import Membership
from everstep.collectives.rebuilt import await_build, build_aside
from everstep.collectives.sockets import is_open

HELPER_NAME = "everstep-peers"
LANES = 2  # of a link: messages of one never wait for those of the other
_LOOK_S = 0.005
_SETTLE_LOOK_S = 0.001
_JOIN_S = 1.0

Start = Callable[[torch_private.TorchGloo, Tensor, int, int], torch_private.TorchWork]


class PeerMessage:
    """One message on its way; a Work (process_group.py). `patience_s` counts from when those before it have ended."""

    def __init__(self, group: "_PeerGroup", patience_s: float) -> None:
        self._group = group
        self._patience = timedelta(seconds=patience_s)
        self._ended = threading.Event()
        self._error = ""

    def wait(self, is_over: Callable[[], bool] = lambda: False) -> None:
        """Raises ConnectionAbortedError when `is_over`, which leaves the message on its way."""
        while not self._ended.wait(_LOOK_S):
            self._group.watch()
            if self._group.is_severed:
                raise self._group.failure()
            if is_over():
                raise ConnectionAbortedError("no longer wanted")
        if self._error:
            raise self._group.lost_by(self._error)

    def is_completed(self) -> bool:
        return self._ended.is_set()

    def run(self, work: torch_private.TorchWork) -> None:
        """On the link's thread."""
        try:
            work.wait(self._patience)
        except RuntimeError as error:
            self._error = str(error)
        self._ended.set()


class PeerLink:
    """To one peer. One thread at a time posts; messages of one lane arrive in order, and must be of equal size."""

    def __init__(self, group: "_PeerGroup", peer: int, number: int) -> None:
        self._group = group
        self._peer = peer
        self._first_tag = number * LANES
        self._posted: queue.SimpleQueue[tuple[PeerMessage, torch_private.TorchWork] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._wait_for_each, name=HELPER_NAME, daemon=True)
        self._thread.start()

    def send(self, tensor: Tensor, lane: int, patience_s: float) -> PeerMessage:
        """`tensor` (CPU, contiguous) may change when it has completed. Raises StepInterrupted, PeerLost."""
        return self._post(torch_private.send_to, tensor, lane, patience_s)

    def receive(self, tensor: Tensor, lane: int, patience_s: float) -> PeerMessage:
        """Into `tensor` (CPU, contiguous), whose size is the message's. Raises StepInterrupted, PeerLost."""
        return self._post(torch_private.receive_from, tensor, lane, patience_s)

    def end(self) -> threading.Thread:
        self._posted.put(None)
        return self._thread

    def _post(self, start: Start, tensor: Tensor, lane: int, patience_s: float) -> PeerMessage:
        message = PeerMessage(self._group, patience_s)
        work = self._group.start(start, tensor, self._peer, self._first_tag + lane)
        self._posted.put((message, work))
        return message

    def _wait_for_each(self) -> None:
        while (posted := self._posted.get()) is not None:
            message, work = posted
            message.run(work)
            del message, work, posted  # torch's Work holds on to the tensor, and to the group's sockets


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

    def abort(self) -> None:
        """Whatever waits raises StepInterrupted within milliseconds, and so does whatever comes. Does not block."""
        self._group.condemn()
        if self._group.ended.is_set():  # while it is being built, who waits for that cuts it
            self._group.cut()

    def settle(self, timeout_s: float) -> bool:
        """After `abort`: wait until nothing writes into a tensor any more; False when that was not seen in time."""
        return self._group.settle(time.monotonic() + timeout_s)

    def close(self) -> None:
        """Sever it, and free its threads and descriptors; takes some 20 ms, or 100 where peers are still sending."""
        self._group.condemn()
        with self._lock:
            threads = [link.end() for link in self._links.values()]
        if self._helper is not None:
            await_build(self._group)
            self._group.take_down()
            threads.append(self._helper)
        deadline = time.monotonic() + _JOIN_S
        for thread in threads:  # one that Gloo has forgotten to wake ends by itself, later
            thread.join(max(0.0, deadline - time.monotonic()))
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
