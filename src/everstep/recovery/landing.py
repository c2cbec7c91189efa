"""Memory for a peer's state to land in. The kernel's zeroing of fresh pages costs as much as the transfer itself."""

from collections.abc import Mapping

import torch

from everstep.recovery.layout import as_bytes, lay_out
from everstep.recovery.manifest import Manifest, TensorNode, leaf_paths
from everstep.recovery.staging import Staging

RegionKey = tuple[tuple[str, TensorNode], ...]


class Landing:
    """Buffers by size; those that were prepared are touched already. One thread at a time.

    In host memory; what it has on a device as well, if a transport that can fill memory there sets `staging`.
    """

    def __init__(self) -> None:
        self.staging: Staging | None = None
        self._touched: dict[int, list[torch.Tensor]] = {}

    def prepare(self, own: Mapping[str, object]) -> None:
        """Get memory for a state like `own`, while nobody waits for this member."""
        for size in lay_out(own).manifest.region_bytes:
            self.give_back(torch.empty(size, dtype=torch.uint8).zero_())

    def regions(self, manifest: Manifest) -> list[torch.Tensor]:
        """A uint8 buffer for each of its regions; on a device, too, if there is a `staging`."""
        return [self.take(size) for size in manifest.region_bytes]

    def take(self, size: int) -> torch.Tensor:
        """A uint8 buffer of exactly that size, its contents undefined."""
        free = self._touched.get(size)
        return free.pop() if free else torch.empty(size, dtype=torch.uint8)

    def give_back(self, buffer: torch.Tensor) -> None:
        self._touched.setdefault(buffer.numel(), []).append(buffer)


class InPlace(Landing):
    """The joiner's own tensors, wherever they lie as the peer's do; fresh memory for the rest, such as the optimizer's.

    Until the fetch has succeeded they hold neither the old state nor the new one: whoever uses this must make sure
    that nobody trains with them, or serves them, before. The state that the fetch returns is made of them: where
    `load_state_dict` copies into them, torch finds that there is nothing to copy.
    """

    def __init__(self, own: Mapping[str, object]) -> None:
        """Looks where `own` lies, while the donors do the same and nobody waits for the other. Errors: lay_out's."""
        super().__init__()
        layout = lay_out(own)
        self._mine = dict(zip(_keys_of(layout.manifest), layout.sources, strict=True))

    def regions(self, manifest: Manifest) -> list[torch.Tensor]:
        on_device = set(manifest.on_device) if self.staging is not None else set()
        return [
            self._region(self._mine.get(key), size, may_be_on_device=region in on_device)
            for region, (key, size) in enumerate(zip(_keys_of(manifest), manifest.region_bytes, strict=True))
        ]

    def _region(self, own: torch.Tensor | bytes | None, size: int, *, may_be_on_device: bool) -> torch.Tensor:
        staging = self.staging
        if own is None and size and may_be_on_device and staging is not None:
            return staging.empty(size)
        is_fit = isinstance(own, torch.Tensor) and (
            own.device.type == "cpu" or (staging is not None and staging.holds(own))
        )
        if not is_fit or size == 0:
            return self.take(size)
        assert isinstance(own, torch.Tensor)
        return as_bytes(own) if own.nbytes == size and own.is_contiguous() else self.take(size)

    def give_back(self, buffer: torch.Tensor) -> None:
        """It may be a tensor's of this member: nobody else's."""


def _keys_of(manifest: Manifest) -> list[RegionKey]:
    """What lies in each region: equal for two manifests where their tensors lie alike."""
    found: list[list[tuple[str, TensorNode]]] = [[] for _ in manifest.region_bytes]
    for path, node in leaf_paths(manifest):
        if isinstance(node, TensorNode):
            placed = TensorNode(0, node.dtype, node.shape, node.strides, node.offset)
            found[node.region].append((path, placed))
    return [tuple(nodes) for nodes in found]
