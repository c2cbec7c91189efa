"""What live state over a process group needs of one: messages between two members, apart from everything else."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

TALK, BULK = 0, 1  # the lanes of a link


class Message(Protocol):
    """On its way; its tensor belongs to it until `wait` has returned."""

    def wait(self, is_over: Callable[[], bool] = ..., /) -> None:
        """Raises StepInterrupted, PeerLost; ConnectionAbortedError as soon as `is_over`, and leaves it on its way."""


class Link(Protocol):
    """To one peer, for one thread. Messages of one lane arrive in order; the receiver knows each one's size."""

    def send(self, tensor: Tensor, lane: int, patience_s: float, /) -> Message: ...

    def receive(self, tensor: Tensor, lane: int, patience_s: float, /) -> Message: ...


class Peers(Protocol):
    """A group of the members of one transfer: the joiner is 0, the donors follow."""

    def connect(self) -> None:
        """Block until all are connected. Raises StepInterrupted (`abort`), PeerLost, ConfigError."""

    def link(self, peer: int, number: int, /) -> Link:
        """Any thread. Those of different numbers do not wait for each other."""

    def abort(self) -> None:
        """Any thread, at any time: whatever waits raises StepInterrupted within milliseconds. Does not block."""

    def settle(self, timeout_s: float, /) -> bool:
        """After `abort`: wait until nothing writes into a tensor any more; False when that was not seen in time."""

    def close(self) -> None:
        """End its threads and connections."""
