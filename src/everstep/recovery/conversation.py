"""What donor and joiner say to each other over a link, and into which messages a chunk is cut.

On the first link of the two:

    donor    Nonce
    joiner   Proof       HMAC over both nonces: it knows the job token
    donor    Offered     HMAC over both nonces and the manifest
    donor    the manifest, on lane BULK, then Sent
    joiner   WantChunk   of which WINDOW may be unanswered
    donor    a chunk on lane BULK, then its xxh3_64

On the other, if there are several donors, for digests alone:

    joiner   WantDigests
    donor    each chunk's xxh3_64, DIGESTS_AT_ONCE at a time
"""

import bisect
import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import msgspec
import torch
import xxhash
from torch import Tensor

from everstep.errors import RemoteProtocolError
from everstep.recovery.auth import TransferAuth
from everstep.recovery.manifest import Manifest

FRAME_BYTES = 256
NONCE_BYTES = 16
DIGESTS_AT_ONCE = 8
WINDOW = 3
DIRECT_BYTES = 256 << 10  # a message costs some 0.1 ms, whatever its size: what is smaller travels with its neighbours
_HEAD = struct.Struct("<H8s")  # length and xxh3_64 of the content


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


class Sent(msgspec.Struct, frozen=True, array_like=True, tag="sent"):
    """The manifest is on its way: it is there when this is."""


class Refused(msgspec.Struct, frozen=True, array_like=True, tag="refused"):
    """The joiner does not know the job token."""


class WantChunk(msgspec.Struct, frozen=True, array_like=True, tag="chunk"):
    """The one that was asked for WINDOW requests before it has arrived."""

    index: int


class WantDigests(msgspec.Struct, frozen=True, array_like=True, tag="digests"):
    first: int
    end: int


Said = Nonce | Proof | Offered | Sent | Refused | WantChunk | WantDigests

_encode = msgspec.msgpack.Encoder().encode
_decoder: msgspec.msgpack.Decoder[Said] = msgspec.msgpack.Decoder(Said)


def pack(said: Said) -> Tensor:
    content = _encode(said)
    assert len(content) <= FRAME_BYTES - _HEAD.size
    head = _HEAD.pack(len(content), xxhash.xxh3_64_digest(content))
    return torch.frombuffer(bytearray((head + content).ljust(FRAME_BYTES, b"\0")), dtype=torch.uint8)


def unpack(frame: Tensor) -> Said:
    """Raises RemoteProtocolError for what is damaged: a request for another chunk would be answered with that one."""
    received = bytes(frame.tolist())
    length, digest = _HEAD.unpack_from(received)
    content = received[_HEAD.size : _HEAD.size + length]
    if xxhash.xxh3_64_digest(content) != digest:
        raise RemoteProtocolError("a frame that has arrived damaged")
    try:
        return _decoder.decode(content)
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
