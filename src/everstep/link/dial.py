"""Opens one authenticated WebSocket to a lighthouse, or says why that did not work."""

import asyncio
import dataclasses
import os
import ssl
from pathlib import Path

import aiohttp

from everstep.core.messages import Refused
from everstep.core.types import RemoteProtocolError
from everstep.errors import ConfigError, LighthouseRefused
from everstep.link import auth, codec

CONNECT_S = 5.0  # for one attempt: TCP, TLS and the WebSocket handshake
CLOSE_S = 0.5  # for the WebSocket's own goodbye


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinkTarget:
    """Where to, and as whom. `url` is the lighthouse's base URL, as `config` makes it from host:port or a URL."""

    url: str
    credentials: auth.Credentials
    connect_timeout_s: float = 30.0
    named_by: str = "EVERSTEP_LIGHTHOUSE"  # what to correct if nobody answers there
    tls_ca: Path | None = None


async def dial(session: aiohttp.ClientSession, target: LinkTarget) -> aiohttp.ClientWebSocketResponse:
    """Both sides have proved themselves when it returns.

    Raises LighthouseRefused, RemoteProtocolError, and what aiohttp and the system raise of connections.
    """
    websocket = await session.ws_connect(
        target.url + "/link",
        max_msg_size=codec.FRAME_BYTES_MAX,
        timeout=aiohttp.ClientWSTimeout(ws_close=CLOSE_S),
    )
    try:
        await _shake_hands(websocket, target.credentials)
    except BaseException:
        await websocket.close()
        raise
    return websocket


async def _shake_hands(websocket: aiohttp.ClientWebSocketResponse, credentials: auth.Credentials) -> None:
    asked = auth.decode_from_server(await _binary(websocket))
    if isinstance(asked, Refused):
        raise LighthouseRefused(asked.code, asked.detail)
    if isinstance(asked, auth.Accepted):
        raise RemoteProtocolError("Accepted before a Challenge")
    mine = auth.answer(asked, credentials)
    await websocket.send_bytes(auth.encode(mine))
    auth.expect(asked, credentials)
    verdict = auth.decode_from_server(await _binary(websocket))
    if isinstance(verdict, auth.Challenge):
        raise RemoteProtocolError("a second Challenge")
    auth.confirm(verdict, asked, mine, credentials)


async def _binary(websocket: aiohttp.ClientWebSocketResponse) -> bytes:
    received = await websocket.receive()
    if received.type is not aiohttp.WSMsgType.BINARY:
        raise RemoteProtocolError("the connection closed during the handshake")
    data: bytes = received.data
    return data


def trust(target: LinkTarget) -> ssl.SSLContext | bool:
    """Whose certificates count for an https URL; True: those of the system's authorities. Raises ConfigError."""
    if target.tls_ca is None:
        return True
    try:
        return ssl.create_default_context(cafile=str(target.tls_ca))
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(f"tls_ca {target.tls_ca} is no readable file of PEM certificates: {error}") from error


def why(error: BaseException | None) -> str:
    """The error in words for the log and for LighthouseUnreachable."""
    match error:
        case aiohttp.WSServerHandshakeError(status=503):
            return "the lighthouse has no room for another link (HTTP 503)"
        case aiohttp.WSServerHandshakeError(status=status):
            return f"what answers there is no lighthouse (HTTP {status})"
        case aiohttp.ClientConnectorCertificateError(certificate_error=cause):
            return f"its certificate is not trusted: {cause}"
        case asyncio.TimeoutError():
            return "no answer in time"
        case OSError(errno=int(number)) if number > 0:
            return os.strerror(number).lower()
        case _:
            return str(error) or type(error).__name__
