"""An immutable copy of a replica's state as it travels: manifest, payload in host memory, a digest per chunk."""

import ctypes
import secrets
from collections.abc import Mapping

import torch
import xxhash

from everstep.errors import ConfigError
from everstep.recovery.layout import CHUNK_BYTES, Layout, lay_out
from everstep.recovery.manifest import CHUNK_BYTES_MAX, CHUNK_BYTES_MIN, Manifest, encode

DIGEST_BYTES = 8


class Snapshot:
    """Live state as it was at one step boundary. Costs one copy of the state in host memory while anyone holds it.

    `take` runs on the training thread, after the optimizer of the step has ended. All else may run on any thread:
    digests are computed by who serves, once, and kept.
    """

    def __init__(self, layout: Layout, payload: torch.Tensor) -> None:
        self.id = secrets.token_hex(8)  # one copy, told apart from any other of the same step
        self.manifest: Manifest = layout.manifest
        self.manifest_bytes = encode(layout.manifest)
        self._payload = memory_of(payload)
        self._digests: list[bytes | None] = [None] * layout.manifest.chunk_count

    @classmethod
    def take(cls, state: Mapping[str, object], chunk_bytes: int = CHUNK_BYTES) -> "Snapshot":
        """Copy `state` (a tree of dict, list, tuple, None, bool, int, float, str, bytes, tensors, numpy numbers).

        Raises ConfigError with the path of a value that cannot travel; then nothing was copied.
        """
        if not CHUNK_BYTES_MIN <= chunk_bytes <= CHUNK_BYTES_MAX:
            raise ConfigError(f"chunk_bytes={chunk_bytes}; use {CHUNK_BYTES_MIN} to {CHUNK_BYTES_MAX}")
        layout = lay_out(state, chunk_bytes)
        payload = torch.empty(layout.manifest.total_bytes, dtype=torch.uint8)
        layout.copy_into(payload, 0, layout.manifest.total_bytes)
        return cls(layout, payload)

    @property
    def total_bytes(self) -> int:
        return self.manifest.total_bytes

    @property
    def chunk_count(self) -> int:
        return self.manifest.chunk_count

    def chunk(self, index: int) -> memoryview:
        begin, end = self.manifest.chunk_range(index)
        return self._payload[begin:end]

    def digest(self, index: int) -> bytes:
        """xxh3_64 of a chunk."""
        known = self._digests[index]
        if known is None:
            known = self._digests[index] = xxhash.xxh3_64_digest(self.chunk(index))
        return known


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous uint8 CPU tensor, writable; keeps the tensor alive. Needs no numpy."""
    if tensor.numel() == 0:
        return memoryview(bytearray())
    array = (ctypes.c_ubyte * tensor.numel()).from_address(tensor.data_ptr())
    array._tensor = tensor  # type: ignore[attr-defined]
    return memoryview(array).cast("B")
