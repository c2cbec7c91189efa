"""What the agent and the template say to each other: one MessagePack map a packet, descriptors beside it.

Control socket: `Fork` (with the descriptors of a channel, and of a mutex if there is one) has no answer, the worker
reports on the channel; `Preload`, and the start, are answered by `Loaded`. On the channel the agent's word to go on
brings the descriptors of an encoded `Work`, and of the worker's stdin, stdout and stderr.
"""

import mmap
import os

import msgspec

MESSAGE_BYTES_MAX = 65536
WORK_BYTES_MAX = 16 << 20
WORK_FDS = 4


class Fork(msgspec.Struct, frozen=True, tag=True):
    """Fork a worker that does not know its work yet."""


class Preload(msgspec.Struct, frozen=True, tag=True):
    """Import this, for all workers forked from now on."""

    module: str


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """The template has started, or has imported what it was last asked for; or `error` says why not."""

    error: str = ""


class Work(msgspec.Struct, frozen=True):
    """A Launch on the wire; bytes, since an environment need not be UTF-8. A canary has no script."""

    is_canary: bool = False
    run_as: str = ""
    target: bytes = b""
    args: list[bytes] = []
    environment: dict[bytes, bytes] = {}
    cwd: bytes = b""


_encoder = msgspec.msgpack.Encoder()
_to_template = msgspec.msgpack.Decoder(Fork | Preload)
_to_agent = msgspec.msgpack.Decoder(Loaded)
_work = msgspec.msgpack.Decoder(Work)


def encode(message: Fork | Preload | Loaded) -> bytes:
    return _encoder.encode(message)


def decode_to_template(packet: bytes) -> Fork | Preload:
    message: Fork | Preload = _to_template.decode(packet)
    return message


def decode_to_agent(packet: bytes) -> Loaded:
    return _to_agent.decode(packet)


def work_to_file(work: Work) -> int:
    """A descriptor of memory that holds it: an environment is larger than a packet may be. Raises OSError."""
    fd = os.memfd_create("everstep-work", os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(fd), "wb") as file:
            file.write(_encoder.encode(work))
    except BaseException:
        os.close(fd)
        raise
    return fd


def work_from_file(fd: int) -> Work:
    """Of what `work_to_file` made. Raises OSError, ValueError."""
    size = os.fstat(fd).st_size
    if not 0 < size <= WORK_BYTES_MAX:
        raise ValueError(f"a launch of {size} bytes; at most {WORK_BYTES_MAX}")
    with mmap.mmap(fd, size, prot=mmap.PROT_READ) as view:
        return _work.decode(view[:])
