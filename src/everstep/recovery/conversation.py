"""What donor and joiner say to each other over a link, and into which messages a chunk is cut.

On the first link of the two:

    donor    Nonce
    joiner   Proof       HMAC over both nonces: it knows the job token
    donor    Offered     HMAC over both nonces and the manifest
    donor    the manifest, on lane BULK, then Sent
    joiner   WantChunk   of which WINDOW may be unanswered
    donor    a chunk on lane BULK, then its xxh3_64

Of a donor that lends tensors on a device of its own, named in Offered, the joiner may ask for more. One of a version
that knows nothing of this names none, or does not ask.

    joiner   OpenDevice  and both build lane DEVICE
    joiner   WantChunk   with `by_device`, as soon as it has that lane
    donor    of the chunk what lies on the device on lane DEVICE, the rest on BULK, then its xxh3_64

On the other, if there are several donors, for digests alone:

    joiner   WantDigests
    donor    each chunk's xxh3_64, DIGESTS_AT_ONCE at a time
"""

import bisect
import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Generic, TypeVar

import msgspec
import torch
import xxhash
from torch import Tensor

from everstep.errors import RemoteProtocolError
from everstep.recovery.auth import TransferAuth
from everstep.recovery.manifest import Manifest
from everstep.recovery.peers import BULK, DEVICE
from everstep.recovery.staging import Piece

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
    """`size` and `digest` (xxh3_64) are of the manifest; `device` names where the donor can send from, if anywhere."""

    snapshot_id: str
    size: int
    digest: bytes
    mac: bytes
    device: str = ""


class Sent(msgspec.Struct, frozen=True, array_like=True, tag="sent"):
    """The manifest is on its way: it is there when this is."""


class Refused(msgspec.Struct, frozen=True, array_like=True, tag="refused"):
    """The joiner does not know the job token."""


class WantChunk(msgspec.Struct, frozen=True, array_like=True, tag="chunk"):
    """The one that was asked for WINDOW requests before it has arrived."""

    index: int
    by_device: bool = False


class WantDigests(msgspec.Struct, frozen=True, array_like=True, tag="digests"):
    first: int
    end: int


class OpenDevice(msgspec.Struct, frozen=True, array_like=True, tag="device"):
    """Build lane DEVICE with the joiner."""


Said = Nonce | Proof | Offered | Sent | Refused | WantChunk | WantDigests | OpenDevice

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


PieceT = TypeVar("PieceT", memoryview, Tensor, Piece)


@dataclass(frozen=True)
class Cut(Generic[PieceT]):
    """One message: its lane, and what it is made of."""

    lane: int
    pieces: list[PieceT]


class Cuts:
    """Into which messages a chunk is cut: by the manifest alone, so both ends do it alike, wherever the bytes lie.

    A large piece of a region is a message: it is sent and received where it lies. Small ones in a row are one message;
    with lane DEVICE all small ones of a chunk that go the same way are, since a device's and the host's take turns in
    an optimizer's state.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._begins = list(accumulate(filter(None, manifest.region_bytes), initial=0))
        on_device = set(manifest.on_device)
        self._on_device = [n in on_device for n, size in enumerate(manifest.region_bytes) if size]

    def cut(self, chunk: int, pieces: Sequence[PieceT], *, by_device: bool = False) -> list[Cut[PieceT]]:
        """The chunk's bytes, message by message."""
        left = list(pieces)[::-1]
        cuts: list[Cut[PieceT]] = []
        small: dict[int, Cut[PieceT]] = {}
        for size, lane, is_small in self._runs(chunk, by_device=by_device):
            taken = _take(left, size)
            if is_small and lane in small:
                small[lane].pieces.extend(taken)
                continue
            cuts.append(Cut(lane, taken))
            if is_small:
                small[lane] = cuts[-1]
            elif not by_device:
                small = {}
        return cuts

    def _runs(self, chunk: int, *, by_device: bool) -> Iterator[tuple[int, int, bool]]:
        """Size, lane and whether they are small: of a large piece, or of small ones in a row that go the same way."""
        small, small_lane = 0, BULK
        for size, is_on_device in self._spans(chunk):
            lane = DEVICE if is_on_device and by_device else BULK
            if small and (lane != small_lane or size >= DIRECT_BYTES):
                yield small, small_lane, True
                small = 0
            if size >= DIRECT_BYTES:
                yield size, lane, False
            else:
                small, small_lane = small + size, lane
        if small:
            yield small, small_lane, True

    def _spans(self, chunk: int) -> Iterator[tuple[int, bool]]:
        """Of each region in the chunk the size there, and whether it is on the donor's device."""
        begin, end = self._manifest.chunk_range(chunk)
        at = bisect.bisect_right(self._begins, begin) - 1
        while begin < end:
            size = min(end, self._begins[at + 1]) - begin
            yield size, self._on_device[at]
            begin += size
            at += 1


def _take(left: list[PieceT], size: int) -> list[PieceT]:
    """So many bytes off the end of a list of pieces that stand in reverse."""
    taken = []
    while size:
        piece = left.pop()
        taken.append(piece[:size])
        size -= len(taken[-1])
        if len(taken[-1]) < len(piece):
            left.append(piece[len(taken[-1]) :])
    return taken


def as_tensor(memory: memoryview | bytearray) -> Tensor:
    """The same memory."""
    return torch.frombuffer(memory, dtype=torch.uint8)
