"""Damage on the way, liars and strangers: only documented errors, and never a state that is not the source's."""

import logging
import socket
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from everstep.errors import ConfigError, RecoveryFailed, RemoteProtocolError
from everstep.recovery import Fetch, Limits, Snapshot, TransferAuth
from everstep.recovery.http import body_digest
from everstep.recovery.manifest import encode
from tests.recovery.trees import assert_same
from tests.recovery.wires import (
    AUTH,
    DEADLINE_S,
    KEY,
    Proxy,
    Tamper,
    fetched,
    flipping,
    request_to,
    saying,
    serving,
    state_of,
)
from tests.support.waiting import wait_until

FAILURES = (RecoveryFailed, RemoteProtocolError)
OTHER = TransferAuth(b"the token of another job")
CHUNK_BYTES = 1 << 12


# ---- damage


@pytest.mark.parametrize("auth", [None, pytest.param(AUTH, marks=pytest.mark.soak)], ids=["open", "token"])
def test_no_flipped_bit_gets_through(auth: TransferAuth | None) -> None:
    """Every byte of heads, manifest, chunks and digests once; where the damage changes nothing, the state is equal."""
    state = {"model": {"w": torch.arange(1500.0)}, "lr": 0.1, "big": 1 << 70}
    snapshot = Snapshot.take(state, CHUNK_BYTES)
    outcome: dict[str, int] = {}
    with serving(snapshot, auth) as (_, url):
        flips: list[Tamper] = []
        with Proxy(url, lambda offset, data: flips[-1](offset, data)) as proxy:
            flips.append(lambda _, data: data)
            fetched(proxy.url, auth=auth)
            ends = proxy.passed
            dense, sparse = ends - snapshot.total_bytes, 97
            for position in [*range(dense), *range(dense, ends, sparse)]:
                flips.append(flipping(position, position % 8))
                try:
                    assert_same(fetched(proxy.url, 2.0, auth=auth, stall_timeout_s=0.05, retry_after_s=()), state)
                    result = "harmless"
                except (*FAILURES, ConfigError) as error:
                    result = type(error).__name__
                outcome[result] = outcome.get(result, 0) + 1
    print(outcome, ends)
    assert outcome["harmless"] > ends / sparse / 2  # fetched again
    assert outcome["RecoveryFailed"] > len(snapshot.manifest_bytes)
    assert outcome.get("ConfigError", 0) < 80  # a damaged challenge looks like another token


def test_damage_in_chunk_and_digest_is_fetched_again_and_counted() -> None:
    state = state_of()
    snapshot = Snapshot.take(state, CHUNK_BYTES)
    with serving(snapshot) as (_, url):
        total = snapshot.total_bytes + 8 * snapshot.chunk_count
        with Proxy(url, lambda _, data: data) as proxy:
            fetched(proxy.url)
            begin = proxy.passed - total
        for position in (begin + 5, begin + CHUNK_BYTES, begin + total - 1):
            with Proxy(url, flipping(position)) as proxy:
                fetch = Fetch(request_to(proxy.url))
                assert_same(fetch.run(), state)
            assert fetch.report.digest_errors == 1


def test_a_source_whose_every_chunk_is_damaged_is_given_up() -> None:
    snapshot = Snapshot.take({"model": {"w": torch.zeros(1 << 16)}}, CHUNK_BYTES)
    with serving(snapshot) as (_, url):
        with Proxy(url, lambda _, data: data.replace(b"\0" * 512, b"\0" * 511 + b"\1")) as proxy:
            with pytest.raises(RecoveryFailed, match=r"chunk \d+ of 64 .*damaged, and so did"):
                fetched(proxy.url)


def test_a_manifest_that_arrives_damaged_again_and_again_is_called_so() -> None:
    snapshot = Snapshot.take(state_of(), CHUNK_BYTES)
    for auth in (None, AUTH):
        with serving(snapshot, auth) as (_, url):
            with Proxy(url, _flip_in(snapshot.manifest_bytes[20:40])) as proxy:
                with pytest.raises(RecoveryFailed, match="damaged"):
                    fetched(proxy.url, auth=auth)


def _flip_in(needle: bytes) -> Tamper:
    return lambda _, data: data.replace(needle, bytes([needle[0] ^ 1]) + needle[1:])


# ---- liars


def answer(body: bytes, *fields: str, status: str = "200 OK", digest: str = "") -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", f"Everstep-Digest: {digest or body_digest(body)}"]
    return "\r\n".join([*lines, *fields, "", ""]).encode() + body


def manifest_of(state: dict[str, Any]) -> bytes:
    return answer(encode(Snapshot.take(state).manifest), "Everstep-Snapshot: " + "0" * 16)


LIES = {
    "pickle": [answer(b"\x80\x04K\x01.")],
    "another HTTP server": [b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 5\r\n\r\nhello"],
    "an old HTTP server": [b"HTTP/1.0 404 Not Found\r\nContent-Length: 0\r\n\r\n"],
    "no HTTP": [b"SSH-2.0-OpenSSH_9.6\r\n\r\n"],
    "a head without end": [b"HTTP/1.1 200 OK\r\n" + b"a" * 40_000],
    "chunked": [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"],
    "no length": [b"HTTP/1.1 200 OK\r\n\r\n"],
    "a negative length": [b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n"],
    "a length beyond the limit": [b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n"],
    "an error beyond the limit": [b"HTTP/1.1 404 No\r\nContent-Length: 99999\r\n\r\n"],
    "a status without end": [b"HTTP/1.1 " + b"9" * 5000 + b" OK\r\nContent-Length: 0\r\n\r\n"],
    "an id that is another header": [answer(b"", "Everstep-Snapshot: a\nX: 1")],
    "an unknown status": [answer(b"what?", status="418 Teapot")],
    "a foreign manifest": [answer(msgspec.msgpack.encode({"format": "other", "nodes": []}))],
    "chunks of another size": [manifest_of(state_of()), answer(b"short", "Everstep-Snapshot: " + "0" * 16)],
    "chunks of another snapshot": [
        manifest_of({"a": torch.ones(1)}),
        answer(b"0" * 12, "Everstep-Snapshot: " + "1" * 16),
    ],
}


@pytest.mark.parametrize("name", LIES)
@pytest.mark.parametrize("auth", [None, AUTH], ids=["open", "token"])
def test_what_no_sound_source_sends_is_called_so(name: str, auth: TransferAuth | None) -> None:
    with saying(*LIES[name]) as url, pytest.raises(RemoteProtocolError):
        fetched(url, auth=auth)


def test_a_source_that_never_waits_is_not_asked_in_a_busy_loop() -> None:
    not_yet = answer(b"not offered yet", status="404 Not Found")
    with saying(*[not_yet] * 50) as url, pytest.raises(RecoveryFailed, match="did not offer"):
        fetched(url)


def test_a_state_beyond_the_limits_is_refused_before_memory_is_taken() -> None:
    with serving(Snapshot.take(state_of())) as (_, url):
        with pytest.raises(RemoteProtocolError, match="at most 1000 are accepted"):
            fetched(url, limits=Limits(payload_bytes=1000))
        with pytest.raises(RemoteProtocolError, match="content-length"):
            fetched(url, limits=Limits(manifest_bytes=10))
        with pytest.raises(RemoteProtocolError, match="nodes"):
            fetched(url, limits=Limits(nodes=3))


@given(st.lists(st.binary(max_size=40) | st.sampled_from([b"HTTP/1.1 200 OK\r\n", b"Content-Length: 3", b"\r\n"])))
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_a_source_says_only_documented_errors_come_out(parts: list[bytes]) -> None:
    with saying(b"".join(parts)) as url, pytest.raises(FAILURES):
        fetched(url, 2.0, retry_after_s=())


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@given(st.lists(st.binary(max_size=40) | st.sampled_from([b"GET / HTTP/1.1", b"GET /v1/offers/a", b"\r\n", b":"])))
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_a_joiner_says_the_server_serves_on(parts: list[bytes]) -> None:
    with serving(Snapshot.take({"a": 1})) as (_, url):
        with socket.create_connection(("127.0.0.1", urlsplit(url).port or 0), DEADLINE_S) as joiner:
            joiner.sendall(b"".join(parts) + b"\r\n\r\n")
            joiner.shutdown(socket.SHUT_WR)
            try:
                while joiner.recv(1 << 16):
                    pass
            except ConnectionResetError:
                pass
        assert fetched(url) == {"a": 1}


@pytest.mark.parametrize(
    ("request_head", "status"),
    [
        (b"POST /v1/offers/a/manifest?wait_s=0 HTTP/1.1", b"405"),
        (b"GET /v1/offers/a/manifest?wait_s=0 HTTP/1.1\r\nContent-Length: 3", b"405"),
        (b"GET /etc/passwd HTTP/1.1", b"400"),
        (b"GET /v1/offers/../manifest?wait_s=0 HTTP/1.1", b"404"),
        (b"GET /v1/snapshots/0000000000000000/chunks/0-1 HTTP/1.1", b"410"),
        (b"GET /v1/snapshots/%s/chunks/0-99 HTTP/1.1", b"400"),
        (b"GET /v1/snapshots/%s/chunks/1-1 HTTP/1.1", b"400"),
        (b"GET /v1/snapshots/%s/chunks/1-0 HTTP/1.1", b"400"),
    ],
)
def test_a_request_for_something_else_is_refused(request_head: bytes, status: bytes) -> None:
    snapshot = Snapshot.take(state_of())
    with serving(snapshot) as (_, url):
        said = _ask(url, request_head.replace(b"%s", snapshot.id.encode()) + b"\r\n\r\n")
    assert said.startswith(b"HTTP/1.1 " + status)


def _ask(url: str, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", urlsplit(url).port or 0), DEADLINE_S) as joiner:
        joiner.sendall(data)
        return joiner.recv(1 << 16)


# ---- tokens


def test_another_token_is_refused_and_so_is_none() -> None:
    with serving(Snapshot.take(state_of()), AUTH) as (_, url):
        with pytest.raises(ConfigError, match="does not accept this member's job token"):
            fetched(url, auth=OTHER)
        with pytest.raises(ConfigError, match="EVERSTEP_TOKEN_FILE"):
            fetched(url)


def test_a_source_that_asks_for_no_token_is_not_believed() -> None:
    with serving(Snapshot.take(state_of())) as (_, url), pytest.raises(RemoteProtocolError, match="know the job token"):
        fetched(url, auth=AUTH)


def test_a_source_that_cannot_prove_its_token_is_not_believed() -> None:
    challenge = b"HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Everstep nonce=%s\r\nContent-Length: 0\r\n\r\n" % (
        b"0" * 32
    )
    for said in (manifest_of(state_of()), manifest_of(state_of()).replace(b"200 OK", b"404 No")):
        with saying(challenge, said) as url, pytest.raises(RemoteProtocolError, match="did not prove"):
            fetched(url, auth=AUTH)


def test_without_the_token_nothing_is_learned_and_the_connection_soon_ends(caplog: pytest.LogCaptureFixture) -> None:
    target = f"GET /v1/offers/{KEY.replace('/', '%2F')}/manifest?wait_s=0 HTTP/1.1"
    forged = f"{target}\r\nAuthorization: Everstep nonce={'0' * 32}, mac={'0' * 64}\r\n\r\n".encode()
    with caplog.at_level(logging.WARNING), serving(Snapshot.take(state_of()), AUTH) as (server, url):
        with socket.create_connection(("127.0.0.1", urlsplit(url).port or 0), DEADLINE_S) as stranger:
            stranger.sendall(forged + forged + forged)
            heard = b""
            try:
                while more := stranger.recv(1 << 16):
                    heard += more
            except ConnectionResetError:
                pass
        wait_until(lambda: len(server.list_fds()) == 1, DEADLINE_S)
    assert heard.count(b"HTTP/1.1 401") == 2
    assert b"200" not in heard.replace(b"nonce=", b"").split(b"\r\n")
    assert "does not know the job token" in caplog.text


def test_a_request_overheard_on_one_connection_is_refused_on_another() -> None:
    with serving(Snapshot.take(state_of()), AUTH) as (_, url), Proxy(url, lambda _, data: data) as tap:
        fetched(tap.url, auth=AUTH)
        signed = next(asked for asked in tap.asked if b"Authorization" in asked)
        assert _ask(url, signed).startswith(b"HTTP/1.1 401")
