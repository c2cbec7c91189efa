"""The donor's side of a transfer over a process group: one joiner, served from threads of its own."""

import logging
import secrets
import threading
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from everstep.errors import ConfigError, PeerLost, RemoteProtocolError, StepInterrupted
from everstep.recovery.auth import TransferAuth
from everstep.recovery.conversation import (
    DIGESTS_AT_ONCE,
    FRAME_BYTES,
    NONCE_BYTES,
    WINDOW,
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
from everstep.recovery.peers import BULK, TALK, Link, Message, Peers
from everstep.recovery.snapshot import Snapshot, digest_of

logger = logging.getLogger("everstep.recovery")

JOINER = 0
CHUNKS, DIGESTS = 0, 1  # numbers of links: the digests do not wait for the chunks
STALL_S = 30.0  # a joiner that takes nothing for so long is cut off
IDLE_S = 86400.0  # without a request: who dies is found by others


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
        server.serve()
    except (PeerLost, RemoteProtocolError) as error:
        logger.info("recovery: serving %s ended: %s", gift.joiner, error)
    except StepInterrupted:  # it was withdrawn: the joiner has the state, or this donor had to go on without it
        logger.info("recovery: no longer serving %s", gift.joiner)
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
        staging = gift.snapshot.staging  # of the device that lane DEVICE takes from, if it takes any
        self._staging = staging if staging is not None and staging.device == peers.device else None
        self._on_the_way: deque[list[Message]] = deque()  # the chunks asked for last
        self._unvouched: deque[int] = deque()

    def introduce(self) -> None:
        """Raises RemoteProtocolError unless the joiner knows the job token."""
        gift, link = self._gift, self._peers.link(JOINER, CHUNKS)
        nonce = secrets.token_bytes(NONCE_BYTES)
        link.send(pack(Nonce(nonce)), TALK, STALL_S)
        proof = _heard(*_listen(link, STALL_S))
        if not isinstance(proof, Proof):
            raise RemoteProtocolError(f"{proof} instead of a proof")
        handshake = Handshake(
            auth=gift.auth, key=gift.key, donor=gift.donor, donor_nonce=nonce, joiner_nonce=proof.nonce
        )
        if not secrets.compare_digest(proof.mac, handshake.joiner_mac()):
            link.send(pack(Refused()), TALK, STALL_S)
            _listen(link, STALL_S)[1].wait()  # until it has closed the group
            raise RemoteProtocolError("it does not know the job token")
        manifest = bytearray(gift.snapshot.manifest_bytes)
        mac = handshake.donor_mac(gift.snapshot.id, manifest)
        device = self._peers.device_name if self._staging is not None else ""
        offered = Offered(gift.snapshot.id, len(manifest), digest_of([memoryview(manifest)]), mac, device)
        link.send(pack(offered), TALK, STALL_S)
        link.send(as_tensor(manifest), BULK, STALL_S)
        link.send(pack(Sent()), TALK, STALL_S)

    def serve(self) -> None:
        """Until the joiner has closed the group, or this side has; raises what ended it.

        Chunks that were asked for are on their way before the digest of the first of them is computed.
        """
        link = self._peers.link(JOINER, CHUNKS)
        frame, coming = _listen(link, IDLE_S)
        while True:
            if self._unvouched and not coming.is_completed():
                self._vouch(link)
                continue
            request = _heard(frame, coming)
            frame, coming = _listen(link, IDLE_S)
            if isinstance(request, OpenDevice) and self._staging is not None:
                self._peers.open_device(JOINER)
            elif isinstance(request, WantChunk) and 0 <= request.index < self._gift.snapshot.chunk_count:
                self._send(link, request)
            else:
                raise RemoteProtocolError(f"{request} instead of a request for a chunk")

    def notarize(self) -> None:
        """On a thread beside it, the digests alone."""
        try:
            link = self._peers.link(JOINER, DIGESTS)
            while True:
                request = _heard(*_listen(link, IDLE_S))
                count = self._gift.snapshot.chunk_count
                if not isinstance(request, WantDigests) or not 0 <= request.first < request.end <= count:
                    raise RemoteProtocolError(f"{request} instead of a request for digests")
                self._send_digests(link, range(request.first, request.end))
        except StepInterrupted:  # the other thread says why
            return
        except RemoteProtocolError as error:
            logger.warning("recovery: no digests for %s: %s", self._gift.joiner, error)

    def _send(self, link: Link, request: WantChunk) -> None:
        self._on_the_way.append(self._start(link, request))
        self._unvouched.append(request.index)
        if len(self._on_the_way) > WINDOW:
            for message in self._on_the_way.popleft():
                message.wait()

    def _start(self, link: Link, request: WantChunk) -> list[Message]:
        snapshot, index = self._gift.snapshot, request.index
        if not request.by_device:
            cuts = self._cuts.cut(index, snapshot.chunk(index))
            return [link.send(as_tensor(_joined(cut.pieces)), BULK, STALL_S) for cut in cuts]
        if self._staging is None:
            raise RemoteProtocolError(f"{request}, and there is no device")
        with self._staging.beside():
            parts = self._cuts.cut(index, snapshot.parts(index), by_device=True)
            return [link.send(_whole(cut.pieces), cut.lane, STALL_S) for cut in parts]

    def _vouch(self, link: Link) -> None:
        """Whatever was read when it was sent: this digest is that of the state as it was lent, or none is sent."""
        digest = self._gift.snapshot.digest(self._unvouched.popleft())
        self._check_lent()
        link.send(as_tensor(bytearray(digest)), TALK, STALL_S)

    def _send_digests(self, link: Link, chunks: range) -> None:
        for begin in range(chunks.start, chunks.stop, DIGESTS_AT_ONCE):
            end = min(begin + DIGESTS_AT_ONCE, chunks.stop)
            digests = b"".join(self._gift.snapshot.digest(index) for index in range(begin, end))
            self._check_lent()
            link.send(as_tensor(bytearray(digests)), TALK, STALL_S)

    def _check_lent(self) -> None:
        if self._gift.snapshot.is_revoked:
            raise StepInterrupted("withdrawn in the middle")


def _joined(pieces: list[memoryview]) -> memoryview | bytearray:
    return pieces[0] if len(pieces) == 1 else bytearray(b"".join(pieces))


def _whole(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _listen(link: Link, patience_s: float) -> tuple[Tensor, Message]:
    frame = as_tensor(bytearray(FRAME_BYTES))
    return frame, link.receive(frame, TALK, patience_s)


def _heard(frame: Tensor, coming: Message) -> Said:
    coming.wait()
    return unpack(frame)
