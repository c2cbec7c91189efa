"""How the two ends of a link prove to each other that they know the job token, which itself never travels.

    server   Challenge(version, nonce, wants_token)
    client   Answer(version, nonce, job_id, role, mac)     mac over both nonces, version, job and role
    server   Accepted(mac)                                 the same, under another label: the server proves itself too
             or Refused(code, detail)

Without a token on either side the MACs are empty: open mode, which `config` allows on loopback only. All functions
here are pure but for the nonces, which the shells draw.
"""

import hashlib
import hmac
import secrets
from typing import Any

import msgspec

from everstep.core.messages import PROTOCOL_VERSION, Refused
from everstep.core.types import JOB_ID_CHARS_MAX, RefusalCode, RemoteProtocolError
from everstep.errors import LighthouseRefused

NONCE_BYTES = 16
HANDSHAKE_BYTES_MAX = 4096
HANDSHAKE_S = 5.0  # from the accepted connection to Accepted
ROLES = ("member", "node")  # of a replica group; an agent, for the rendezvous
ROLE_CHARS_SHOWN = 40  # a refusal must fit into a handshake frame

_CLIENT, _SERVER = "everstep link client", "everstep link server"


class Challenge(msgspec.Struct, frozen=True, tag="challenge"):
    """First frame on every link, from the server. `version` stays first in every version of the protocol."""

    version: int
    nonce: bytes
    wants_token: bool


class Answer(msgspec.Struct, frozen=True, tag="answer"):
    """Who the client is, and its proof."""

    version: int
    nonce: bytes
    job_id: str
    role: str
    mac: str = ""


class Accepted(msgspec.Struct, frozen=True, tag="accepted"):
    """The server's proof; Hello may follow."""

    mac: str = ""


class Credentials(msgspec.Struct, frozen=True, kw_only=True):
    """What a client says of itself. `token` None: open mode."""

    job_id: str
    role: str = "member"
    token: bytes | None = None
    version: int = PROTOCOL_VERSION

    def __repr__(self) -> str:
        return f"Credentials(job_id={self.job_id!r}, role={self.role!r}, token={'set' if self.token else None})"


def sign(token: bytes, *parts: str | bytes) -> str:
    """HMAC-SHA256 over the parts, in hex. Each part is length-prefixed: ("ab", "c") is not ("a", "bc")."""
    mac = hmac.new(token, digestmod=hashlib.sha256)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        mac.update(len(data).to_bytes(8, "little"))
        mac.update(data)
    return mac.hexdigest()


def verify(token: bytes, mac: str, *parts: str | bytes) -> bool:
    """Whether `mac` is the signature of the parts; in constant time."""
    return hmac.compare_digest(mac.encode(), sign(token, *parts).encode())


def http_key(token: bytes, scope: str) -> str:
    """What an HTTP client shows as `Authorization: Bearer` in the token's place. `scope` is "read" or "operate".

    It opens the HTTP pages and nothing else: the token itself never travels, and a link cannot be opened with it.
    """
    return sign(token, "everstep http", scope)


def admits(token: bytes | None, bearer: str, scope: str) -> bool:
    """Whether `bearer`, the token itself or a key made from it, may use pages of this scope; in constant time."""
    if token is None:
        return True
    given = bearer.encode("utf-8", "surrogateescape")
    accepted = [token, http_key(token, "operate").encode()]
    if scope == "read":
        accepted.append(http_key(token, "read").encode())
    return sum(hmac.compare_digest(given, right) for right in accepted) > 0


def new_nonce() -> bytes:
    return secrets.token_bytes(NONCE_BYTES)


# ---- server


def challenge(token: bytes | None, version: int = PROTOCOL_VERSION) -> Challenge:
    return Challenge(version, new_nonce(), token is not None)


def judge(token: bytes | None, asked: Challenge, answer: Answer) -> Accepted | Refused:
    """The server's verdict on an Answer to its own challenge."""
    if answer.version != asked.version:
        return Refused(RefusalCode.BAD_VERSION, _versions(asked.version, answer.version))
    if token is not None:
        if not answer.mac:
            return Refused(RefusalCode.BAD_TOKEN, _TOKEN_MISSING)
        if not verify(token, answer.mac, *_signed(_CLIENT, asked, answer)):
            return Refused(RefusalCode.BAD_TOKEN, _TOKEN_WRONG)
    if len(answer.nonce) != NONCE_BYTES:
        return Refused(RefusalCode.BAD_CONFIG, f"a nonce of {len(answer.nonce)} bytes; it must have {NONCE_BYTES}")
    if answer.role not in ROLES:
        return Refused(RefusalCode.BAD_CONFIG, f"role {answer.role[:ROLE_CHARS_SHOWN]!r} is none of {', '.join(ROLES)}")
    if not 0 < len(answer.job_id) <= JOB_ID_CHARS_MAX or not answer.job_id.isprintable():
        shown = answer.job_id[:JOB_ID_CHARS_MAX]
        detail = f"job id {shown!r} must have 1 to {JOB_ID_CHARS_MAX} printable characters: check EVERSTEP_JOB_ID"
        return Refused(RefusalCode.WRONG_JOB, detail)
    return Accepted(sign(token, *_signed(_SERVER, asked, answer)) if token is not None else "")


# ---- client


def answer(asked: Challenge, credentials: Credentials) -> Answer:
    """The client's Answer; raises LighthouseRefused for a server that it must not talk to.

    A server of another version gets an Answer all the same, so that it can log why the client goes away: see `expect`.
    """
    if credentials.token is not None and not asked.wants_token:
        raise LighthouseRefused(RefusalCode.BAD_TOKEN, _SERVER_HAS_NO_TOKEN)
    draft = Answer(credentials.version, new_nonce(), credentials.job_id, credentials.role)
    if credentials.token is None:
        return draft
    return msgspec.structs.replace(draft, mac=sign(credentials.token, *_signed(_CLIENT, asked, draft)))


def expect(asked: Challenge, credentials: Credentials) -> None:
    """Once the Answer is sent: go no further with a server of another version; raises LighthouseRefused."""
    if asked.version != credentials.version:
        raise LighthouseRefused(RefusalCode.BAD_VERSION, _versions(asked.version, credentials.version))


def confirm(verdict: Accepted | Refused, asked: Challenge, mine: Answer, credentials: Credentials) -> None:
    """Check the server's verdict and its proof; raises LighthouseRefused."""
    if isinstance(verdict, Refused):
        raise LighthouseRefused(verdict.code, verdict.detail)
    if credentials.token is None:
        return
    if not verify(credentials.token, verdict.mac, *_signed(_SERVER, asked, mine)):
        raise LighthouseRefused(RefusalCode.BAD_TOKEN, _SERVER_UNPROVEN)


# ---- frames

_encoder = msgspec.msgpack.Encoder()
_from_server = msgspec.msgpack.Decoder(Challenge | Accepted | Refused)
_from_client = msgspec.msgpack.Decoder(Answer)


def encode(message: Challenge | Answer | Accepted | Refused) -> bytes:
    return _encoder.encode(message)


def decode_from_server(frame: bytes) -> Challenge | Accepted | Refused:
    message: Challenge | Accepted | Refused = _decode(_from_server, frame)
    return message


def decode_from_client(frame: bytes) -> Answer:
    message: Answer = _decode(_from_client, frame)
    return message


def _decode(decoder: "msgspec.msgpack.Decoder[Any]", frame: bytes) -> Any:
    if len(frame) > HANDSHAKE_BYTES_MAX:
        raise RemoteProtocolError(f"a handshake frame of {len(frame)} bytes exceeds {HANDSHAKE_BYTES_MAX}")
    try:
        return decoder.decode(frame)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise RemoteProtocolError(f"an undecodable handshake frame: {str(error)[:200]}") from error


def _signed(label: str, asked: Challenge, given: Answer) -> tuple[str | bytes, ...]:
    return (label, str(given.version), asked.nonce, given.nonce, given.job_id, given.role)


def _versions(server: int, client: int) -> str:
    return (
        f"the lighthouse speaks protocol version {server}, the client version {client}: "
        "install the same release of everstep on both"
    )


_TOKEN_MISSING = (
    "this lighthouse wants the job token and the client has none: give it the file of the lighthouse's --token-file "
    "in EVERSTEP_TOKEN_FILE"
)
_TOKEN_WRONG = "the job token is not the lighthouse's: compare EVERSTEP_TOKEN_FILE with the lighthouse's --token-file"
_SERVER_HAS_NO_TOKEN = (
    "a job token is configured here, but the lighthouse asks for none: start it with --token-file, or check "
    "EVERSTEP_LIGHTHOUSE"
)
_SERVER_UNPROVEN = "the lighthouse could not prove that it knows the job token: check EVERSTEP_LIGHTHOUSE"
