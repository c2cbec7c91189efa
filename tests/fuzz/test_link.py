"""The link's bytes: frames of messages, and of the handshake before them."""

from collections.abc import Callable
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.core.messages import Refused, ToLighthouse, ToMember
from everstep.core.types import RefusalCode, RemoteProtocolError
from everstep.errors import LighthouseRefused
from everstep.link import auth, codec
from tests.fuzz.damage import HUGE, NESTS, packed, spoiled
from tests.fuzz.rounds import Fuzz, rounds
from tests.link.parties import TOKEN, beat, hello

MessageT = TypeVar("MessageT", ToLighthouse, ToMember)
TO_LIGHTHOUSE = packed(st.from_type(ToLighthouse))  # type: ignore[arg-type]
TO_MEMBER = packed(st.from_type(ToMember))  # type: ignore[arg-type]
SEEDS = (codec.encode(hello()), codec.encode(beat(3)), codec.encode(Refused(RefusalCode.BUSY, "later")))
ASKED = auth.challenge(TOKEN)
CREDENTIALS = auth.Credentials(job_id="job", token=TOKEN)
ANSWERED = auth.answer(ASKED, CREDENTIALS)
HANDSHAKES = tuple(map(auth.encode, (ASKED, ANSWERED, auth.judge(TOKEN, ASKED, ANSWERED))))


def said_of(decode: Callable[[bytes], MessageT], frame: bytes) -> tuple[str, MessageT | None]:
    try:
        return "", decode(frame)
    except RemoteProtocolError as error:
        return str(error), None


@rounds(200)
def test_a_frame_from_a_member_is_a_message_or_a_remote_protocol_error(fuzz: Fuzz) -> None:
    @given(spoiled(TO_LIGHTHOUSE, SEEDS))
    def holds(frame: bytes) -> None:
        complaint, message = said_of(codec.decode_to_lighthouse, frame)
        assert len(complaint) < 400
        assert message is None or codec.decode_to_lighthouse(codec.encode(message)) == message

    fuzz(holds)


@rounds(200)
def test_a_frame_from_the_lighthouse_is_a_message_or_a_remote_protocol_error(fuzz: Fuzz) -> None:
    @given(spoiled(TO_MEMBER, SEEDS))
    def holds(frame: bytes) -> None:
        complaint, message = said_of(codec.decode_to_member, frame)
        assert len(complaint) < 400
        assert message is None or codec.decode_to_member(codec.encode(message)) == message

    fuzz(holds)


@rounds(150)
def test_no_damaged_answer_gets_past_the_server_and_every_verdict_can_be_read(fuzz: Fuzz) -> None:
    @given(spoiled(st.just(HANDSHAKES[1]) | packed(st.from_type(auth.Answer)), HANDSHAKES))
    def holds(frame: bytes) -> None:
        try:
            answer = auth.decode_from_client(frame)
        except RemoteProtocolError:
            return
        verdict = auth.judge(TOKEN, ASKED, answer)
        assert isinstance(verdict, Refused) or answer == ANSWERED
        assert auth.decode_from_server(auth.encode(verdict)) == verdict

    fuzz(holds)


@rounds(100)
def test_an_open_server_admits_or_refuses_any_answer_and_every_verdict_can_be_read(fuzz: Fuzz) -> None:
    asked = auth.challenge(None)

    @given(
        st.builds(
            auth.Answer,
            version=st.just(asked.version) | st.integers(-(1 << 63), (1 << 64) - 1),
            nonce=st.just(b"n" * auth.NONCE_BYTES) | st.binary(max_size=40),
            job_id=st.text(max_size=300) | st.text("\U0001f600\n", min_size=120, max_size=900),
            role=st.just("member") | st.text("\x00\U000e0001", max_size=900),
            mac=st.text(max_size=70),
        )
    )
    def holds(answer: auth.Answer) -> None:
        frame = auth.encode(answer)
        if len(frame) > auth.HANDSHAKE_BYTES_MAX:
            return
        verdict = auth.judge(None, asked, auth.decode_from_client(frame))
        assert auth.decode_from_server(auth.encode(verdict)) == verdict

    fuzz(holds)


@rounds(150)
def test_no_damaged_verdict_gets_past_the_client(fuzz: Fuzz) -> None:
    @given(spoiled(st.sampled_from(HANDSHAKES) | packed(st.from_type(Refused)), HANDSHAKES))
    def holds(frame: bytes) -> None:
        try:
            verdict = auth.decode_from_server(frame)
            if isinstance(verdict, auth.Challenge):
                auth.answer(verdict, CREDENTIALS)
                auth.expect(verdict, CREDENTIALS)
            else:
                auth.confirm(verdict, ASKED, ANSWERED, CREDENTIALS)
                assert verdict == auth.judge(TOKEN, ASKED, ANSWERED)
        except (RemoteProtocolError, LighthouseRefused):
            pass

    fuzz(holds)


@rounds(60)
def test_no_bearer_but_the_right_ones_is_admitted(fuzz: Fuzz) -> None:
    right = (TOKEN, auth.http_key(TOKEN, "read").encode(), auth.http_key(TOKEN, "operate").encode())

    @given(spoiled(st.sampled_from(right)))
    def holds(header: bytes) -> None:
        bearer = header.decode("utf-8", "surrogateescape")  # as aiohttp reads a header
        assert auth.admits(TOKEN, bearer, "operate") == (header in (right[0], right[2]))
        assert auth.admits(TOKEN, bearer, "read") == (header in right)

    fuzz(holds)


@pytest.mark.parametrize("depth", [100, 30_000, 1 << 20])
@pytest.mark.parametrize("nest", NESTS)
def test_nesting_without_end_is_a_remote_protocol_error(nest: bytes, depth: int) -> None:
    frame = b"\x82\xa4type\xa5drain\xa1x" + nest * (min(depth, codec.FRAME_BYTES_MAX // len(nest) - 64))
    with pytest.raises(RemoteProtocolError):
        codec.decode_to_lighthouse(frame)


@pytest.mark.parametrize("huge", HUGE)
def test_a_length_that_is_a_lie_is_a_remote_protocol_error(huge: bytes) -> None:
    for key in (b"\xa1x", b"\xa6report", b"\xa5nonce"):
        with pytest.raises(RemoteProtocolError):
            codec.decode_to_lighthouse(b"\x82\xa4type\xa5hello" + key + huge)


def test_the_refusal_of_the_longest_role_fits_into_a_frame() -> None:
    asked = auth.challenge(None)
    answer = auth.Answer(asked.version, b"n" * auth.NONCE_BYTES, "job", "\x00" * 3900)
    verdict = auth.judge(None, asked, auth.decode_from_client(auth.encode(answer)))
    assert auth.decode_from_server(auth.encode(verdict)) == verdict
