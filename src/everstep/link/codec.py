"""Messages to frames and back. A frame is one WebSocket binary message: one tagged MessagePack map.

Whatever does not decode into a message of the right direction, with sane durations, is a RemoteProtocolError that
says what was wrong; its receiver drops the link and nothing else.
"""

import math
from typing import Any

import msgspec

from everstep.core.messages import ToLighthouse, ToMember, Welcome
from everstep.core.node_messages import FromNode, NodeWelcome, ToNode
from everstep.core.types import LocalProtocolError, RemoteProtocolError

# A member list of 10,000 groups takes about 1 MB.
FRAME_BYTES_MAX = 4 << 20
_REASON_CHARS_MAX = 200

_encoder = msgspec.msgpack.Encoder()
_to_lighthouse = msgspec.msgpack.Decoder(ToLighthouse)
_to_member = msgspec.msgpack.Decoder(ToMember)
_from_node = msgspec.msgpack.Decoder(FromNode)
_to_node = msgspec.msgpack.Decoder(ToNode)

LinkMessage = ToLighthouse | ToMember | FromNode | ToNode


def encode(message: LinkMessage) -> bytes:
    """One frame. A message that is too large or has no finite durations is our own bug: LocalProtocolError."""
    wrong = _wrong_duration(message)
    if wrong:
        raise LocalProtocolError(wrong)
    frame = _encoder.encode(message)
    if len(frame) > FRAME_BYTES_MAX:
        raise LocalProtocolError(f"a {type(message).__name__} of {len(frame)} bytes exceeds {FRAME_BYTES_MAX}")
    return frame


def decode_to_lighthouse(frame: bytes | bytearray | str) -> ToLighthouse:
    """What a member sent; raises RemoteProtocolError."""
    message: ToLighthouse = _decode(_to_lighthouse, frame)
    return message


def decode_to_member(frame: bytes | bytearray | str) -> ToMember:
    """What the lighthouse sent; raises RemoteProtocolError."""
    message: ToMember = _decode(_to_member, frame)
    return message


def decode_from_node(frame: bytes | bytearray | str) -> FromNode:
    """What a node sent; raises RemoteProtocolError."""
    message: FromNode = _decode(_from_node, frame)
    return message


def decode_to_node(frame: bytes | bytearray | str) -> ToNode:
    """What the lighthouse sent to a node; raises RemoteProtocolError."""
    message: ToNode = _decode(_to_node, frame)
    return message


def _decode(decoder: "msgspec.msgpack.Decoder[Any]", frame: bytes | bytearray | str) -> Any:
    if isinstance(frame, str):
        raise RemoteProtocolError(f"a text frame of {len(frame)} characters; messages are binary")
    if len(frame) > FRAME_BYTES_MAX:
        raise RemoteProtocolError(f"a frame of {len(frame)} bytes exceeds {FRAME_BYTES_MAX}")
    try:
        message = decoder.decode(frame)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        reason = str(error)[:_REASON_CHARS_MAX]
        raise RemoteProtocolError(f"an undecodable frame of {len(frame)} bytes: {reason}") from error
    wrong = _wrong_duration(message)
    if wrong:
        raise RemoteProtocolError(wrong)
    return message


def _float_fields(kinds: Any) -> dict[type, tuple[str, ...]]:
    """Every message type that carries durations, with their names: each float on the link is a duration."""
    found = {}
    for kind in kinds.__args__:
        names = tuple(f.name for f in msgspec.structs.fields(kind) if f.type is float)
        if names:
            found[kind] = names
    return found


_DURATIONS = {
    kind: names for kinds in (ToLighthouse, ToMember, FromNode, ToNode) for kind, names in _float_fields(kinds).items()
}
_NEVER_ZERO = (Welcome, NodeWelcome)


def _wrong_duration(message: LinkMessage) -> str:
    for name in _DURATIONS.get(type(message), ()):
        value = getattr(message, name)
        if not math.isfinite(value) or value < 0 or (value == 0 and isinstance(message, _NEVER_ZERO)):
            return f"{type(message).__name__}.{name} is {value}; a duration must be finite and not negative"
    return ""
