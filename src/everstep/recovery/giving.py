"""The donor's side of a transfer over a process group: one joiner, served from threads of its own."""

import contextlib
import logging
import secrets
import threading
from dataclasses import dataclass

from everstep.errors import ConfigError, RemoteProtocolError, StepInterrupted
from everstep.recovery.auth import TransferAuth
from everstep.recovery.conversation import (
    DIGESTS_AT_ONCE,
    FRAME_BYTES,
    NONCE_BYTES,
    Cuts,
    Handshake,
    Nonce,
    Offered,
    Proof,
    Refused,
    Said,
    WantChunks,
    WantDigests,
    as_tensor,
    pack,
    unpack,
)
from everstep.recovery.peers import BULK, TALK, Link, Message, Peers
from everstep.recovery.snapshot import Snapshot, digest_of

logger = logging.getLogger("everstep.recovery")

JOINER = 0
CHUNKS, DIGESTS = 0, 1  # numbers of links: the digests do not wait for the chunks
STALL_S = 30.0  # a joiner that takes nothing for so long is cut off
IDLE_S = 3600.0  # without a request; who dies is found by others


@dataclass(frozen=True, kw_only=True)
class Gift:
    """`donor` is this member's number in the group; `has_notary`: the joiner compares digests of several donors."""

    snapshot: Snapshot
    key: str
    joiner: str
    donor: int
    has_notary: bool
    auth: TransferAuth | None


class Giving:
    """`start`, then `abort` (any thread) and `join`. Holds on to the snapshot until it has ended, and no longer."""

    def __init__(self, peers: Peers, gift: Gift) -> None:
        self.key = gift.key
        self._peers = peers
        self._thread = threading.Thread(target=_give, args=(peers, gift), name="everstep-recovery-give", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def abort(self) -> None:
        self._peers.abort()

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    @property
    def has_ended(self) -> bool:
        return not self._thread.is_alive()


def _give(peers: Peers, gift: Gift) -> None:
    server = _Server(peers, gift)
    notary = threading.Thread(target=server.notarize, name="everstep-recovery-digests", daemon=True)
    try:
        peers.connect()
        server.introduce()
        if gift.has_notary:
            notary.start()
        server.serve(CHUNKS)
    except (StepInterrupted, RemoteProtocolError) as error:
        logger.info("recovery: serving %s ended: %s", gift.joiner, error)
    except ConfigError as error:
        logger.warning("recovery: %s cannot be served: %s", gift.joiner, error)
    finally:
        peers.abort()
        if notary.ident is not None:
            notary.join()
        peers.close()


class _Server:
    def __init__(self, peers: Peers, gift: Gift) -> None:
        self._peers = peers
        self._gift = gift
        self._cuts = Cuts(gift.snapshot.manifest)

    def introduce(self) -> None:
        """Raises RemoteProtocolError unless the joiner knows the job token."""
        gift, link = self._gift, self._peers.link(JOINER, CHUNKS)
        nonce = secrets.token_bytes(NONCE_BYTES)
        _say(link, Nonce(nonce))
        proof = _hear(link, STALL_S)
        if not isinstance(proof, Proof):
            raise RemoteProtocolError(f"a {type(proof).__name__} instead of a proof")
        handshake = Handshake(
            auth=gift.auth, key=gift.key, donor=gift.donor, donor_nonce=nonce, joiner_nonce=proof.nonce
        )
        if not secrets.compare_digest(proof.mac, handshake.joiner_mac()):
            _say(link, Refused()).wait()
            raise RemoteProtocolError("it does not know the job token")
        manifest = bytearray(gift.snapshot.manifest_bytes)
        mac = handshake.donor_mac(gift.snapshot.id, manifest)
        _say(link, Offered(gift.snapshot.id, len(manifest), digest_of([memoryview(manifest)]), mac))
        link.send(as_tensor(manifest), BULK, STALL_S).wait()

    def serve(self, number: int) -> None:
        """Until the joiner has closed the group, or this side has; raises what ended it."""
        link = self._peers.link(JOINER, number)
        while True:
            request = _hear(link, IDLE_S)
            if not isinstance(request, WantChunks | WantDigests):
                raise RemoteProtocolError(f"a {type(request).__name__} instead of a request")
            if not 0 <= request.first < request.end <= self._gift.snapshot.chunk_count:
                raise RemoteProtocolError(f"a request for the chunks {request.first} to {request.end}")
            if isinstance(request, WantChunks):
                self._send_chunks(link, request)
            else:
                self._send_digests(link, request)

    def notarize(self) -> None:
        """On a thread beside it, the digests alone."""
        with contextlib.suppress(StepInterrupted):  # the other thread says why
            try:
                self.serve(DIGESTS)
            except RemoteProtocolError as error:
                logger.warning("recovery: no digests for %s: %s", self._gift.joiner, error)

    def _send_chunks(self, link: Link, request: WantChunks) -> None:
        """One is on its way while the one before it ends."""
        before: tuple[list[Message], bytes] | None = None
        for index in range(request.first, request.end):
            messages = self._cuts.cut(index, self._gift.snapshot.chunk(index))
            sent = [link.send(as_tensor(_joined(message)), BULK, STALL_S) for message in messages]
            digest = self._gift.snapshot.digest(index)
            if before is not None:
                self._vouch(link, *before)
            before = sent, digest
        assert before is not None
        self._vouch(link, *before)

    def _vouch(self, link: Link, sent: list[Message], digest: bytes) -> None:
        for message in sent:
            message.wait()
        self._check_lent()  # it was read for the last time; see snapshot.py
        link.send(as_tensor(bytearray(digest)), TALK, STALL_S)

    def _send_digests(self, link: Link, request: WantDigests) -> None:
        for begin in range(request.first, request.end, DIGESTS_AT_ONCE):
            end = min(begin + DIGESTS_AT_ONCE, request.end)
            digests = b"".join(self._gift.snapshot.digest(index) for index in range(begin, end))
            self._check_lent()
            link.send(as_tensor(bytearray(digests)), TALK, STALL_S).wait()

    def _check_lent(self) -> None:
        if self._gift.snapshot.is_revoked:
            raise StepInterrupted("withdrawn in the middle")


def _joined(pieces: list[memoryview]) -> memoryview | bytearray:
    return pieces[0] if len(pieces) == 1 else bytearray(b"".join(pieces))


def _say(link: Link, said: Said) -> Message:
    return link.send(pack(said), TALK, STALL_S)


def _hear(link: Link, patience_s: float) -> Said:
    frame = as_tensor(bytearray(FRAME_BYTES))
    link.receive(frame, TALK, patience_s).wait()
    return unpack(frame)
