"""One connection to one source: connect, prove the token, ask for the manifest, the digests, the chunks.

Blocking, on one thread; `shut` may come from any other and ends whatever it waits for.
"""

import contextlib
import errno
import os
import secrets
import select
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

import xxhash

from everstep.errors import ConfigError, RecoveryFailed, RemoteProtocolError
from everstep.recovery.http import (
    ERROR_BODY_BYTES_MAX,
    LONG_POLL_S,
    NO_DIGESTS,
    NONCE_BYTES,
    Answer,
    Challenge,
    ChunksRequest,
    DigestsRequest,
    ManifestRequest,
    MemoryRequest,
    body_digest,
    credential_field,
    parse_answer,
    parse_challenge,
)
from everstep.recovery.manifest import Manifest, decode
from everstep.recovery.request import FetchRequest
from everstep.recovery.same_host import PeerMemory
from everstep.recovery.snapshot import DIGEST_BYTES, blocks_of
from everstep.recovery.staging import Piece, in_host
from everstep.recovery.wire import Wire

_EARLY_ANSWERS_MAX = 8  # a source that says "not yet" without waiting would be asked in a busy loop
_DIGESTS_AT_ONCE = 8


class Damaged(RecoveryFailed):
    """Something arrived other than it was sent."""


class SourceConnection:
    """Used once: after an error make another. Errors are OSError, RecoveryFailed, RemoteProtocolError, ConfigError."""

    def __init__(self, request: FetchRequest, url: str) -> None:
        self.url = url
        self._request = request
        self._lock = threading.Lock()
        self._wire: Wire | None = None
        self._is_shut = False
        self._nonce = b""  # of the server, for this connection
        self._has_digests = True  # of the chunks that are on their way
        self._requests = 0

    def shut(self) -> None:
        """Any thread: what waits raises OSError at once, and so does whatever comes."""
        with self._lock:
            self._is_shut = True
            if self._wire is not None:
                self._wire.shut()

    def close(self) -> None:
        with self._lock:
            if self._wire is not None:
                self._wire.close()

    def list_fds(self) -> list[int]:
        """For the fork guard. Takes no lock: a forked child may find it held by a thread that it does not have."""
        wire = self._wire
        return [wire.fileno()] if wire is not None and wire.fileno() >= 0 else []

    # ---- connection

    def connect(self) -> None:
        host, port = parse_url(self.url)
        failure: OSError = OSError("the name has no address")
        for family, _, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            try:
                self._connect_to(family, address)
            except OSError as error:  # noqa: PERF203
                if self._is_shut:
                    raise
                failure = error
            else:
                return
        raise failure

    def _connect_to(self, family: int, address: object) -> None:
        sock = socket.socket(family, socket.SOCK_STREAM)
        with self._lock:
            if self._wire is not None:
                self._wire.close()
            self._wire = wire = Wire(sock, self._request.stall_timeout_s)
            if self._is_shut:
                raise ConnectionAbortedError("cut off")
            sock.setblocking(False)
            # Under the lock: `shut` finds a socket that is connecting already, so its shutdown ends the wait below.
            result = sock.connect_ex(address)  # type: ignore[arg-type]
        if result == errno.EINPROGRESS:
            remaining_s = min(self._request.deadline - time.monotonic(), self._request.stall_timeout_s)
            poll = select.poll()
            poll.register(sock, select.POLLOUT)
            if not poll.poll(max(0.0, remaining_s) * 1e3):
                raise TimeoutError("no connection in time")
            result = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if result:
            raise OSError(result, os.strerror(result))
        wire.open()

    # ---- requests

    def _opened(self) -> Wire:
        assert self._wire is not None, "connect first"
        return self._wire

    def manifest(self, *, may_wait: bool = True) -> tuple[Manifest, str]:
        """Ask, again and again (`may_wait`: else once), until the source offers the key."""
        request = self._request
        early_answers = 0
        while (remaining_s := request.deadline - time.monotonic()) > 0 and early_answers < _EARLY_ANSWERS_MAX:
            wait_s = min(LONG_POLL_S, remaining_s, request.stall_timeout_s / 2) if may_wait else 0.0
            asked_at = time.monotonic()
            found = self._ask_for_manifest(wait_s)
            if found is not None:
                return found
            if not may_wait:
                raise RecoveryFailed(f"{self.url} has withdrawn {request.key!r}")
            early_answers += time.monotonic() - asked_at < wait_s / 2
        raise RecoveryFailed(f"{self.url} did not offer {request.key!r} in time")

    def _ask_for_manifest(self, wait_s: float) -> tuple[Manifest, str] | None:
        request, wire = self._request, self._opened()
        answer, challenge = self._get(ManifestRequest(request.key, wait_s).target)
        limit = request.limits.manifest_bytes if answer.status == 200 else ERROR_BODY_BYTES_MAX
        body = bytearray(answer.head.length(limit))
        wire.receive_into([memoryview(body)], request.deadline)
        digest = answer.head.fields.get("everstep-digest")
        if digest is None:
            raise RemoteProtocolError(f"an answer of status {answer.status} without a digest")
        if digest != body_digest(body):
            raise Damaged(f"an answer of status {answer.status} from {self.url} arrived damaged")
        self._check_proof(answer, challenge, body)
        if answer.status == 200:
            return decode(body, request.limits), answer.snapshot_id
        _check_status(answer, 404, body)
        return None

    def ask_for_chunks(self, manifest: Manifest, snapshot_id: str, chunks: range, *, with_digests: bool = True) -> None:
        """Then `receive` each of them, in order. An older source sends its digests all the same."""
        target = ChunksRequest(snapshot_id, chunks.start, chunks.stop).target
        answer = self._of_snapshot(target, snapshot_id, *(() if with_digests else (": ".join(NO_DIGESTS),)))
        begin, end = manifest.chunk_range(chunks.start)[0], manifest.chunk_range(chunks.stop - 1)[1]
        size = end - begin + len(chunks) * DIGEST_BYTES
        length = answer.head.length(size)
        self._has_digests = length == size
        if not self._has_digests and (with_digests or length != end - begin):
            raise RemoteProtocolError(f"an answer other than the {size} bytes of snapshot {snapshot_id}")

    def receive(self, pieces: Sequence[Piece]) -> tuple[bytes | None, bytes]:
        """One chunk into its place; returns the digest that the source sent with it, and that of what arrived."""
        wire, deadline = self._opened(), self._request.deadline
        sent, computed = bytearray(DIGEST_BYTES if self._has_digests else 0), xxhash.xxh3_64()
        *blocks, last = blocks_of(in_host(pieces))
        for block in blocks:
            wire.receive_into(block, deadline)
            for piece in block:
                computed.update(piece)
        wire.receive_into([*last, memoryview(sent)], deadline)
        for piece in last:
            computed.update(piece)
        return bytes(sent) or None, computed.digest()

    def ask_for_digests(self, snapshot_id: str, chunks: range) -> None:
        """Then read `digests`. Raises RemoteProtocolError when the source knows no such request."""
        left = len(chunks)
        answer = self._of_snapshot(DigestsRequest(snapshot_id, chunks.start, chunks.stop).target, snapshot_id)
        if answer.head.length(left * DIGEST_BYTES) != left * DIGEST_BYTES:
            raise RemoteProtocolError(f"an answer other than the {left} digests of snapshot {snapshot_id}")

    def digests(self, count: int) -> Iterator[list[bytes]]:
        """In order, some at a time."""
        left = count
        while left:
            some = memoryview(bytearray(min(left, _DIGESTS_AT_ONCE) * DIGEST_BYTES))
            self._opened().receive_into([some], self._request.deadline)
            yield [bytes(some[at : at + DIGEST_BYTES]) for at in range(0, len(some), DIGEST_BYTES)]
            left -= len(some) // DIGEST_BYTES

    def memory(self, manifest: Manifest, snapshot_id: str) -> PeerMemory | None:
        """Of a source in this host; None where it must be HTTP."""
        if not self._opened().is_local or not manifest.total_bytes:
            return None
        answer, challenge = self._get(MemoryRequest(snapshot_id, os.getpid()).target)
        limit = self._request.limits.manifest_bytes if answer.status == 200 else ERROR_BODY_BYTES_MAX
        body = bytearray(answer.head.length(limit))
        self._opened().receive_into([memoryview(body)], self._request.deadline)
        if answer.head.fields.get("everstep-digest") != body_digest(body):
            raise Damaged(f"an answer of status {answer.status} from {self.url} arrived damaged")
        self._check_proof(answer, challenge, body)
        if answer.status != 200:
            return None
        memory = PeerMemory(body, manifest)
        try:
            memory.probe()
        except PermissionError:
            return None
        return memory

    def _of_snapshot(self, target: str, snapshot_id: str, *fields: str) -> Answer:
        answer, challenge = self._get(target, *fields)
        if answer.status != 200:
            _check_status(answer, 410)
            raise RecoveryFailed(f"{self.url} has withdrawn {self._request.key!r}")
        self._check_proof(answer, challenge)
        if answer.snapshot_id != snapshot_id:
            raise RemoteProtocolError(f"an answer about another snapshot than {snapshot_id}")
        return answer

    def _get(self, target: str, *more: str) -> tuple[Answer, Challenge]:
        if self._request.auth is not None and not self._nonce:
            self._nonce = self._fetch_challenge()
        challenge = Challenge(
            server_nonce=self._nonce,
            client_nonce=secrets.token_bytes(NONCE_BYTES),
            number=self._requests,
            target=target,
        )
        self._requests += 1
        fields = [f"Host: {urlsplit(self.url).netloc}", *more]
        if self._request.auth is not None:
            mac = challenge.request_mac(self._request.auth)
            fields.append(f"Authorization: {credential_field(challenge.client_nonce, mac)}")
        answer = self._exchange(target, fields)
        if answer.status == 401:
            if self._request.auth is None:
                raise ConfigError(f"{self.url} asks for the job token; set EVERSTEP_TOKEN_FILE")
            raise ConfigError(f"{self.url} does not accept this member's job token; all members need the same")
        return answer, challenge

    def _fetch_challenge(self) -> bytes:
        target = ManifestRequest(self._request.key, 0.0).target
        answer = self._exchange(target, [f"Host: {urlsplit(self.url).netloc}"])
        nonce = parse_challenge(answer.head.fields.get("www-authenticate", ""))
        if answer.status != 401 or nonce is None or answer.head.length(0):
            raise RemoteProtocolError(f"{self.url} does not know the job token")
        return nonce

    def _exchange(self, target: str, fields: list[str]) -> Answer:
        wire = self._opened()
        wire.send("\r\n".join([f"GET {target} HTTP/1.1", *fields, "", ""]).encode())
        text = wire.read_head(self._request.deadline)
        if not text:
            raise ConnectionResetError("the source closed the connection")
        return parse_answer(text)

    def _check_proof(self, answer: Answer, challenge: Challenge, body: bytes | bytearray = b"") -> None:
        auth = self._request.auth
        if auth is None:
            return
        mac = challenge.answer_mac(auth, answer.status, answer.snapshot_id, body).hex()
        if not secrets.compare_digest(mac, answer.head.fields.get("everstep-proof", "")):
            raise RemoteProtocolError(f"{self.url} did not prove that it knows the job token")


def _check_status(answer: Answer, expected: int, body: bytes | bytearray = b"") -> None:
    if answer.status != expected:
        raise RemoteProtocolError(f"an answer of status {answer.status}: {bytes(body[:80]).decode('ascii', 'replace')}")


def parse_url(url: str) -> tuple[str, int]:
    with contextlib.suppress(ValueError):
        parts = urlsplit(url)
        if parts.scheme == "http" and parts.hostname and parts.port and not parts.path.strip("/"):
            return parts.hostname, parts.port
    raise RecoveryFailed(f"the source's address is {url!r}; it should be http://host:port")
