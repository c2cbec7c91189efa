"""Frames: every message survives the trip, and nothing else is let through."""

import math

import msgspec
import pytest

from everstep.core.messages import (
    Cause,
    Drain,
    Failed,
    Goodbye,
    Grant,
    Heartbeat,
    MembersChange,
    Notice,
    Ready,
    Refused,
    ToLighthouse,
    ToMember,
    Waiting,
    Welcome,
)
from everstep.core.recovery_report import RecoveryReport
from everstep.core.types import (
    Action,
    FailureRound,
    LocalProtocolError,
    Member,
    MemberId,
    QuorumId,
    RefusalCode,
    RemoteProtocolError,
)
from everstep.link import codec
from tests.link.parties import hello

A = MemberId("a", 3)
FETCHING = Heartbeat(recovery=RecoveryReport(quorum_id=QuorumId(1, 2), step=3, donors=("b#2",), done_bytes=1 << 40))


@pytest.mark.parametrize(
    "message",
    [
        FETCHING,
        hello(),
        Ready(FailureRound(1, 2), hello().report),
        Failed(QuorumId(1, 2), A, "reset"),
        Drain(),
        Goodbye("done"),
    ],
)
def test_a_members_message_survives_the_trip(message: ToLighthouse) -> None:
    assert codec.decode_to_lighthouse(codec.encode(message)) == message


@pytest.mark.parametrize(
    "message",
    [
        Welcome(A, "lh", 0.5, 2.0),
        Notice(FailureRound(1, 2), (A,), Cause.SILENT, "nothing heard"),
        Grant(FailureRound(1, 2), QuorumId(1, 3), MembersChange(None, (), (Member(A),)), 7, 0, Action.COMMIT),
        Refused(RefusalCode.EVICTED, "left out", A, 4),
    ],
)
def test_a_lighthouses_message_survives_the_trip(message: ToMember) -> None:
    assert codec.decode_to_member(codec.encode(message)) == message


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0])
def test_a_duration_that_is_none_is_refused_in_both_directions(value: float) -> None:
    beat = Heartbeat(activity_s=value)
    with pytest.raises(LocalProtocolError, match=r"Heartbeat\.activity_s"):
        codec.encode(beat)
    with pytest.raises(RemoteProtocolError, match=r"Heartbeat\.activity_s is .*finite"):
        codec.decode_to_lighthouse(msgspec.msgpack.encode(beat))
    with pytest.raises(RemoteProtocolError, match=r"Welcome\.heartbeat_timeout_s"):
        codec.decode_to_member(msgspec.msgpack.encode(Welcome(A, "lh", 1.0, value)))


def test_a_heartbeat_interval_of_zero_is_refused_since_its_receiver_would_spin() -> None:
    with pytest.raises(RemoteProtocolError, match=r"Welcome\.heartbeat_interval_s is 0"):
        codec.decode_to_member(msgspec.msgpack.encode(Welcome(A, "lh", 0.0, 1.0)))


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xc1",
        b"not msgpack",
        msgspec.msgpack.encode({"type": "no such message"}),
        msgspec.msgpack.encode({"type": "ready", "round": "x"}),
        msgspec.msgpack.encode({"type": "hello", "report": 1, "nonce": b"\xff"}),
        msgspec.msgpack.encode(Waiting("of the other direction")),
        b"\x82\xa4type\xa5drain\xa1x" + b"\x91" * 100_000,
    ],
)
def test_what_is_no_message_is_a_remote_protocol_error_that_names_the_fault(frame: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match=f"undecodable frame of {len(frame)} bytes: ."):
        codec.decode_to_lighthouse(frame)


def test_a_text_frame_is_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="text"):
        codec.decode_to_member("hello")


def test_a_frame_above_the_limit_is_refused_in_both_directions() -> None:
    size = codec.FRAME_BYTES_MAX + 1
    with pytest.raises(RemoteProtocolError, match=f"{size} bytes exceeds"):
        codec.decode_to_member(b"\0" * size)
    with pytest.raises(LocalProtocolError, match=r"Waiting of .* bytes exceeds"):
        codec.encode(Waiting("x" * size))


def test_a_key_that_this_release_does_not_know_is_ignored() -> None:
    assert codec.decode_to_lighthouse(msgspec.msgpack.encode({"type": "drain", "haste": 1})) == Drain()
