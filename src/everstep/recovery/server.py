"""The donor's side of a transfer: serves offered snapshots over HTTP from threads of its own.

A thread per connection, blocked in the kernel for most of its life: a slow or dead reader costs one idle thread and
delays nobody. What is lent (snapshot.py) is read in place, and vouched for only as long as it is not revoked.
"""

import contextlib
import ipaddress
import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from everstep.errors import ConfigError, LocalProtocolError, RemoteProtocolError
from everstep.fork_guard import guard
from everstep.recovery.auth import TransferAuth
from everstep.recovery.http import (
    KEY_CHARS_MAX,
    NO_DIGESTS,
    NONCE_BYTES,
    Challenge,
    ChunksRequest,
    DigestsRequest,
    ManifestRequest,
    MemoryRequest,
    body_digest,
    challenge_field,
    parse_credential,
    parse_head,
    parse_target,
)
from everstep.recovery.offers import Offers
from everstep.recovery.same_host import Readable
from everstep.recovery.snapshot import DIGEST_BYTES, Snapshot
from everstep.recovery.wire import Wire

logger = logging.getLogger(__name__)

_FIRST_REQUEST_S = 10.0  # until a connection has proved that it knows the token
_IDLE_S = 120.0
_REFUSALS_MAX = 2  # of one connection: the first is the challenge
_JOIN_S = 5.0
_ACCEPT_RETRY_S = 0.05
_DIGESTS_AT_ONCE = 8
_REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 405: "Not GET", 410: "Gone"}


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """`auth` None: open, for loopback only. `stall_timeout_s`: a reader that takes nothing for so long is cut off."""

    auth: TransferAuth | None = None
    offers_max: int = 2
    connections_max: int = 64
    stall_timeout_s: float = 30.0


class RecoveryServer:
    """Offers snapshots to joiners. `start`, `offer`, `withdraw` and `close` may be called from any one thread."""

    def __init__(self, options: ServerOptions | None = None) -> None:
        self.options = options or ServerOptions()
        self.offers = Offers(self.options.offers_max)
        self.readable = Readable()
        self._lock = threading.Lock()
        self._connections: list[_Connection] = []
        self._listener: socket.socket | None = None
        self._acceptor: threading.Thread | None = None
        self._closing = threading.Event()
        self._unguard: Callable[[], None] | None = None

    def start(self, bind_host: str, advertise_host: str, port: int = 0) -> str:
        """Listen; returns the URL for joiners. Port 0: any free one.

        Raises ConfigError when the address cannot be used, or is not loopback and there is no token.
        """
        if self._listener is not None:
            raise LocalProtocolError("the recovery server was started twice")
        if self.options.auth is None and not _is_loopback(bind_host):
            raise ConfigError(
                f"recovery would serve the model to anyone who reaches {bind_host}; "
                "set a job token (EVERSTEP_TOKEN_FILE), or bind 127.0.0.1"
            )
        self._listener = _listen(bind_host, port)
        self._unguard = guard(self.list_fds)
        self._acceptor = threading.Thread(target=self._accept, name="everstep-recovery", daemon=True)
        self._acceptor.start()
        host = f"[{advertise_host}]" if ":" in advertise_host else advertise_host
        return f"http://{host}:{self._listener.getsockname()[1]}"

    def offer(self, key: str, snapshot: Snapshot) -> None:
        """Serve `snapshot` to whoever asks for `key`, which must name one state of the job for ever (its lineage).

        Of more than `offers_max` the oldest is withdrawn.
        """
        if not 0 < len(key) <= KEY_CHARS_MAX:
            raise LocalProtocolError(f"a key of {len(key)} characters; use 1 to {KEY_CHARS_MAX}")
        self._cut_readers(self.offers.add(key, snapshot))

    def withdraw(self, key: str) -> None:
        """Stop serving it, also to those in the middle of it: its memory is free when this returns, or soon after.

        What was lent may change when this returns.
        """
        self._cut_readers(self.offers.remove(key))

    def close(self) -> None:
        """Ends every thread and connection; may be called twice."""
        self._closing.set()
        self._cut_readers(self.offers.close())
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        if self._acceptor is not None:
            self._acceptor.join(_JOIN_S)
        if self._listener is not None:
            self._listener.close()
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.wire.shut()
        for connection in connections:
            connection.thread.join(_JOIN_S)
        if self._unguard is not None:
            self._unguard()

    def list_fds(self) -> list[int]:
        """For the fork guard. Takes no lock: a forked child may find it held by a thread that it does not have."""
        fds = [connection.wire.fileno() for connection in list(self._connections)]
        if self._listener is not None:
            fds.append(self._listener.fileno())
        return [fd for fd in fds if fd >= 0]

    def forget(self, connection: "_Connection") -> None:
        with self._lock:
            self._connections.remove(connection)

    def __enter__(self) -> "RecoveryServer":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def _accept(self) -> None:
        assert self._listener is not None
        failed_with: int | None = None  # such as too many open files; said once
        while not self._closing.is_set():
            try:
                sock, address = self._listener.accept()
            except OSError as error:
                if not self._closing.wait(_ACCEPT_RETRY_S) and error.errno != failed_with:  # it may pass
                    logger.warning("recovery: accept failed: %s; trying again every %s s", error, _ACCEPT_RETRY_S)
                failed_with = error.errno
                continue
            failed_with = None
            with self._lock:
                is_full = len(self._connections) >= self.options.connections_max
                if is_full or self._closing.is_set():
                    sock.close()
                    continue
                connection = _Connection(self, Wire(sock, self.options.stall_timeout_s), str(address[0]))
                self._connections.append(connection)
            try:
                connection.thread.start()
            except RuntimeError as error:  # the system has no more threads: this joiner asks somebody else
                logger.warning("recovery: %s", error)
                connection.wire.close()
                self.forget(connection)

    def _cut_readers(self, gone: list[Snapshot]) -> None:
        for snapshot in gone:
            snapshot.revoke()
        ids = {snapshot.id for snapshot in gone}
        with self._lock:
            readers = [c for c in self._connections if c.serving in ids]
        for connection in readers:
            connection.wire.shut()


class _Connection:
    """One joiner's connection; all but `serving` and `wire.shut` belongs to its thread."""

    def __init__(self, server: RecoveryServer, wire: Wire, peer: str) -> None:
        self.wire = wire
        self.serving = ""  # id of the snapshot that it holds on to
        self.thread = threading.Thread(target=self._run, name=f"everstep-recovery-{peer}", daemon=True)
        self._server = server
        self._auth = server.options.auth
        self._peer = peer
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        self._requests = 0
        self._refusals = 0

    def _run(self) -> None:
        try:
            self.wire.open()
            deadline = time.monotonic() + _FIRST_REQUEST_S
            while self._serve_request(deadline):
                if self._refusals == 0:
                    deadline = time.monotonic() + _IDLE_S
        except (OSError, RemoteProtocolError) as error:
            logger.info("recovery: connection of %s ended: %s", self._peer, error)
        finally:
            self.wire.close()
            self._server.forget(self)

    def _serve_request(self, deadline: float) -> bool:
        """False when the connection is over."""
        text = self.wire.read_head(deadline, is_idle=True)
        if not text:
            return False
        head = parse_head(text)
        method, target, _ = head.words
        challenge = self._verified(head.fields.get("authorization", ""), target)
        if challenge is None:
            return self._refuse()
        self._refusals = 0
        self._requests += 1
        request = parse_target(target)
        if method != "GET" or "content-length" in head.fields or "transfer-encoding" in head.fields:
            self._answer(challenge, 405, b"only GET, without a body")
            return False
        if isinstance(request, ManifestRequest):
            self._serve_manifest(challenge, request)
        elif request is None:
            self._answer(challenge, 400, b"no such resource")
        else:
            name, value = NO_DIGESTS
            self._serve_snapshot(challenge, request, with_digests=head.fields.get(name.lower()) != value)
        return True

    def _verified(self, credential: str, target: str) -> Challenge | None:
        client_nonce, mac = parse_credential(credential) or (b"", b"")
        challenge = Challenge(server_nonce=self._nonce, client_nonce=client_nonce, number=self._requests, target=target)
        if self._auth is None:
            return challenge
        if not client_nonce or not secrets.compare_digest(mac, challenge.request_mac(self._auth)):
            return None
        return challenge

    def _refuse(self) -> bool:
        self._refusals += 1
        head = f"HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: {challenge_field(self._nonce)}\r\nContent-Length: 0"
        self.wire.send(f"{head}\r\n\r\n".encode())
        if self._refusals >= _REFUSALS_MAX:
            logger.warning("recovery: %s does not know the job token", self._peer)
        return self._refusals < _REFUSALS_MAX

    def _serve_manifest(self, challenge: Challenge, request: ManifestRequest) -> None:
        snapshot = self._server.offers.wait_for(request.key, request.wait_s)
        if snapshot is None:
            self._answer(challenge, 404, b"not offered yet")
        else:
            self._answer(challenge, 200, snapshot.manifest_bytes, snapshot.id)

    def _serve_snapshot(
        self, challenge: Challenge, request: ChunksRequest | DigestsRequest | MemoryRequest, *, with_digests: bool
    ) -> None:
        self.serving = request.snapshot_id  # before it is looked up: a withdrawal in between cuts this connection
        snapshot = self._server.offers.by_id(request.snapshot_id)
        if snapshot is None:
            self._answer(challenge, 410, b"withdrawn")
        elif isinstance(request, MemoryRequest):
            self._show_memory(challenge, snapshot, request)
        elif not request.first < request.end <= snapshot.chunk_count:
            self._answer(challenge, 400, b"no such chunks")
        elif isinstance(request, DigestsRequest):
            self._send_digests(challenge, snapshot, request)
        elif with_digests:
            self._send_chunks(challenge, snapshot, request)
        else:
            self._send_bare_chunks(challenge, snapshot, request)
        self.serving = ""

    def _send_chunks(self, challenge: Challenge, snapshot: Snapshot, request: ChunksRequest) -> None:
        started_at = time.monotonic()
        size = _size(snapshot, request)
        self._send_head(challenge, 200, snapshot.id, size + DIGEST_BYTES * (request.end - request.first))
        digest = b""  # of the chunk before
        for index in range(request.first, request.end):
            for block in snapshot.hashed_blocks(index):
                self.wire.send(digest, *block)
                digest = b""
            computed = snapshot.digest(index)
            _check_lent(snapshot)
            digest = computed
        self.wire.send(digest)
        self._log_sent(size, started_at)

    def _send_bare_chunks(self, challenge: Challenge, snapshot: Snapshot, request: ChunksRequest) -> None:
        """Not vouched for, and not hashed: the joiner hashes what arrives, and another donor's digests decide."""
        started_at = time.monotonic()
        size = _size(snapshot, request)
        self._send_head(challenge, 200, snapshot.id, size)
        for index in range(request.first, request.end):
            _check_lent(snapshot)  # to end early; what changes in the middle of it differs from the other's digest
            self.wire.send(*snapshot.chunk(index))
        self._log_sent(size, started_at)

    def _log_sent(self, size: int, started_at: float) -> None:
        elapsed_s = time.monotonic() - started_at
        logger.info("recovery: sent %d bytes to %s in %.3f s", size, self._peer, elapsed_s)

    def _show_memory(self, challenge: Challenge, snapshot: Snapshot, request: MemoryRequest) -> None:
        if self.wire.is_local and snapshot.is_in_host_memory:
            body = self._server.readable.show(snapshot.addresses, request.pid)
            self._answer(challenge, 200, body, snapshot.id)
        else:
            self._answer(challenge, 404, b"on another host, or on a GPU")

    def _send_digests(self, challenge: Challenge, snapshot: Snapshot, request: DigestsRequest) -> None:
        """In small parts, so that the joiner can compare while the rest is computed."""
        self._send_head(challenge, 200, snapshot.id, DIGEST_BYTES * (request.end - request.first))
        for begin in range(request.first, request.end, _DIGESTS_AT_ONCE):
            end = min(begin + _DIGESTS_AT_ONCE, request.end)
            digests = [snapshot.digest(index) for index in range(begin, end)]
            _check_lent(snapshot)
            self.wire.send(b"".join(digests))

    def _answer(self, challenge: Challenge, status: int, body: bytes, snapshot_id: str = "") -> None:
        self._send_head(challenge, status, snapshot_id, len(body), body)

    def _send_head(self, challenge: Challenge, status: int, snapshot_id: str, length: int, body: bytes = b"") -> None:
        lines = [f"HTTP/1.1 {status} {_REASONS[status]}", f"Content-Length: {length}"]
        if body:
            lines.append(f"Everstep-Digest: {body_digest(body)}")
        if snapshot_id:
            lines.append(f"Everstep-Snapshot: {snapshot_id}")
        if self._auth is not None:
            lines.append(f"Everstep-Proof: {challenge.answer_mac(self._auth, status, snapshot_id, body).hex()}")
        self.wire.send("\r\n".join([*lines, "", ""]).encode(), body)


def _size(snapshot: Snapshot, request: ChunksRequest) -> int:
    return snapshot.manifest.chunk_range(request.end - 1)[1] - snapshot.manifest.chunk_range(request.first)[0]


def _check_lent(snapshot: Snapshot) -> None:
    """After the last look at its memory, before its digest goes out."""
    if snapshot.is_revoked:
        raise ConnectionAbortedError("withdrawn in the middle")


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port < 1 << 16:
        raise ConfigError(f"recovery cannot listen on port {port}; use 1 to 65535, or 0 for any free one")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:  # UnicodeError: of a host name
        raise ConfigError(f"recovery cannot listen on {host}: {error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise ConfigError(f"recovery cannot listen on {host} port {port}: {error}; choose another address") from error
    return listener


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
