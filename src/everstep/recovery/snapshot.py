"""A replica's state as it travels: manifest, payload in host memory, a digest per chunk.

Either a copy (`take`), or the live tensors themselves (`lend`): nothing is copied, and whoever reads learns when they
were about to change. A reader believes a chunk only with its digest, and a digest is given away only after a look at
`is_revoked` that comes after the chunk was read; the owner revokes before it changes anything. So nobody waits for
anybody, and no torn chunk is ever taken for a sound one (the idea of a seqlock).
"""

import bisect
import ctypes
import dataclasses
import secrets
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

import msgspec
import torch
import xxhash

from everstep.errors import ConfigError
from everstep.recovery.layout import CHUNK_BYTES, Layout, as_bytes, lay_out
from everstep.recovery.manifest import CHUNK_BYTES_MAX, CHUNK_BYTES_MIN, Manifest, encode
from everstep.recovery.staging import Staging

DIGEST_BYTES = 8
BLOCK_BYTES = 512 << 10  # hashed and moved at a time: it stays in a core's cache, and the other end does not wait


class Snapshot:
    """Live state as it was at one step boundary.

    `take` and `lend` run on the training thread, after the optimizer of the step has ended. All else may run on any
    thread: digests are computed by who serves, once, and kept.
    """

    def __init__(
        self,
        layout: Layout,
        blocks: Sequence[torch.Tensor],
        *,
        is_lent: bool = False,
        staging: Staging | None = None,
    ) -> None:
        """`blocks`: flat uint8 tensors that are the payload, one after another; `staging`: if any are on a device."""
        self.id = secrets.token_hex(8)  # one copy, told apart from any other of the same step
        self.is_revoked = False  # for ever so of a copy
        self._is_lent = is_lent
        self.manifest: Manifest = layout.manifest
        self.manifest_bytes = encode(layout.manifest)
        self._blocks = [block for block in blocks if block.numel()]
        self._begins = list(accumulate((block.numel() for block in self._blocks), initial=0))
        self.staging = staging
        self._memory = [memory_of(block) for block in self._blocks] if staging is None else []
        self._digests: list[bytes | None] = [None] * layout.manifest.chunk_count

    @classmethod
    def take(cls, state: Mapping[str, object], chunk_bytes: int = CHUNK_BYTES) -> "Snapshot":
        """Copy `state` (a tree of dict, list, tuple, None, bool, int, float, str, bytes, tensors, numpy numbers).

        Costs one copy of the state in host memory while anyone holds it. Raises ConfigError with the path of a value
        that cannot travel; then nothing was copied.
        """
        layout = _laid_out(state, chunk_bytes)
        payload = torch.empty(layout.manifest.total_bytes, dtype=torch.uint8)
        layout.copy_into(payload, 0, layout.manifest.total_bytes)
        return cls(layout, [payload])

    @classmethod
    def lend(
        cls, state: Mapping[str, object], chunk_bytes: int = CHUNK_BYTES, staging: Staging | None = None
    ) -> "Snapshot":
        """As `take`, without a copy of what lies in host memory in one piece: `revoke` before any of it changes.

        Costs the memory of what is copied all the same: tensors with gaps, numpy values. Of a GPU's tensors only the
        chunks that are being served are in host memory. `staging` is of their device, by default of the first GPU's.
        """
        layout = _laid_out(state, chunk_bytes)
        sizes = layout.manifest.region_bytes
        blocks = {
            n: as_bytes(source) for n, (source, size) in enumerate(zip(layout.sources, sizes, strict=True)) if size
        }
        on_gpu = next((block.device for block in blocks.values() if block.is_cuda), None)
        if staging is None and on_gpu is not None:
            staging = Staging(on_gpu)
        there = frozenset(n for n, block in blocks.items() if staging is not None and staging.holds(block))
        layout = dataclasses.replace(
            layout, manifest=msgspec.structs.replace(layout.manifest, on_device=tuple(sorted(there)))
        )
        # Of a second GPU, which a process that trains on one hardly has, everything is copied here and now.
        in_reach = [block if n in there else block.cpu() for n, block in blocks.items()]
        return cls(layout, in_reach, is_lent=True, staging=staging)

    def revoke(self) -> None:
        """From here on no chunk is vouched for. The owner's thread, before it changes what it lent."""
        self.is_revoked = self._is_lent

    @property
    def total_bytes(self) -> int:
        return self.manifest.total_bytes

    @property
    def chunk_count(self) -> int:
        return self.manifest.chunk_count

    @property
    def is_in_host_memory(self) -> bool:
        return self.staging is None

    @property
    def addresses(self) -> list[tuple[int, int]]:
        """Where the payload lies in this process, if it is in host memory: address and size of each of its blocks."""
        return [(block.data_ptr(), block.numel()) for block in self._blocks]

    def chunk(self, index: int) -> list[memoryview]:
        """Its bytes, in as many pieces as they lie in."""
        if self.staging is None:
            return [self._memory[at][low:high] for at, low, high in self._places(index)]
        return [memory_of(self.staging.gather(self.parts(index)))]

    def parts(self, index: int) -> list[torch.Tensor]:
        """Its bytes as flat uint8 tensors, in as many as they lie in, wherever that is."""
        return [self._blocks[at][low:high] for at, low, high in self._places(index)]

    def _places(self, index: int) -> Iterator[tuple[int, int, int]]:
        """Of a chunk: numbers of blocks, and from where to where in each."""
        begin, end = self.manifest.chunk_range(index)
        at = bisect.bisect_right(self._begins, begin) - 1
        while begin < end:
            low = begin - self._begins[at]
            high = min(self._begins[at + 1] - self._begins[at], low + end - begin)
            yield at, low, high
            begin += high - low
            at += 1

    def digest(self, index: int) -> bytes:
        """xxh3_64 of a chunk; not to be given away before a look at `is_revoked`."""
        known = self._digests[index]
        if known is None:
            known = self._digests[index] = digest_of(self.chunk(index))
        return known

    def hashed_blocks(self, index: int) -> Iterator[list[memoryview]]:
        """A chunk in blocks that are in the processor's cache, since they were hashed just now."""
        computed = xxhash.xxh3_64() if self._digests[index] is None else None
        for block in blocks_of(self.chunk(index)):
            if computed is not None:
                for piece in block:
                    computed.update(piece)
            yield block
        if computed is not None:
            self._digests[index] = computed.digest()


def digest_of(pieces: list[memoryview]) -> bytes:
    computed = xxhash.xxh3_64()
    for piece in pieces:
        computed.update(piece)
    return computed.digest()


def blocks_of(pieces: list[memoryview]) -> Iterator[list[memoryview]]:
    """The same bytes in order, in parts of BLOCK_BYTES, each in as many pieces as it lies in."""
    block: list[memoryview] = []
    left = BLOCK_BYTES
    for piece in pieces:
        rest = piece
        while len(rest):
            part, rest = rest[:left], rest[left:]
            block.append(part)
            left -= len(part)
            if left == 0:
                yield block
                block, left = [], BLOCK_BYTES
    if block:
        yield block


def _laid_out(state: Mapping[str, object], chunk_bytes: int) -> Layout:
    if not CHUNK_BYTES_MIN <= chunk_bytes <= CHUNK_BYTES_MAX:
        raise ConfigError(f"chunk_bytes={chunk_bytes}; use {CHUNK_BYTES_MIN} to {CHUNK_BYTES_MAX}")
    return lay_out(state, chunk_bytes)


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous uint8 CPU tensor, writable; keeps the tensor alive. Needs no numpy."""
    if tensor.numel() == 0:
        return memoryview(bytearray())
    array = (ctypes.c_ubyte * tensor.numel()).from_address(tensor.data_ptr())
    array._tensor = tensor  # type: ignore[attr-defined]
    return memoryview(array).cast("B")
