"""The joiner's side of a transfer over a process group: a connection to one donor, for a fetch (gathering.py)."""

import logging
import secrets
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from everstep.errors import ConfigError, PeerLost, RecoveryFailed, RemoteProtocolError, StepInterrupted
from everstep.recovery.auth import TransferAuth
from everstep.recovery.connection import Wanted
from everstep.recovery.conversation import (
    DIGESTS_AT_ONCE,
    FRAME_BYTES,
    NONCE_BYTES,
    WINDOW,
    Cut,
    Cuts,
    Handshake,
    Nonce,
    Offered,
    OpenDevice,
    Proof,
    Refused,
    Said,
    Sent,
    WantChunk,
    WantDigests,
    as_tensor,
    pack,
    unpack,
)
from everstep.recovery.giving import CHUNKS, DIGESTS
from everstep.recovery.manifest import Limits, Manifest, decode
from everstep.recovery.peers import BULK, DEVICE, TALK, Link, Message, Peers
from everstep.recovery.same_host import PeerMemory
from everstep.recovery.snapshot import DIGEST_BYTES, digest_of, memory_of
from everstep.recovery.staging import Piece, Staging, in_host

logger = logging.getLogger("everstep.recovery")

SNAPSHOT_ID_CHARS_MAX = 32


@dataclass(frozen=True, kw_only=True)
class Taken:
    """From whom: `donor` is its number among the group's `members`. `stall_s`: a silence that is too long.

    `staging`: of the device where the state lands, if the group has lane DEVICE to offer; it is built for a state that
    has `device_bytes_min` there.
    """

    members: tuple[str, ...]
    donor: int
    key: str
    auth: TransferAuth | None
    limits: Limits
    stall_s: float
    staging: Staging | None
    device_bytes_min: int


@dataclass
class _Coming:
    """A chunk that is being received: messages that land in their place, and those to be spread from a buffer."""

    messages: list[Message]
    spreads: list[tuple[bytearray | Tensor, list[Piece]]]
    digest: bytearray
    digest_message: Message
    by_device: bool


class DonorConnection:
    """A Connection (connection.py). It cannot be made a second time: the group lasts for one transfer."""

    def __init__(self, peers: Peers, taken: Taken, wanted: Wanted) -> None:
        self.url = taken.members[taken.donor]
        self._peers = peers
        self._taken = taken
        self._wanted = wanted
        self._link: Link | None = None
        self._is_shut = False
        self._device = ""  # the donor's
        self._cuts: Cuts | None = None
        self._is_by_device: bool | None = None  # what came last
        self._has_device_erred = False
        self._todo: deque[int] = deque()
        self._coming: deque[_Coming] = deque()
        self._is_posting = False  # what will come next, and is not there yet

    def shut(self) -> None:
        self._is_shut = True

    def close(self) -> None:
        if self._coming or self._is_posting:  # whatever else is to land there must not meet what is on its way
            self._peers.abort()

    def list_fds(self) -> list[int]:
        return []  # the group has a guard of its own

    def connect(self) -> None:
        with self._lost():
            self._link = self._peers.link(self._taken.donor, DIGESTS if self._wanted.is_notary else CHUNKS)

    def manifest(self, *, may_wait: bool = True) -> tuple[Manifest, str]:
        taken = self._taken
        if not may_wait:
            raise RecoveryFailed(f"{self.url} has introduced itself before, and is not asked twice")
        nonce = self._hear()
        if not isinstance(nonce, Nonce) or len(nonce.nonce) != NONCE_BYTES:
            raise RemoteProtocolError(f"{self.url} does not begin with a nonce")
        handshake = Handshake(
            auth=taken.auth,
            key=taken.key,
            donor=taken.donor,
            donor_nonce=nonce.nonce,
            joiner_nonce=secrets.token_bytes(NONCE_BYTES),
        )
        self._say(Proof(handshake.joiner_nonce, handshake.joiner_mac()))
        offered = self._hear()
        if isinstance(offered, Refused):
            raise ConfigError(f"{self.url} does not accept this member's job token; all members need the same")
        if not isinstance(offered, Offered) or not 0 < len(offered.snapshot_id) <= SNAPSHOT_ID_CHARS_MAX:
            raise RemoteProtocolError(f"{self.url} offers nothing")
        if not 0 < offered.size <= taken.limits.manifest_bytes:
            raise RemoteProtocolError(
                f"manifest of {offered.size} bytes; at most {taken.limits.manifest_bytes} are accepted"
            )
        self._device = offered.device
        content = bytearray(offered.size)
        coming = self._receive(as_tensor(content), BULK)
        if not isinstance(self._hear(), Sent):
            raise RemoteProtocolError(f"{self.url} sends no manifest")
        self._wait(coming)
        if digest_of([memoryview(content)]) != offered.digest:
            raise RecoveryFailed(f"the manifest of {self.url} arrived damaged")
        if not secrets.compare_digest(offered.mac, handshake.donor_mac(offered.snapshot_id, content)):
            raise RemoteProtocolError(f"{self.url} did not prove that it knows the job token")
        return decode(content, taken.limits), offered.snapshot_id

    def memory(self, manifest: Manifest, snapshot_id: str) -> PeerMemory | None:  # noqa: ARG002
        return None

    def ask_for_chunks(
        self,
        manifest: Manifest,
        snapshot_id: str,  # noqa: ARG002 - it has one
        chunks: range,
        *,
        with_digests: bool = True,  # noqa: ARG002 - they come all the same, each with its chunk
    ) -> None:
        if self._cuts is None:
            self._cuts = Cuts(manifest)
            self._open_device(manifest)
        self._todo.extend(chunks)
        with self._lost():
            while self._todo and len(self._coming) < WINDOW:
                self._ask_for_next()

    def receive(self, pieces: Sequence[Piece]) -> tuple[bytes, bytes]:
        """Others are on their way while this one is verified."""
        coming = self._coming[0]
        self._wait(coming.digest_message)
        for message in coming.messages:
            self._wait(message)
        self._coming.popleft()
        with self._lost():
            if self._todo:
                self._ask_for_next()
            for buffer, spread in coming.spreads:
                self._spread(buffer, spread)
            sent, computed = bytes(coming.digest), self._digest_of(pieces)
        self._has_device_erred |= coming.by_device and sent != computed
        return sent, computed

    def ask_for_digests(self, snapshot_id: str, chunks: range) -> None:  # noqa: ARG002 - it has one
        self._say(WantDigests(chunks.start, chunks.stop))

    def digests(self, count: int) -> Iterator[list[bytes]]:
        left = count
        while left:
            some = bytearray(min(left, DIGESTS_AT_ONCE) * DIGEST_BYTES)
            self._wait(self._receive(as_tensor(some), TALK))
            yield [bytes(some[at : at + DIGEST_BYTES]) for at in range(0, len(some), DIGEST_BYTES)]
            left -= len(some) // DIGEST_BYTES

    def _open_device(self, manifest: Manifest) -> None:
        """Until it is there everything comes by way of the host's memory, and if it cannot be, it goes on like that."""
        taken, peers = self._taken, self._peers
        size = sum(manifest.region_bytes[region] for region in manifest.on_device)
        if taken.staging is None or not self._device or not size or size < taken.device_bytes_min:
            return
        if self._device == peers.device_name:
            logger.info("recovery: %s has the same device: tensors come by way of the host's memory", self.url)
            return
        self._say(OpenDevice())
        peers.open_device(taken.donor)

    def _ask_for_next(self) -> None:
        chunk = self._todo.popleft()
        assert self._cuts is not None
        assert self._link is not None
        by_device = self._link.has_device and not self._has_device_erred
        if by_device is not self._is_by_device and self._device:
            what = "from its device to this one's" if by_device else "by way of the host's memory"
            logger.info("recovery: %s sends %s", self.url, what)
        self._is_by_device = by_device
        self._is_posting = True
        messages: list[Message] = []
        spreads: list[tuple[bytearray | Tensor, list[Piece]]] = []
        for cut in self._cuts.cut(chunk, self._wanted.pieces_of(chunk), by_device=by_device):
            place, buffer = self._place(cut)
            if buffer is not None:
                spreads.append((buffer, cut.pieces))
            messages.append(self._receive(place, cut.lane))
        digest = bytearray(DIGEST_BYTES)  # follows them
        self._coming.append(_Coming(messages, spreads, digest, self._receive(as_tensor(digest), TALK), by_device))
        # Only now: what a donor's device sends is expected by ours, so that it holds up nothing else there.
        self._say(WantChunk(chunk, by_device))
        self._is_posting = False

    def _place(self, cut: Cut[Piece]) -> tuple[Tensor, bytearray | Tensor | None]:
        """Where a message arrives, and the buffer that this is if it cannot be where it belongs."""
        staging, (first, *others) = self._taken.staging, cut.pieces
        if not others and isinstance(first, Tensor) == (cut.lane == DEVICE):
            return _as_tensor(first), None
        size = sum(map(len, cut.pieces))
        if cut.lane == BULK:
            memory = bytearray(size)
            return as_tensor(memory), memory
        assert staging is not None
        with staging.beside():
            buffer = torch.empty(size, dtype=torch.uint8, device=staging.device)
        return buffer, buffer

    def _spread(self, buffer: bytearray | Tensor, pieces: list[Piece]) -> None:
        if isinstance(buffer, Tensor) or any(isinstance(piece, Tensor) for piece in pieces):
            assert self._taken.staging is not None
            parts = torch.split(_as_tensor(buffer), [len(piece) for piece in pieces])
            self._taken.staging.copy(parts, [_as_tensor(piece) for piece in pieces])
            return
        begin = 0
        for piece in in_host(pieces):
            piece[:] = buffer[begin : begin + len(piece)]
            begin += len(piece)

    def _digest_of(self, pieces: Sequence[Piece]) -> bytes:
        if not any(isinstance(piece, Tensor) for piece in pieces):
            return digest_of(in_host(pieces))
        assert self._taken.staging is not None
        return digest_of([memory_of(self._taken.staging.gather([_as_tensor(piece) for piece in pieces]))])

    def _say(self, said: Said) -> None:
        with self._lost():
            assert self._link is not None
            self._link.send(pack(said), TALK, self._taken.stall_s)

    def _hear(self) -> Said:
        frame = as_tensor(bytearray(FRAME_BYTES))
        self._wait(self._receive(frame, TALK))
        return unpack(frame)

    def _receive(self, tensor: Tensor, lane: int) -> Message:
        with self._lost():
            assert self._link is not None
            if lane != DEVICE:
                return self._link.receive(tensor, lane, self._taken.stall_s)
            assert self._taken.staging is not None
            with self._taken.staging.beside():
                return self._link.receive(tensor, lane, self._taken.stall_s)

    def _wait(self, message: Message) -> None:
        with self._lost():
            message.wait(lambda: self._is_shut)

    @contextmanager
    def _lost(self) -> Iterator[None]:
        """A group that has ended, or a device that does not obey, is no reason for the step to end: the fetch fails."""
        try:
            yield
        except StepInterrupted as error:
            number = error.peer if isinstance(error, PeerLost) else None
            members = self._taken.members
            who = members[number] if number is not None and number < len(members) else self.url
            raise RecoveryFailed(f"the connection to {who} is lost: {error}") from error
        except RuntimeError as error:  # torch's, of whatever a device did not do
            raise RecoveryFailed(f"what {self.url} sends cannot be received: {error}") from error


def _as_tensor(piece: Piece | bytearray) -> Tensor:
    return piece if isinstance(piece, Tensor) else as_tensor(piece)
