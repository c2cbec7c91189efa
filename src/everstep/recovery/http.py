"""The HTTP that donors and joiners speak: four GETs, and how both ends prove that they know the job token.

    GET /v1/offers/{key}/manifest?wait_s=4         200 the manifest | 404 not offered yet
    GET /v1/snapshots/{id}/chunks/{first}-{end}    200 for each chunk of [first, end) its bytes, then its xxh3_64 | 410
                                                   without the xxh3_64s to a request with the field Everstep-Digests: no
    GET /v1/snapshots/{id}/digests/{first}-{end}   200 for each of those chunks its xxh3_64 | 410
    GET /v1/snapshots/{id}/memory?pid={pid}        200 where the payload lies in the source's memory | 404 another host

With a job token the first answer on a connection is 401 with a nonce. Every request then carries HMAC(token, the
server's nonce, the client's nonce, number of the request on this connection, target), and every answer the same over
its status and its body (of chunks only the head); so nobody can play either side with what he overheard elsewhere.
With or without a token `Everstep-Digest` guards the other bodies against damage: a manifest holds numbers of the state.
Chunks are guarded against damage, not against an attacker on the path: that needs TLS.
"""

import hashlib
import re
from dataclasses import dataclass
from urllib.parse import quote, unquote

import xxhash

from everstep.errors import RemoteProtocolError
from everstep.recovery.auth import TransferAuth

KEY_CHARS_MAX = 512
LONG_POLL_S = 4.0
NONCE_BYTES = 16
ERROR_BODY_BYTES_MAX = 4 << 10

NO_DIGESTS = ("Everstep-Digests", "no")  # of a request for chunks: the primary vouches for them
_MANIFEST = re.compile(r"/v1/offers/([^/?]{1,6144})/manifest\?wait_s=(\d{1,3}(?:\.\d{1,6})?)")
_CHUNKS = re.compile(r"/v1/snapshots/([0-9a-f]{16})/chunks/(\d{1,15})-(\d{1,15})")
_DIGESTS = re.compile(r"/v1/snapshots/([0-9a-f]{16})/digests/(\d{1,15})-(\d{1,15})")
_MEMORY = re.compile(r"/v1/snapshots/([0-9a-f]{16})/memory\?pid=(\d{1,10})")
_STATUS = re.compile(r"[1-5]\d\d")
_SNAPSHOT_ID = re.compile(r"[0-9a-f]{16}")
_CREDENTIAL = re.compile(r"Everstep nonce=([0-9a-f]{32}), mac=([0-9a-f]{64})")
_CHALLENGE = re.compile(r"Everstep nonce=([0-9a-f]{32})")


@dataclass(frozen=True)
class ManifestRequest:
    key: str
    wait_s: float

    @property
    def target(self) -> str:
        return f"/v1/offers/{quote(self.key, safe='')}/manifest?wait_s={self.wait_s:.3f}"


@dataclass(frozen=True)
class ChunksRequest:
    snapshot_id: str
    first: int
    end: int

    @property
    def target(self) -> str:
        return f"/v1/snapshots/{self.snapshot_id}/chunks/{self.first}-{self.end}"


@dataclass(frozen=True)
class DigestsRequest:
    snapshot_id: str
    first: int
    end: int

    @property
    def target(self) -> str:
        return f"/v1/snapshots/{self.snapshot_id}/digests/{self.first}-{self.end}"


@dataclass(frozen=True)
class MemoryRequest:
    """`pid`: the process that is going to read."""

    snapshot_id: str
    pid: int

    @property
    def target(self) -> str:
        return f"/v1/snapshots/{self.snapshot_id}/memory?pid={self.pid}"


Request = ManifestRequest | ChunksRequest | DigestsRequest | MemoryRequest


def parse_target(target: str) -> Request | None:
    if match := _MANIFEST.fullmatch(target):
        return ManifestRequest(unquote(match[1]), min(float(match[2]), LONG_POLL_S))
    if match := _CHUNKS.fullmatch(target):
        return ChunksRequest(match[1], int(match[2]), int(match[3]))
    if match := _DIGESTS.fullmatch(target):
        return DigestsRequest(match[1], int(match[2]), int(match[3]))
    if match := _MEMORY.fullmatch(target):
        return MemoryRequest(match[1], int(match[2]))
    return None


@dataclass(frozen=True)
class Head:
    """The first line's words and the fields, names in lower case."""

    words: tuple[str, ...]
    fields: dict[str, str]

    def length(self, limit: int) -> int:
        text = self.fields.get("content-length", "")
        if not re.fullmatch(r"\d{1,18}", text) or int(text) > limit:
            raise RemoteProtocolError(f"content-length {text[:40]!r}; at most {limit}")
        return int(text)


def body_digest(body: bytes | bytearray) -> str:
    return xxhash.xxh3_64_hexdigest(body)


@dataclass(frozen=True)
class Answer:
    """What a source says; `snapshot_id` is "" where it names none."""

    status: int
    snapshot_id: str
    head: Head


def parse_answer(text: bytes) -> Answer:
    """Raises RemoteProtocolError for a head that our server never sends."""
    head = parse_head(text)
    version, status, _ = head.words
    if version != "HTTP/1.1" or not _STATUS.fullmatch(status) or "transfer-encoding" in head.fields:
        raise RemoteProtocolError("an answer that is not plain HTTP/1.1")
    snapshot_id = head.fields.get("everstep-snapshot", "")
    if snapshot_id and not _SNAPSHOT_ID.fullmatch(snapshot_id):
        raise RemoteProtocolError(f"an answer about the snapshot {snapshot_id[:40]!r}")
    return Answer(int(status), snapshot_id, head)


def parse_head(head: bytes) -> Head:
    """Raises RemoteProtocolError unless it is three words and well-formed, distinct fields."""
    try:
        first, *lines = head.decode("ascii").split("\r\n")
    except UnicodeDecodeError as error:
        raise RemoteProtocolError("a head that is not ASCII") from error
    words = tuple(first.split(" ", 2))
    fields: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not name or name.lower() in fields:
            raise RemoteProtocolError(f"the header line {line[:60]!r}")
        fields[name.lower()] = value.strip()
    if len(words) != 3:
        raise RemoteProtocolError(f"the first line {first[:60]!r}")
    return Head(words, fields)


@dataclass(frozen=True, kw_only=True)
class Challenge:
    """One request on one connection, as both ends sign it."""

    server_nonce: bytes
    client_nonce: bytes
    number: int
    target: str

    def request_mac(self, auth: TransferAuth) -> bytes:
        return auth.sign(b"everstep recovery request", *self._parts())

    def answer_mac(self, auth: TransferAuth, status: int, snapshot_id: str, body: bytes | bytearray) -> bytes:
        parts = (str(status).encode(), snapshot_id.encode(), hashlib.sha256(body).digest())
        return auth.sign(b"everstep recovery answer", *self._parts(), *parts)

    def _parts(self) -> tuple[bytes, ...]:
        return self.server_nonce, self.client_nonce, str(self.number).encode(), self.target.encode()


def challenge_field(nonce: bytes) -> str:
    return f"Everstep nonce={nonce.hex()}"


def parse_challenge(text: str) -> bytes | None:
    match = _CHALLENGE.fullmatch(text)
    return bytes.fromhex(match[1]) if match else None


def credential_field(client_nonce: bytes, mac: bytes) -> str:
    return f"Everstep nonce={client_nonce.hex()}, mac={mac.hex()}"


def parse_credential(text: str) -> tuple[bytes, bytes] | None:
    match = _CREDENTIAL.fullmatch(text)
    return (bytes.fromhex(match[1]), bytes.fromhex(match[2])) if match else None
