"""The joiner's side of a transfer over a process group: a connection to one donor, for a fetch (gathering.py)."""

import secrets
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from everstep.errors import ConfigError, PeerLost, RecoveryFailed, RemoteProtocolError, StepInterrupted
from everstep.recovery.auth import TransferAuth
from everstep.recovery.connection import Wanted
from everstep.recovery.conversation import (
    DIGESTS_AT_ONCE,
    FRAME_BYTES,
    NONCE_BYTES,
    WINDOW,
    Cuts,
    Handshake,
    Nonce,
    Offered,
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
from everstep.recovery.peers import BULK, TALK, Link, Message, Peers
from everstep.recovery.same_host import PeerMemory
from everstep.recovery.snapshot import DIGEST_BYTES, digest_of

SNAPSHOT_ID_CHARS_MAX = 32


@dataclass(frozen=True, kw_only=True)
class Taken:
    """From whom: `donor` is its number among the group's `members`. `stall_s`: a silence that is too long."""

    members: tuple[str, ...]
    donor: int
    key: str
    auth: TransferAuth | None
    limits: Limits
    stall_s: float


@dataclass
class _Coming:
    """A chunk that is being received: messages that land in their place, and those to be spread from a buffer."""

    messages: list[Message]
    spreads: list[tuple[bytearray, list[memoryview]]]
    digest: bytearray
    digest_message: Message


class DonorConnection:
    """A Connection (connection.py). It cannot be made a second time: the group lasts for one transfer."""

    def __init__(self, peers: Peers, taken: Taken, wanted: Wanted) -> None:
        self.url = taken.members[taken.donor]
        self._peers = peers
        self._taken = taken
        self._wanted = wanted
        self._link: Link | None = None
        self._is_shut = False
        self._cuts: Cuts | None = None
        self._todo: deque[int] = deque()
        self._coming: deque[_Coming] = deque()

    def shut(self) -> None:
        self._is_shut = True

    def close(self) -> None:
        if self._coming:  # whatever else is to land there must not meet what is on its way
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

    def ask_for_chunks(self, manifest: Manifest, snapshot_id: str, chunks: range) -> None:  # noqa: ARG002 - it has one
        if self._cuts is None:
            self._cuts = Cuts(manifest)
        self._todo.extend(chunks)
        while self._todo and len(self._coming) < WINDOW:
            self._ask_for_next()

    def receive(self, pieces: list[memoryview]) -> tuple[bytes, bytes]:
        """Others are on their way while this one is verified."""
        coming = self._coming[0]
        self._wait(coming.digest_message)
        for message in coming.messages:
            self._wait(message)
        self._coming.popleft()
        if self._todo:
            self._ask_for_next()
        for buffer, spread in coming.spreads:
            begin = 0
            for piece in spread:
                piece[:] = buffer[begin : begin + len(piece)]
                begin += len(piece)
        return bytes(coming.digest), digest_of(pieces)

    def ask_for_digests(self, snapshot_id: str, chunks: range) -> None:  # noqa: ARG002 - it has one
        self._say(WantDigests(chunks.start, chunks.stop))

    def digests(self, count: int) -> Iterator[list[bytes]]:
        left = count
        while left:
            some = bytearray(min(left, DIGESTS_AT_ONCE) * DIGEST_BYTES)
            self._wait(self._receive(as_tensor(some), TALK))
            yield [bytes(some[at : at + DIGEST_BYTES]) for at in range(0, len(some), DIGEST_BYTES)]
            left -= len(some) // DIGEST_BYTES

    def _ask_for_next(self) -> None:
        chunk = self._todo.popleft()
        assert self._cuts is not None
        self._say(WantChunk(chunk))
        messages, spreads = [], []
        for pieces in self._cuts.cut(chunk, self._wanted.pieces_of(chunk)):
            if len(pieces) == 1:
                messages.append(self._receive(as_tensor(pieces[0]), BULK))
            else:
                buffer = bytearray(sum(map(len, pieces)))
                messages.append(self._receive(as_tensor(buffer), BULK))
                spreads.append((buffer, pieces))
        digest = bytearray(DIGEST_BYTES)  # follows them
        self._coming.append(_Coming(messages, spreads, digest, self._receive(as_tensor(digest), TALK)))

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
            return self._link.receive(tensor, lane, self._taken.stall_s)

    def _wait(self, message: Message) -> None:
        with self._lost():
            message.wait(lambda: self._is_shut)

    @contextmanager
    def _lost(self) -> Iterator[None]:
        """A group that has ended is no reason for the step to end: the fetch fails."""
        try:
            yield
        except StepInterrupted as error:
            number = error.peer if isinstance(error, PeerLost) else None
            members = self._taken.members
            who = members[number] if number is not None and number < len(members) else self.url
            raise RecoveryFailed(f"the connection to {who} is lost: {error}") from error
