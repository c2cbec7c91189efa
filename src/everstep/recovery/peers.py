"""What live state over a process group needs of one: messages between two members, apart from everything else.

Members whose state lies on an accelerator may have lane DEVICE between them, from device memory to device memory.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

TALK, BULK, DEVICE = 0, 1, 2  # the lanes of a link: what is small, what is large, and what lies on a device


class Message(Protocol):
    """On its way; its tensor belongs to it until `wait` has returned, or the group is closed."""

    def wait(self, is_over: Callable[[], bool] = ..., /) -> None:
        """Raises StepInterrupted, PeerLost; ConnectionAbortedError as soon as `is_over`, and leaves it on its way.

        But for receives on lane TALK only for what the peer has shown to have ended, by a message that followed it:
        Gloo cannot be relied upon to wake who waits for a large message when the connection ends in the middle of it.
        Those on lane DEVICE may always be waited for.
        """

    def is_completed(self) -> bool:
        """Of a receive on lane TALK."""


class Link(Protocol):
    """To one peer, for one thread. The receiver knows each message's size.

    Messages arrive in the order in which they were posted, at both ends, whatever their lanes; but those on lane DEVICE
    keep an order of their own, come and go beside a stream of work (`Staging.beside`), and belong to one link alone.
    """

    @property
    def has_device(self) -> bool:
        """Lane DEVICE is there, at this end. The other end may be about to have it; its `send` waits for that."""

    def send(self, tensor: Tensor, lane: int, patience_s: float, /) -> Message: ...

    def receive(self, tensor: Tensor, lane: int, patience_s: float, /) -> Message: ...


class Peers(Protocol):
    """A group of the members of one transfer: the joiner is 0, the donors follow.

    `device` is where this member's tensors lie that lane DEVICE can take, if it can have one; `device_name` tells it
    from every other member's.
    """

    @property
    def device(self) -> torch.device | None: ...

    @property
    def device_name(self) -> str: ...

    def connect(self) -> None:
        """Block until all are connected. Raises StepInterrupted (`abort`), PeerLost, ConfigError."""

    def link(self, peer: int, number: int, /) -> Link:
        """Any thread. Those of different numbers do not wait for each other."""

    def open_device(self, peer: int, /) -> None:
        """Begin to build lane DEVICE with that one, which does so, too; a failure is logged, and nothing else."""

    def abort(self) -> None:
        """Any thread, at any time: whatever waits raises StepInterrupted within milliseconds. Does not block."""

    def settle(self, timeout_s: float, /) -> bool:
        """After `abort`: wait until nothing writes into a tensor any more; False when that was not seen in time."""

    def close(self) -> None:
        """End its threads and connections."""
