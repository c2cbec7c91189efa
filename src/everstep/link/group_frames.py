"""The connections between a replica group's leader and its followers: one each, kept for life, never repaired.

Frames are a length (4 bytes, big endian) and a MessagePack value of core/group.py. Both ends first prove that they
know the group's key: the job token, and a secret that the leader published where the ranks found its address.

    leader    nonce
    follower  Introduction(rank, worker, ...)     mac over both nonces, the rank and the worker
    leader    mac                                 the same, under another label

A connection that ends means that the rank at its other end ended: whoever sees it hands that on, once.
"""

import socket
import struct

import msgspec

FRAME_BYTES_MAX = 16 * 1024 * 1024
HANDSHAKE_BYTES_MAX = 4096
HANDSHAKE_S = 2.0
READ_BYTES = 256 * 1024
LEADER, FOLLOWER = "everstep group leader", "everstep group follower"  # what each end signs its proof as
_LENGTH = struct.Struct(">I")
_encode = msgspec.msgpack.Encoder().encode


class Introduction(msgspec.Struct, frozen=True):
    rank: int
    nonce: bytes
    mac: str
    worker: str = ""  # the process, as its agent names it; "": no agent


def frame(message: object) -> bytes:
    payload = _encode(message)
    return _LENGTH.pack(len(payload)) + payload


class Frames:
    """Cuts a stream of bytes into payloads."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Raises ConnectionError for a frame that is too long."""
        self._bytes += data
        payloads: list[bytes] = []
        while len(self._bytes) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._bytes)
            if length > FRAME_BYTES_MAX:
                raise ConnectionError(f"a frame of {length} bytes")
            end = _LENGTH.size + length
            if len(self._bytes) < end:
                break
            payloads.append(bytes(self._bytes[_LENGTH.size : end]))
            del self._bytes[:end]
        return payloads


def read_exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = sock.recv(count - len(data))
        if not more:
            raise ConnectionResetError("closed within the handshake")
        data += more
    return data


def read_frame(sock: socket.socket) -> bytes:
    (length,) = _LENGTH.unpack(read_exactly(sock, _LENGTH.size))
    if length > HANDSHAKE_BYTES_MAX:
        raise ConnectionError(f"a handshake frame of {length} bytes")
    return read_exactly(sock, length)
