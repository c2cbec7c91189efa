"""Which bytes of which storages travel, and in what order: tensors that share memory share a region, once.

A view of a big buffer brings only the bytes it covers. Views that overlap lie in one region and are tied again at the
receiver; views of one storage that do not overlap arrive apart.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch

from everstep.errors import ConfigError
from everstep.recovery.dtypes import dtype_name
from everstep.recovery.manifest import FORMAT, VERSION, ArrayNode, Manifest, Node, TensorNode
from everstep.recovery.tree import PendingArray, PendingTensor, flatten

CHUNK_BYTES = 4 << 20
_ALIGNMENT = 16  # the largest element, complex128: every tied view's offset is a whole number of its elements


@dataclass(frozen=True)
class Layout:
    """A manifest, and where the bytes of each region are now; nothing is copied yet.

    `sources[i]`: what to copy region i from: a view of exactly its bytes, a tensor to be made contiguous, or bytes.
    A donor may copy any byte range of the payload at a time, so a stripe of it, or a part in each step.
    """

    manifest: Manifest
    begins: tuple[int, ...]  # of each region within the payload
    sources: tuple[torch.Tensor | bytes, ...]

    def copy_into(self, target: torch.Tensor, begin: int, end: int) -> None:
        """Copy the payload's bytes [begin, end) into `target` (uint8, CPU, that long); waits for the device."""
        for at, size, source in zip(self.begins, self.manifest.region_bytes, self.sources, strict=True):
            low, high = max(begin, at), min(end, at + size)
            if low < high:
                target[low - begin : high - begin].copy_(as_bytes(source)[low - at : high - at])


@dataclass(frozen=True)
class _Placed:
    """A tensor and the bytes of its storage that it covers."""

    place: int
    tensor: torch.Tensor
    begin: int
    end: int


def lay_out(state: Mapping[str, object], chunk_bytes: int = CHUNK_BYTES) -> Layout:
    """Raises ConfigError with the path of a value that cannot travel. Reads no tensor's bytes."""
    flat = flatten(state)
    nodes: list[Node] = flat.nodes
    sizes: list[int] = []
    sources: list[torch.Tensor | bytes] = []
    by_storage: dict[tuple[object, ...], list[_Placed]] = {}
    for place, pending in zip(flat.places, flat.pending, strict=True):
        if isinstance(pending, PendingArray):
            nodes[place] = ArrayNode(len(sizes), pending.dtype, pending.shape, pending.is_scalar)
            sizes.append(len(pending.data))
            sources.append(pending.data)
        else:
            placed = _place(place, pending)
            by_storage.setdefault(_storage_key(placed), []).append(placed)
    for sharing in by_storage.values():
        for tied in _overlapping(sharing):
            size, source = _add_region(tied, len(sizes), nodes)
            sizes.append(size)
            sources.append(source)
    begins = tuple(accumulate(sizes, initial=0))[:-1]
    return Layout(Manifest(FORMAT, VERSION, chunk_bytes, tuple(sizes), tuple(nodes)), begins, tuple(sources))


def as_bytes(source: torch.Tensor | bytes) -> torch.Tensor:
    """The elements' bytes in C order as a flat uint8 tensor; shares memory where `source` is contiguous."""
    if isinstance(source, bytes):
        return torch.frombuffer(bytearray(source), dtype=torch.uint8)
    if not source.is_contiguous():
        source = _as_plain(source).contiguous()
    return raw_view(
        source, int(source.storage_offset()) * source.element_size(), source.numel() * source.element_size()
    )


def raw_view(tensor: torch.Tensor, begin: int, size: int) -> torch.Tensor:
    """`size` bytes of a tensor's storage, as they are."""
    view = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return view.set_(tensor.untyped_storage(), begin, (size,), (1,))


_PLAIN = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _as_plain(tensor: torch.Tensor) -> torch.Tensor:
    """The same view with integers of the same width: torch cannot copy every dtype, such as int4."""
    view = torch.empty(0, dtype=_PLAIN.get(tensor.element_size(), tensor.dtype), device=tensor.device)
    return view.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def _place(place: int, pending: PendingTensor) -> _Placed:
    tensor = pending.tensor.resolve_conj().resolve_neg()  # lazy flags are no part of the bytes
    begin = int(tensor.storage_offset()) * tensor.element_size()
    covered = 0
    if tensor.numel():
        covered = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    placed = _Placed(place, tensor, begin, begin + covered * tensor.element_size())
    if covered and placed.end > tensor.untyped_storage().nbytes():
        raise ConfigError(f"{pending.path} has had its storage taken away; gather it before it is registered")
    return placed


def _storage_key(placed: _Placed) -> tuple[object, ...]:
    storage = placed.tensor.untyped_storage()
    if placed.begin == placed.end:
        return ("empty", placed.place)  # storages without bytes share the address 0
    return (placed.tensor.device, storage.data_ptr())


def _overlapping(sharing: list[_Placed]) -> list[list[_Placed]]:
    """Views of one storage, grouped so that views of different groups have no byte in common."""
    groups: list[list[_Placed]] = []
    end = -1
    for placed in sorted(sharing, key=lambda p: (p.begin, p.place)):
        if placed.begin < end:
            groups[-1].append(placed)
        else:
            groups.append([placed])
        end = max(end, placed.end)
    return groups


def _add_region(tied: list[_Placed], region: int, nodes: list[Node]) -> tuple[int, torch.Tensor]:
    first = tied[0]
    size = first.tensor.numel() * first.tensor.element_size()
    if len(tied) == 1 and first.end - first.begin > size:
        # A sparse view that nothing else shares, such as a column: its elements are worth sending, the gaps are not.
        shape = tuple(first.tensor.shape)
        strides = tuple(torch.empty(shape, device="meta").stride())
        nodes[first.place] = TensorNode(region, dtype_name(first.tensor.dtype), shape, strides, 0)
        return size, first.tensor
    base = first.begin if len(tied) == 1 else first.begin - first.begin % _ALIGNMENT
    for placed in tied:
        tensor = placed.tensor
        offset = (placed.begin - base) // tensor.element_size()
        shape, strides = tuple(tensor.shape), tuple(tensor.stride())
        nodes[placed.place] = TensorNode(region, dtype_name(tensor.dtype), shape, strides, offset)
    # Storages made of one foreign buffer share an address but not a size: take the one that reaches to the end.
    last = max(tied, key=lambda placed: placed.end)
    return last.end - base, raw_view(last.tensor, base, last.end - base)
