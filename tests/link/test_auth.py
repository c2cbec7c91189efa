"""The handshake: who is let in, who is refused, and that both are told why."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.core.messages import PROTOCOL_VERSION, Refused
from everstep.core.types import RefusalCode, RemoteProtocolError
from everstep.errors import LighthouseRefused
from everstep.link import auth
from tests.link.parties import TOKEN, Party, serving

OTHER = b"some other token"


@pytest.mark.parametrize(
    ("server", "client", "code"),
    [
        (None, None, None),
        (TOKEN, TOKEN, None),
        (TOKEN, OTHER, RefusalCode.BAD_TOKEN),
        (TOKEN, None, RefusalCode.BAD_TOKEN),
        (None, TOKEN, RefusalCode.BAD_TOKEN),
    ],
)
def test_only_equal_tokens_meet(server: bytes | None, client: bytes | None, code: RefusalCode | None) -> None:
    with serving(server) as running, Party(running.url, token=client) as party:
        if code is None:
            party.events.expect("open")
            running.events.expect("opened")
        else:
            error = party.events.expect("failed").value
            assert isinstance(error, LighthouseRefused)
            assert error.code is code
            assert "token" in str(error)
            assert "check" in str(error) or "TOKEN_FILE" in str(error) or "--token-file" in str(error)
            assert not any(seen.what == "opened" for seen in running.events.so_far())


def test_a_refusal_never_contains_the_token() -> None:
    with serving(TOKEN) as running, Party(running.url, token=OTHER) as party:
        text = str(party.events.expect("failed").value)
    assert TOKEN.decode() not in text
    assert OTHER.decode() not in text
    assert OTHER.decode() not in repr(auth.Credentials(job_id="job", token=OTHER))


def test_another_protocol_version_is_refused_on_both_sides_with_both_numbers() -> None:
    other = PROTOCOL_VERSION + 1
    asked = auth.challenge(None)
    credentials = auth.Credentials(job_id="job", version=other)
    verdict = auth.judge(None, asked, auth.answer(asked, credentials))
    assert isinstance(verdict, Refused)
    assert verdict.code is RefusalCode.BAD_VERSION
    with serving() as running, Party(running.url, version=other) as party:
        error = party.events.expect("failed").value
    assert error.code is RefusalCode.BAD_VERSION
    for text in (verdict.detail, str(error)):
        assert str(PROTOCOL_VERSION) in text
        assert str(other) in text


def test_a_job_that_the_listener_refuses_is_told_its_reason() -> None:
    with serving() as running:
        running.recorder.refusals["elsewhere"] = Refused(RefusalCode.WRONG_JOB, "not served here")
        with Party(running.url, job_id="elsewhere") as party:
            error = party.events.expect("failed").value
    assert error.code is RefusalCode.WRONG_JOB
    assert str(error) == "not served here"


@pytest.mark.parametrize("job_id", ["", "x" * 129, "two\nlines"])
def test_a_job_id_that_is_no_name_is_refused(job_id: str) -> None:
    asked = auth.challenge(None)
    verdict = auth.judge(None, asked, auth.answer(asked, auth.Credentials(job_id=job_id)))
    assert isinstance(verdict, Refused)
    assert verdict.code is RefusalCode.WRONG_JOB


def test_a_client_that_the_server_is_too_busy_for_tries_on() -> None:
    with serving() as running:
        running.recorder.refusals["job"] = Refused(RefusalCode.BUSY, "full")
        with Party(running.url) as party:
            assert not party.client.wait_open(0.1)
            running.recorder.refusals.clear()
            party.events.expect("open")


def test_an_answer_to_one_challenge_is_no_answer_to_another() -> None:
    credentials = auth.Credentials(job_id="job", token=TOKEN)
    answer = auth.answer(auth.challenge(TOKEN), credentials)
    verdict = auth.judge(TOKEN, auth.challenge(TOKEN), answer)
    assert isinstance(verdict, Refused)
    assert verdict.code is RefusalCode.BAD_TOKEN


def test_the_clients_own_proof_sent_back_is_no_proof_of_the_server() -> None:
    credentials = auth.Credentials(job_id="job", token=TOKEN)
    asked = auth.challenge(TOKEN)
    mine = auth.answer(asked, credentials)
    with pytest.raises(LighthouseRefused, match="could not prove"):
        auth.confirm(auth.Accepted(mine.mac), asked, mine, credentials)


def test_a_proof_holds_for_one_job_only() -> None:
    asked = auth.challenge(TOKEN)
    mine = auth.answer(asked, auth.Credentials(job_id="job", token=TOKEN))
    forged = auth.Answer(mine.version, mine.nonce, "another", mine.role, mine.mac)
    assert isinstance(auth.judge(TOKEN, asked, forged), Refused)


@given(st.lists(st.binary(max_size=9), max_size=4), st.lists(st.binary(max_size=9), max_size=4))
def test_different_parts_never_share_a_signature(ours: list[bytes], theirs: list[bytes]) -> None:
    assert auth.verify(TOKEN, auth.sign(TOKEN, *ours), *theirs) == (ours == theirs)


@pytest.mark.parametrize("frame", [b"", b"\xc1", b"GET / HTTP/1.1", b"\x91" * 3000, b"x" * 5000])
def test_a_handshake_frame_that_is_none_is_a_remote_protocol_error(frame: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="handshake frame"):
        auth.decode_from_client(frame)
