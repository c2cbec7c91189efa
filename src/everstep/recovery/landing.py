"""Memory for a peer's state to land in. The kernel's zeroing of fresh pages costs three times the transfer itself."""

from collections.abc import Mapping

import torch

from everstep.recovery.layout import lay_out


class Landing:
    """Buffers by size; those that were prepared are touched already. One thread at a time."""

    def __init__(self) -> None:
        self._touched: dict[int, list[torch.Tensor]] = {}

    def prepare(self, own: Mapping[str, object]) -> None:
        """Get memory for a state like `own`, while nobody waits for this member."""
        for size in lay_out(own).manifest.region_bytes:
            self.give_back(torch.empty(size, dtype=torch.uint8).zero_())

    def take(self, size: int) -> torch.Tensor:
        """A uint8 buffer of exactly that size, its contents undefined."""
        free = self._touched.get(size)
        return free.pop() if free else torch.empty(size, dtype=torch.uint8)

    def give_back(self, buffer: torch.Tensor) -> None:
        self._touched.setdefault(buffer.numel(), []).append(buffer)
