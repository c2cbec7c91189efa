"""Chunks of tensors on a GPU: copied to the host when somebody asks for them, beside the training's own work.

A side stream copies into pinned memory, and who serves the chunk waits for that copy alone. torch's allocator of pinned
memory keeps what is freed, so that as many chunks are pinned as are being served at a time, and no more.
"""

from collections.abc import Sequence

import torch


class Staging:
    """Of one GPU's tensors, as they are when the work queued so far on the current stream has ended.

    Made on the training thread; `gather` may be called from any.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._ready = torch.cuda.current_stream(device).record_event()

    def gather(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The parts (flat uint8, wherever they are) one after another in pinned memory; complete when it returns."""
        sizes = [part.numel() for part in parts]
        whole = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=True)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._ready)
            for place, part in zip(torch.split(whole, sizes), parts, strict=True):
                place.copy_(part, non_blocking=True)
            copied = self._stream.record_event()
        copied.synchronize()
        return whole
