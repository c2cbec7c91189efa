"""A joiner on its donor's host reads the donor's memory: one copy instead of a socket's two, and none of its calls.

The donor says where its payload lies, to who knows the token and has the same address; the kernel lets processes of one
user read each other (process_vm_readv), unless the system forbids it: then HTTP does it. What was read counts only with
the donor's digest, as everywhere: a donor that went on in between gives none away.
"""

import bisect
import ctypes
import os
import secrets
from collections.abc import Sequence
from itertools import accumulate

import msgspec

from everstep.errors import RemoteProtocolError
from everstep.recovery.manifest import Manifest

_COOKIE_BYTES = 16
_PIECES_MAX = 1024  # of one call
_PR_SET_PTRACER = 0x59616D61

_libc = ctypes.CDLL(None, use_errno=True)


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class MemoryMap(msgspec.Struct, frozen=True, array_like=True):
    """Where a snapshot lies in process `pid`. At `cookie_at` that one, and no other of that number, has `cookie`."""

    pid: int
    cookie_at: int
    cookie: bytes
    blocks: tuple[tuple[int, int], ...]


class Readable:
    """The donor's side: this process's memory, as others may read it."""

    def __init__(self) -> None:
        self._cookie = ctypes.create_string_buffer(secrets.token_bytes(_COOKIE_BYTES), _COOKIE_BYTES)

    def show(self, blocks: Sequence[tuple[int, int]], reader_pid: int) -> bytes:
        """Encoded for the reader, who is allowed to read from now on (where Yama restricts that to children)."""
        prctl = getattr(_libc, "prctl", None)
        if prctl is not None:
            prctl(_PR_SET_PTRACER, ctypes.c_ulong(reader_pid), 0, 0, 0)  # fails where there is no Yama, and no need
        cookie_at = ctypes.addressof(self._cookie)
        return msgspec.msgpack.encode(MemoryMap(os.getpid(), cookie_at, self._cookie.raw, tuple(blocks)))


class PeerMemory:
    """The joiner's side. Raises OSError where the kernel does not allow it, or it is another host's process."""

    def __init__(self, encoded: bytes | bytearray, manifest: Manifest) -> None:
        try:
            self._map = msgspec.msgpack.decode(encoded, type=MemoryMap)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise RemoteProtocolError(f"undecodable memory map: {error}") from error
        sizes = [size for _, size in self._map.blocks]
        if any(size <= 0 for size in sizes) or sum(sizes) != manifest.total_bytes or self._map.pid <= 0:
            raise RemoteProtocolError("a memory map that is not the manifest's")
        self._begins = list(accumulate(sizes, initial=0))

    def probe(self) -> None:
        found = bytearray(_COOKIE_BYTES)
        self._read([memoryview(found)], [(self._map.cookie_at, _COOKIE_BYTES)])
        if bytes(found) != self._map.cookie:
            raise PermissionError("another process has that number here")

    def read(self, begin: int, end: int, into: list[memoryview]) -> None:
        """The payload's bytes [begin, end)."""
        at = bisect.bisect_right(self._begins, begin) - 1
        remote = []
        while begin < end:
            address, size = self._map.blocks[at]
            low = begin - self._begins[at]
            high = min(size, low + end - begin)
            remote.append((address + low, high - low))
            begin += high - low
            at += 1
        self._read([piece for piece in into if len(piece)], remote)

    def _read(self, into: list[memoryview], remote: list[tuple[int, int]]) -> None:
        """Both lists cover the same bytes; each call takes as many whole pieces of both as go into it."""
        local = [(ctypes.addressof(ctypes.c_char.from_buffer(piece)), len(piece)) for piece in into]
        while local:
            ours, theirs = local[:_PIECES_MAX], remote[:_PIECES_MAX]
            moved = _libc.process_vm_readv(
                self._map.pid,
                _vector(ours),
                ctypes.c_ulong(len(ours)),
                _vector(theirs),
                ctypes.c_ulong(len(theirs)),
                ctypes.c_ulong(0),
            )
            if moved <= 0:
                code = ctypes.get_errno()
                raise PermissionError(code, f"reading process {self._map.pid}: {os.strerror(code)}")
            local, remote = _without(local, moved), _without(remote, moved)


def _vector(pieces: list[tuple[int, int]]) -> ctypes.Array[_IoVec]:
    return (_IoVec * len(pieces))(*[_IoVec(base, length) for base, length in pieces])


def _without(pieces: list[tuple[int, int]], moved: int) -> list[tuple[int, int]]:
    for index, (base, length) in enumerate(pieces):
        if moved < length:
            return [(base + moved, length - moved), *pieces[index + 1 :]]
        moved -= length
    return []


_libc.process_vm_readv.restype = ctypes.c_ssize_t
