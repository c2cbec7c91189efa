"""Live state from a peer: the manifest, the heads of the HTTP, and both ends on real sockets."""

import contextlib
import socket
import time
from urllib.parse import urlsplit

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from everstep.errors import ConfigError, RecoveryFailed, RemoteProtocolError, StateMismatch
from everstep.recovery import Landing, Limits, Snapshot
from everstep.recovery.assembly import Assembly, plain_leaf
from everstep.recovery.fit import check_fit
from everstep.recovery.http import (
    body_digest,
    parse_answer,
    parse_challenge,
    parse_credential,
    parse_head,
    parse_target,
)
from everstep.recovery.manifest import Manifest, build, decode, encode
from everstep.recovery.wire import HEAD_BYTES_MAX, Wire
from tests.fuzz.damage import packed, spoiled
from tests.fuzz.rounds import Fuzz, rounds
from tests.recovery.trees import assert_same
from tests.recovery.wires import AUTH, DEADLINE_S, KEY, fetched, request_to, saying, serving

LIMITS = Limits(manifest_bytes=1 << 16, payload_bytes=1 << 16, nodes=200)
OWN = {"model": {"w": torch.ones(3, 2), "b": torch.ones(1)}, "optimizer": [{"step": 1, "m": torch.ones(2)}], "lr": 0.5}
SNAPSHOT = Snapshot.take(OWN, 1 << 10)
MANIFESTS = (SNAPSHOT.manifest_bytes, Snapshot.take({"a": 1 << 90, "c": [(), {1: b"x"}]}).manifest_bytes)
ID = "0" * 16


@rounds(200)
def test_a_damaged_manifest_is_a_state_that_can_be_built_or_a_remote_protocol_error(fuzz: Fuzz) -> None:
    @given(spoiled(st.sampled_from(MANIFESTS) | packed(st.from_type(Manifest)), MANIFESTS))
    def holds(data: bytes) -> None:
        try:
            manifest = decode(data, LIMITS)
        except RemoteProtocolError:
            return
        with contextlib.suppress(StateMismatch):
            check_fit(build(manifest, plain_leaf), OWN, frozenset({"model"}))
        Assembly(manifest, Landing()).tree()

    fuzz(holds)


HEADS = (
    b"GET /v1/offers/a%2Fb/manifest?wait_s=4.000 HTTP/1.1\r\nHost: a:1\r\nAuthorization: Everstep nonce="
    + b"0" * 32
    + b", mac="
    + b"1" * 64,
    b"GET /v1/snapshots/0123456789abcdef/chunks/0-17 HTTP/1.1",
    b"HTTP/1.1 200 OK\r\nContent-Length: 17\r\nEverstep-Digest: 00\r\nEverstep-Snapshot: 0123456789abcdef",
    b"HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Everstep nonce=" + b"0" * 32 + b"\r\nContent-Length: 0",
)


@rounds(150)
def test_a_damaged_head_is_understood_or_a_remote_protocol_error(fuzz: Fuzz) -> None:
    @given(spoiled(st.sampled_from(HEADS), (*HEADS, b"9" * 5000, b": ", b"\r\n")))
    def holds(text: bytes) -> None:
        with contextlib.suppress(RemoteProtocolError):
            head = parse_head(text)
            parse_target(head.words[1])
            parse_credential(head.fields.get("authorization", ""))
            parse_challenge(head.fields.get("www-authenticate", ""))
        with contextlib.suppress(RemoteProtocolError):
            assert 0 <= parse_answer(text).head.length(1000) <= 1000

    fuzz(holds)


@rounds(80)
def test_a_head_in_any_pieces_is_read_refused_or_an_os_error_and_never_longer_than_allowed(fuzz: Fuzz) -> None:
    @given(st.lists(spoiled(st.sampled_from(HEADS), (b"\r\n\r\n",)), min_size=1, max_size=4), st.booleans())
    def holds(pieces: list[bytes], has_end: bool) -> None:
        near, far = socket.socketpair(socket.AF_UNIX)
        with far, contextlib.closing(near):
            for piece in [*pieces, b"\r\n\r\n" * has_end]:
                far.sendall(piece[: HEAD_BYTES_MAX + 99])
            far.shutdown(socket.SHUT_WR)
            with contextlib.suppress(OSError, RemoteProtocolError):
                assert len(Wire(near, 1.0).read_head(time.monotonic() + 1.0)) <= 2 * HEAD_BYTES_MAX

    fuzz(holds)


def answer(body: bytes, digest: str = "", length: int = -1) -> bytes:
    lines = [
        "HTTP/1.1 200 OK",
        f"Content-Length: {len(body) if length < 0 else length}",
        f"Everstep-Digest: {digest or body_digest(body)}",
        f"Everstep-Snapshot: {ID}",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


def chunks_of(snapshot: Snapshot) -> bytes:
    return b"".join(b"".join(snapshot.chunk(n)) + snapshot.digest(n) for n in range(snapshot.chunk_count))


@rounds(50)
def test_whatever_a_source_says_the_joiner_has_its_state_or_a_documented_error(fuzz: Fuzz) -> None:
    valid = (answer(SNAPSHOT.manifest_bytes), answer(chunks_of(SNAPSHOT)))
    bodies = spoiled(st.sampled_from(MANIFESTS), MANIFESTS).map(answer)
    lengths = st.sampled_from((1 << 40, 1 << 63, 10**17, 0)).map(lambda length: answer(b"x", length=length))
    first = st.just(valid[0]) | spoiled(st.just(valid[0]), valid) | bodies | lengths
    second = spoiled(st.just(valid[1]), valid) | lengths

    @given(first, second)
    def holds(manifest: bytes, chunks: bytes) -> None:
        with saying(manifest, chunks) as url:
            with contextlib.suppress(RecoveryFailed, RemoteProtocolError, StateMismatch, ConfigError):
                state = fetched(url, 0.2, expected=OWN, limits=LIMITS)
                if manifest == valid[0]:
                    assert_same(state, OWN)

    fuzz(holds)


@rounds(60)
@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("auth", [None, AUTH], ids=["open", "token"])
def test_whatever_a_joiner_says_the_others_get_the_state(fuzz: Fuzz, auth: object) -> None:
    signed = HEADS[0].replace(b"a%2Fb", KEY.replace("/", "%2F").encode()).replace(b"4.000", b"0.000")
    asks = (signed, HEADS[1].replace(b"0123456789abcdef", SNAPSHOT.id.encode()), *HEADS)

    with serving(SNAPSHOT, auth) as (server, url):  # type: ignore[arg-type]
        port = urlsplit(url).port or 0

        @given(st.lists(spoiled(st.sampled_from(asks), (*asks, b"\r\n\r\n")), min_size=1, max_size=4))
        def holds(heads: list[bytes]) -> None:
            with socket.create_connection(("127.0.0.1", port), DEADLINE_S) as hostile:
                with contextlib.suppress(OSError):
                    hostile.sendall(b"".join(head.replace(b"wait_s=4", b"wait_s=0") + b"\r\n\r\n" for head in heads))
                    hostile.shutdown(socket.SHUT_WR)
                assert_same(fetched(url, auth=auth, expected=OWN), OWN)
                with contextlib.suppress(OSError):
                    while hostile.recv(1 << 16):
                        pass

        fuzz(holds)
        assert len(server.list_fds()) < 8


def test_a_body_of_2_to_the_40_bytes_is_refused_before_memory_is_taken() -> None:
    with saying(answer(b"x", length=1 << 40)) as url, pytest.raises(RemoteProtocolError, match="content-length"):
        fetched(url)
    huge = Manifest("everstep-state", 1, 1 << 20, (1 << 43,), ())
    with pytest.raises(RemoteProtocolError, match="at most"):
        decode(encode(huge), request_to("http://h:1").limits)
