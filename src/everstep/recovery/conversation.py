"""What donor and joiner say to each other over a link, and into which messages a chunk is cut.

donor    Nonce
joiner   Proof       HMAC over both nonces: it knows the job token
donor    Offered     HMAC over both nonces and the manifest; on the other lane the manifest
joiner   WantChunks  donor: each chunk on the other lane, its xxh3_64 on this one, in order
joiner   WantDigests donor: each chunk's xxh3_64, DIGESTS_AT_ONCE at a time
...
"""

import bisect
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

import msgspec
import torch
from torch import Tensor

from everstep.errors import RemoteProtocolError
from everstep.recovery.auth import TransferAuth
from everstep.recovery.manifest import Manifest

FRAME_BYTES = 256
NONCE_BYTES = 16
DIGESTS_AT_ONCE = 8
DIRECT_BYTES = 64 << 10  # a message costs some 0.1 ms, whatever its size: what is smaller travels with its neighbours
_LENGTH_BYTES = 2


class Nonce(msgspec.Struct, frozen=True, array_like=True, tag="nonce"):
    nonce: bytes


class Proof(msgspec.Struct, frozen=True, array_like=True, tag="proof"):
    nonce: bytes
    mac: bytes


class Offered(msgspec.Struct, frozen=True, array_like=True, tag="offered"):
    """`size` and `digest` (xxh3_64) are of the manifest."""

    snapshot_id: str
    size: int
    digest: bytes
    mac: bytes


class Refused(msgspec.Struct, frozen=True, array_like=True, tag="refused"):
    """The joiner does not know the job token."""


class WantChunks(msgspec.Struct, frozen=True, array_like=True, tag="chunks"):
    first: int
    end: int


class WantDigests(msgspec.Struct, frozen=True, array_like=True, tag="digests"):
    first: int
    end: int


Said = Nonce | Proof | Offered | Refused | WantChunks | WantDigests
SaidT = TypeVar("SaidT")

_encode = msgspec.msgpack.Encoder().encode
_decoder: msgspec.msgpack.Decoder[Said] = msgspec.msgpack.Decoder(Said)


def pack(said: Said) -> Tensor:
    content = _encode(said)
    assert len(content) <= FRAME_BYTES - _LENGTH_BYTES
    frame = len(content).to_bytes(_LENGTH_BYTES, "little") + content.ljust(FRAME_BYTES - _LENGTH_BYTES, b"\0")
    return torch.frombuffer(bytearray(frame), dtype=torch.uint8)


def unpack(frame: Tensor) -> Said:
    content = bytes(frame.tolist())
    length = int.from_bytes(content[:_LENGTH_BYTES], "little")
    try:
        return _decoder.decode(content[_LENGTH_BYTES : _LENGTH_BYTES + length])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RemoteProtocolError(f"an illegible frame: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Handshake:
    """Of one joiner and one donor (its number in the group), as both ends sign it; without a token nothing is."""

    auth: TransferAuth | None
    key: str
    donor: int
    donor_nonce: bytes
    joiner_nonce: bytes

    def joiner_mac(self) -> bytes:
        return self._signed(b"everstep recovery joiner")

    def donor_mac(self, snapshot_id: str, manifest: bytes | bytearray) -> bytes:
        return self._signed(b"everstep recovery donor", snapshot_id.encode(), hashlib.sha256(manifest).digest())

    def _signed(self, *what: bytes) -> bytes:
        if self.auth is None:
            return b""
        return self.auth.sign(*what, self.key.encode(), str(self.donor).encode(), self.donor_nonce, self.joiner_nonce)


class Cuts:
    """Into which messages a chunk is cut: by the manifest alone, so both ends do it alike, wherever the bytes lie.

    A large piece of a region is a message: it is sent and received where it lies. Small ones in a row are one message.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._begins = list(accumulate(filter(None, manifest.region_bytes), initial=0))

    def cut(self, chunk: int, pieces: Sequence[memoryview]) -> list[list[memoryview]]:
        """The chunk's bytes, message by message."""
        left = list(pieces)[::-1]
        messages = []
        for size in self._sizes(chunk):
            message: list[memoryview] = []
            while size:
                piece = left.pop()
                message.append(piece[:size])
                size -= len(message[-1])
                if len(message[-1]) < len(piece):
                    left.append(piece[len(message[-1]) :])
            messages.append(message)
        return messages

    def _sizes(self, chunk: int) -> list[int]:
        begin, end = self._manifest.chunk_range(chunk)
        at = bisect.bisect_right(self._begins, begin) - 1
        sizes: list[int] = []
        small = 0
        while begin < end:
            at += 1
            size = min(end, self._begins[at]) - begin
            begin += size
            if size < DIRECT_BYTES:
                small += size
                continue
            sizes += [small, size] if small else [size]
            small = 0
        return [*sizes, small] if small else sizes


def as_tensor(memory: memoryview | bytearray) -> Tensor:
    """The same memory."""
    return torch.frombuffer(memory, dtype=torch.uint8)
