"""The joiner's side of a transfer: fetch one state from one source, verify all of it, then hand it over."""

import contextlib
import errno
import logging
import math
import os
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import xxhash

from everstep.errors import ConfigError, LocalProtocolError, RecoveryFailed, RemoteProtocolError, StepInterrupted
from everstep.fork_guard import guard
from everstep.recovery.assembly import Assembly, plain_leaf
from everstep.recovery.auth import TransferAuth
from everstep.recovery.fit import check_fit
from everstep.recovery.http import (
    ERROR_BODY_BYTES_MAX,
    KEY_CHARS_MAX,
    LONG_POLL_S,
    NONCE_BYTES,
    Answer,
    Challenge,
    ChunksRequest,
    ManifestRequest,
    body_digest,
    credential_field,
    parse_answer,
    parse_challenge,
)
from everstep.recovery.landing import Landing
from everstep.recovery.manifest import Limits, Manifest, build, decode
from everstep.recovery.snapshot import DIGEST_BYTES
from everstep.recovery.wire import Wire

logger = logging.getLogger(__name__)

_EARLY_ANSWERS_MAX = 8  # a source that says "not yet" without waiting would be asked in a busy loop

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class FetchRequest:
    """What to fetch and from whom.

    `expected`: this member's own state, to compare names, shapes and dtypes with; the names below `same_keys_under`
    must be equal. `deadline`: an instant of time.monotonic() (math.inf: only `stall_timeout_s` without a byte ends it).
    """

    source_url: str
    key: str
    deadline: float
    expected: Mapping[str, object] | None = None
    same_keys_under: frozenset[str] = frozenset({"model"})
    auth: TransferAuth | None = None
    stall_timeout_s: float = 15.0
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if math.isnan(self.deadline) or not 0 < self.stall_timeout_s < math.inf:
            raise ConfigError(f"deadline={self.deadline}, stall_timeout_s={self.stall_timeout_s}; use positive seconds")
        if not 0 < len(self.key) <= KEY_CHARS_MAX:
            raise LocalProtocolError(f"a key of {len(self.key)} characters; use 1 to {KEY_CHARS_MAX}")


class Fetch:
    """One attempt. `run` blocks its caller's thread; `abort` may be called from any other, at any time.

    `on_progress(bytes_done, bytes_total)` is called by the thread of `run` after every chunk.
    """

    def __init__(
        self, request: FetchRequest, on_progress: Progress | None = None, landing: Landing | None = None
    ) -> None:
        self._request = request
        self._on_progress = on_progress
        self._landing = landing or Landing()
        self._lock = threading.Lock()
        self._wire: Wire | None = None
        self._is_aborted = False
        self._nonce = b""  # of the server, for this connection
        self._requests = 0

    def run(self) -> dict[str, object]:
        """The state, all of it verified, in fresh CPU tensors that nothing else holds.

        Raises StepInterrupted after `abort`; StateMismatch when it does not fit `expected`; ConfigError when the tokens
        differ; RemoteProtocolError for what no sound source sends; RecoveryFailed for anything that may go better
        next time. Then nothing was applied.
        """
        source = self._request.source_url
        unguard = guard(self.list_fds)
        try:
            state = self._fetch()
            self._check_aborted()
        except (OSError, UnicodeError) as error:  # UnicodeError: of a host name
            self._check_aborted()
            raise RecoveryFailed(f"fetching live state from {source} failed: {error}") from error
        except (RecoveryFailed, RemoteProtocolError):
            self._check_aborted()
            raise
        finally:
            with self._lock:
                if self._wire is not None:
                    self._wire.close()
            unguard()
        return state

    def abort(self) -> None:
        """Makes `run` raise StepInterrupted at once, or as soon as it is called."""
        with self._lock:
            self._is_aborted = True
            if self._wire is not None:
                self._wire.shut()

    def list_fds(self) -> list[int]:
        """For the fork guard. Takes no lock: a forked child may find it held by a thread that it does not have."""
        wire = self._wire
        return [wire.fileno()] if wire is not None and wire.fileno() >= 0 else []

    def _check_aborted(self) -> None:
        if self._is_aborted:
            raise StepInterrupted(f"fetching live state from {self._request.source_url} was aborted")

    def _fetch(self) -> dict[str, object]:
        started_at = time.monotonic()
        wire = self._connect()
        manifest, snapshot_id = self._fetch_manifest(wire)
        self._check_fit(manifest)
        try:
            assembly = Assembly(manifest, self._landing)
        except (RuntimeError, MemoryError) as error:  # torch's allocator raises RuntimeError
            raise RecoveryFailed(f"no memory for a state of {manifest.total_bytes} bytes: {error}") from error
        try:
            self._fetch_chunks(wire, manifest, snapshot_id, assembly)
        except BaseException:
            assembly.discard()
            raise
        took_s = time.monotonic() - started_at
        source, size = self._request.source_url, manifest.total_bytes
        logger.info("recovery: %d bytes from %s in %.3f s, all digests verified", size, source, took_s)
        return assembly.tree()

    # ---- connection

    def _connect(self) -> Wire:
        host, port = _parse_url(self._request.source_url)
        failure: OSError = OSError("the name has no address")
        for family, _, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            try:
                return self._connect_to(family, address)
            except OSError as error:  # noqa: PERF203
                self._check_aborted()
                failure = error
        raise failure

    def _connect_to(self, family: int, address: object) -> Wire:
        sock = socket.socket(family, socket.SOCK_STREAM)
        with self._lock:
            if self._wire is not None:
                self._wire.close()
            self._wire = wire = Wire(sock, self._request.stall_timeout_s)
            if self._is_aborted:
                raise ConnectionAbortedError("aborted")
            sock.setblocking(False)
            # Under the lock: `abort` finds a socket that is connecting already, so its shutdown ends the wait below.
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
        return wire

    # ---- requests

    def _fetch_manifest(self, wire: Wire) -> tuple[Manifest, str]:
        """Ask, again and again, until the source offers the key."""
        request = self._request
        early_answers = 0
        while (remaining_s := request.deadline - time.monotonic()) > 0 and early_answers < _EARLY_ANSWERS_MAX:
            wait_s = min(LONG_POLL_S, remaining_s, request.stall_timeout_s / 2)
            asked_at = time.monotonic()
            answer, challenge = self._get(wire, ManifestRequest(request.key, wait_s).target)
            limit = request.limits.manifest_bytes if answer.status == 200 else ERROR_BODY_BYTES_MAX
            body = bytearray(answer.head.length(limit))
            wire.receive_into([memoryview(body)], request.deadline)
            digest = answer.head.fields.get("everstep-digest")
            if digest is None:
                raise RemoteProtocolError(f"an answer of status {answer.status} without a digest")
            if digest != body_digest(body):
                raise RecoveryFailed(f"an answer of status {answer.status} from {request.source_url} arrived damaged")
            self._check_proof(answer, challenge, body)
            if answer.status == 200:
                return decode(body, request.limits), answer.snapshot_id
            _check_status(answer, 404, body)
            early_answers += time.monotonic() - asked_at < wait_s / 2
        raise RecoveryFailed(f"{request.source_url} did not offer {request.key!r} in time")

    def _fetch_chunks(self, wire: Wire, manifest: Manifest, snapshot_id: str, assembly: Assembly) -> None:
        count, total = manifest.chunk_count, manifest.total_bytes
        if count == 0:
            return
        answer, challenge = self._get(wire, ChunksRequest(snapshot_id, 0, count).target)
        if answer.status != 200:
            _check_status(answer, 410)
            raise RecoveryFailed(f"{self._request.source_url} has withdrawn {self._request.key!r}")
        self._check_proof(answer, challenge)
        size = total + count * DIGEST_BYTES
        if answer.head.length(size) != size or answer.snapshot_id != snapshot_id:
            raise RemoteProtocolError(f"an answer other than the {size} bytes of snapshot {snapshot_id}")
        done = 0
        digest = memoryview(bytearray(DIGEST_BYTES))
        for index, pieces in enumerate(assembly.chunks()):
            wire.receive_into([*pieces, digest], self._request.deadline)
            computed = xxhash.xxh3_64()
            for piece in pieces:
                computed.update(piece)
                done += len(piece)
            if computed.digest() != digest:
                raise RecoveryFailed(f"chunk {index} of {count} from {self._request.source_url} arrived damaged")
            if self._on_progress is not None:
                self._on_progress(done, total)

    def _get(self, wire: Wire, target: str) -> tuple[Answer, Challenge]:
        if self._request.auth is not None and not self._nonce:
            self._nonce = self._fetch_challenge(wire)
        challenge = Challenge(
            server_nonce=self._nonce,
            client_nonce=secrets.token_bytes(NONCE_BYTES),
            number=self._requests,
            target=target,
        )
        self._requests += 1
        fields = [f"Host: {urlsplit(self._request.source_url).netloc}"]
        if self._request.auth is not None:
            mac = challenge.request_mac(self._request.auth)
            fields.append(f"Authorization: {credential_field(challenge.client_nonce, mac)}")
        answer = self._exchange(wire, target, fields)
        if answer.status == 401:
            source = self._request.source_url
            if self._request.auth is None:
                raise ConfigError(f"{source} asks for the job token; set EVERSTEP_TOKEN_FILE")
            raise ConfigError(f"{source} does not accept this member's job token; all members need the same")
        return answer, challenge

    def _fetch_challenge(self, wire: Wire) -> bytes:
        target = ManifestRequest(self._request.key, 0.0).target
        answer = self._exchange(wire, target, [f"Host: {urlsplit(self._request.source_url).netloc}"])
        nonce = parse_challenge(answer.head.fields.get("www-authenticate", ""))
        if answer.status != 401 or nonce is None or answer.head.length(0):
            raise RemoteProtocolError(f"{self._request.source_url} does not know the job token")
        return nonce

    def _exchange(self, wire: Wire, target: str, fields: list[str]) -> Answer:
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
            raise RemoteProtocolError(f"{self._request.source_url} did not prove that it knows the job token")

    def _check_fit(self, manifest: Manifest) -> None:
        if self._request.expected is not None:
            check_fit(build(manifest, plain_leaf), self._request.expected, self._request.same_keys_under)


def _check_status(answer: Answer, expected: int, body: bytes | bytearray = b"") -> None:
    if answer.status != expected:
        raise RemoteProtocolError(f"an answer of status {answer.status}: {bytes(body[:80]).decode('ascii', 'replace')}")


def _parse_url(url: str) -> tuple[str, int]:
    with contextlib.suppress(ValueError):
        parts = urlsplit(url)
        if parts.scheme == "http" and parts.hostname and parts.port and not parts.path.strip("/"):
            return parts.hostname, parts.port
    raise RecoveryFailed(f"the source's address is {url!r}; it should be http://host:port")
