"""The parsers of both ends: whatever stands in a head is understood or a RemoteProtocolError."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.errors import ConfigError, RemoteProtocolError
from everstep.recovery import TransferAuth
from everstep.recovery.http import (
    KEY_CHARS_MAX,
    LONG_POLL_S,
    Challenge,
    ChunksRequest,
    ManifestRequest,
    challenge_field,
    credential_field,
    parse_answer,
    parse_challenge,
    parse_credential,
    parse_head,
    parse_target,
)
from tests.recovery.trees import texts

SPICE = st.sampled_from(
    [b"HTTP/1.1", b" ", b"\r\n", b":", b"200", b"9" * 5000, b"Content-Length", b"\xff", b"\0", b"-1"]
)


def heads() -> st.SearchStrategy[bytes]:
    return st.lists(SPICE | st.binary(max_size=6), max_size=12).map(b"".join)


@given(heads())
def test_any_head_is_understood_or_refused(data: bytes) -> None:
    for parse in (parse_head, parse_answer):
        with contextlib.suppress(RemoteProtocolError):
            parse(data)


@given(st.lists(SPICE, max_size=5).map(b"".join) | st.binary(max_size=30))
def test_any_status_length_and_snapshot_id_are_understood_or_refused(value: bytes) -> None:
    for template in (
        b"HTTP/1.1 %s OK",
        b"HTTP/1.1 200 OK\r\nContent-Length:%s",
        b"HTTP/1.1 200 OK\r\nEverstep-Snapshot:%s",
    ):
        with contextlib.suppress(RemoteProtocolError):
            answer = parse_answer(template % value)
            assert 100 <= answer.status < 600
            assert 0 <= answer.head.length(1000) <= 1000


@given(st.text(max_size=60))
def test_any_target_credential_and_challenge_are_understood_or_none(text: str) -> None:
    parse_target(text)
    parse_target(f"/v1/offers/{text}/manifest?wait_s=1")
    parse_target(f"/v1/snapshots/{'0' * 16}/chunks/{text}-1")
    parse_credential(text)
    parse_challenge(text)


@given(texts().filter(bool), st.floats(0, LONG_POLL_S))
def test_a_request_for_a_manifest_is_understood_as_it_was_meant(key: str, wait_s: float) -> None:
    understood = parse_target(ManifestRequest(key, wait_s).target)
    assert isinstance(understood, ManifestRequest)
    assert understood.key == key
    assert understood.wait_s == pytest.approx(wait_s, abs=1e-3)


def test_the_longest_key_is_understood() -> None:
    key = "\N{GRINNING FACE}" * KEY_CHARS_MAX
    assert parse_target(ManifestRequest(key, 0.0).target) == ManifestRequest(key, 0.0)


@given(st.integers(0, 10**15 - 1), st.integers(0, 10**15 - 1))
def test_a_request_for_chunks_is_understood_as_it_was_meant(first: int, end: int) -> None:
    request = ChunksRequest("0123456789abcdef", first, end)
    assert parse_target(request.target) == request


@given(st.binary(min_size=16, max_size=16), st.binary(min_size=32, max_size=32))
def test_credentials_and_challenges_are_understood_as_they_were_meant(nonce: bytes, mac: bytes) -> None:
    assert parse_credential(credential_field(nonce, mac)) == (nonce, mac)
    assert parse_challenge(challenge_field(nonce)) == nonce


def test_a_wait_longer_than_a_long_poll_is_cut() -> None:
    assert parse_target("/v1/offers/a/manifest?wait_s=999") == ManifestRequest("a", LONG_POLL_S)


def test_a_proof_holds_for_one_token_one_connection_one_request_and_one_answer() -> None:
    auth, other = TransferAuth(b"token of the job"), TransferAuth(b"another token")
    parts = {"server_nonce": b"s" * 16, "client_nonce": b"c" * 16, "number": 1, "target": "/a"}
    challenge = Challenge(**parts)  # type: ignore[arg-type]
    proofs = {challenge.request_mac(auth), challenge.request_mac(other), challenge.answer_mac(auth, 200, "", b"body")}
    for name, value in {"server_nonce": b"x" * 16, "client_nonce": b"x" * 16, "number": 2, "target": "/b"}.items():
        proofs.add(Challenge(**{**parts, name: value}).request_mac(auth))  # type: ignore[arg-type]
    for status, snapshot_id, body in [(404, "", b"body"), (200, "a", b"body"), (200, "", b"bodY")]:
        proofs.add(challenge.answer_mac(auth, status, snapshot_id, body))
    assert len(proofs) == 10


def test_a_token_is_neither_short_nor_shown() -> None:
    with pytest.raises(ConfigError, match="at least 8"):
        TransferAuth(b"short")
    assert "secret" not in repr(TransferAuth(b"a secret token"))
