"""Tensors on a GPU, for who sends or receives them: beside the training's own work, on a side stream.

What goes by way of the host is copied through pinned memory, and who waits for it waits for that copy alone. torch's
allocator of pinned memory keeps what is freed, so that as many chunks are pinned as are being served at a time.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import cast

import torch

Piece = memoryview | torch.Tensor  # of a chunk: in host memory, or flat uint8 on a device


class Staging:
    """Of one GPU's tensors, as they are when the work queued so far on the current stream has ended.

    Made on the training thread; all else may be called from any.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._home = torch.cuda.current_stream(device)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._ready = self._home.record_event()

    def holds(self, tensor: torch.Tensor) -> bool:
        return tensor.device == self.device

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """What is queued within runs on the side stream; what is allocated within is the side stream's."""
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._ready)
            yield

    def empty(self, size: int) -> torch.Tensor:
        """Bytes on the device that the training may keep; undefined."""
        with torch.cuda.stream(self._home):
            return torch.empty(size, dtype=torch.uint8, device=self.device)

    def gather(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The parts (flat uint8, wherever they are) one after another in pinned memory; complete when it returns."""
        sizes = [part.numel() for part in parts]
        whole = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=True)
        self.copy(parts, torch.split(whole, sizes))
        return whole

    def copy(self, parts: Sequence[torch.Tensor], places: Sequence[torch.Tensor]) -> None:
        """Each part to its place, wherever they are; complete when it returns."""
        with self.beside():
            for place, part in zip(places, parts, strict=True):
                place.copy_(part, non_blocking=True)
            copied = self._stream.record_event()
        copied.synchronize()


def in_host(pieces: Sequence[Piece]) -> list[memoryview]:
    """The same, of a landing that has no staging: there is nothing of it on a device."""
    return cast("list[memoryview]", pieces)
