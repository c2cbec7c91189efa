"""Where a joiner puts the payload: each chunk's bytes straight into the memory of the tensors that they belong to."""

import importlib
from collections.abc import Iterator, Mapping
from types import ModuleType

import torch

from everstep.errors import ConfigError
from everstep.recovery.dtypes import DTYPES
from everstep.recovery.landing import Landing
from everstep.recovery.manifest import ArrayNode, BigInt, Blob, Leaf, Manifest, TensorNode, build
from everstep.recovery.sharded import Meshes
from everstep.recovery.snapshot import memory_of
from everstep.recovery.staging import Piece, in_host


class Assembly:
    """The regions of one manifest. Fill every chunk, verify it, then `tree()`; `discard()` on failure."""

    def __init__(self, manifest: Manifest, landing: Landing, own: Mapping[str, object] | None = None) -> None:
        """`own`: this member's state, where the peer's may hold tensors that are spread over a mesh."""
        self._manifest = manifest
        self._own = own
        self._landing = landing
        self._regions = landing.regions(manifest)
        # A region of the member's own lies within a storage that may hold more; torch places views by elements.
        for node in manifest.nodes:
            if isinstance(node, TensorNode) and self._begin_of(node.region) % DTYPES[node.dtype].itemsize:
                self._regions[node.region] = landing.take(manifest.region_bytes[node.region])

    def chunks(self) -> Iterator[list[memoryview]]:
        """For each chunk in order the pieces of memory that it fills; of a landing in host memory alone."""
        return map(in_host, self.places())

    def places(self) -> Iterator[list[Piece]]:
        """For each chunk in order the pieces that it fills, of host memory and of a device's."""
        staging = self._landing.staging
        left = self._manifest.chunk_bytes
        pieces: list[Piece] = []
        for region in self._regions:
            memory: Piece = region if staging is not None and staging.holds(region) else memory_of(region)
            while len(memory):
                piece, memory = memory[:left], memory[left:]
                pieces.append(piece)
                left -= len(piece)
                if left == 0:
                    yield pieces
                    pieces, left = [], self._manifest.chunk_bytes
        if pieces:
            yield pieces

    def tree(self) -> dict[str, object]:
        """The state, made of tensors on the regions; tied tensors share a storage again."""
        return build(self._manifest, self._leaf, Meshes(self._own).build)

    def adopt(self, manifest: Manifest) -> None:
        """Build what another source says instead, of the same layout."""
        self._manifest = manifest

    def discard(self) -> None:
        for region in self._regions:
            self._landing.give_back(region)
        self._regions = []

    def _leaf(self, node: Leaf) -> object:
        if isinstance(node, TensorNode):
            region = self._regions[node.region]
            storage = region.untyped_storage()
            tensor = torch.empty(0, dtype=DTYPES[node.dtype], device=region.device)
            offset = self._begin_of(node.region) // tensor.element_size() + node.offset
            return tensor.set_(storage, offset, node.shape, node.strides)
        if isinstance(node, ArrayNode):
            return self._array(node)
        return plain_leaf(node)

    def _begin_of(self, region: int) -> int:
        return int(self._regions[region].storage_offset())

    def _array(self, node: ArrayNode) -> object:
        numpy = _numpy()
        array = numpy.empty(node.shape, node.dtype)
        if array.nbytes:
            array = numpy.frombuffer(memory_of(self._regions[node.region]), node.dtype).reshape(node.shape)
        return array[()] if node.is_scalar else array


def plain_leaf(node: Leaf) -> object:
    """Of a leaf without payload its value; a tensor or array stays its node."""
    if isinstance(node, BigInt):
        return int.from_bytes(node.data, "little", signed=True)
    return node.data if isinstance(node, Blob) else node


def _numpy() -> ModuleType:
    try:
        return importlib.import_module("numpy")
    except ImportError as error:
        raise ConfigError("the peer's state contains numpy values; install numpy here as well") from error
