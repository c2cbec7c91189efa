"""Threads that copy a donor's memory chunk by chunk, several at a time: one core copies slower than memory can."""

import os
import threading
from collections.abc import Callable
from types import TracebackType

from everstep.errors import RecoveryFailed
from everstep.recovery.manifest import Manifest
from everstep.recovery.same_host import PeerMemory
from everstep.recovery.snapshot import digest_of

READERS_MAX = 4
_LOOK_S = 0.5


class Readers:
    """Context manager: reads `chunks` into their places, in order; `digest_of` waits for one. No thread outlives it."""

    def __init__(self, memory: PeerMemory, manifest: Manifest, pieces_of: Callable[[int], list[memoryview]]) -> None:
        self._memory = memory
        self._manifest = manifest
        self._pieces_of = pieces_of
        self._changed = threading.Condition()
        self._left: list[int] = []
        self._digests: dict[int, bytes] = {}
        self._failed: dict[int, Exception] = {}  # why a chunk will not come
        self._threads: list[threading.Thread] = []

    def start(self, chunks: range, count: int) -> "Readers":
        """`count`: threads."""
        self._left = list(chunks)[::-1]
        for _ in range(min(count, len(chunks))):
            thread = threading.Thread(target=self._run, name="everstep-fetch-memory", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                raise RecoveryFailed(f"no thread to read a donor's memory with: {error}") from error
            self._threads.append(thread)
        return self

    def digest_of(self, chunk: int) -> bytes:
        """Of what was read. Raises PermissionError where the kernel no longer lets us."""
        with self._changed:
            while chunk not in self._digests:
                if chunk in self._failed:
                    raise self._failed[chunk]
                self._changed.wait(_LOOK_S)
            return self._digests.pop(chunk)

    def __enter__(self) -> "Readers":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        with self._changed:
            self._left = []
        for thread in self._threads:
            thread.join()
        self._failed.clear()  # an error that was raised holds its frames, and they this

    def _run(self) -> None:
        while (chunk := self._next()) is not None:
            self._read(chunk)

    def _read(self, chunk: int) -> None:
        try:
            pieces = self._pieces_of(chunk)
            self._memory.read(*self._manifest.chunk_range(chunk), pieces)
            digest = digest_of(pieces)
        except Exception as error:  # boundary of a thread: raised where the chunk is waited for
            error.with_traceback(None)  # its frames hold the memory that is read into
            with self._changed:
                self._failed |= dict.fromkeys((chunk, *self._left), error)  # what others are reading may still come
                self._left = []
                self._changed.notify_all()
            return
        with self._changed:
            self._digests[chunk] = digest
            self._changed.notify_all()

    def _next(self) -> int | None:
        with self._changed:
            return self._left.pop() if self._left else None


def reader_count(donors: int) -> int:
    """For one of so many donors: all of them together keep this process's cores busy, or READERS_MAX of them."""
    return max(1, min(READERS_MAX, len(os.sched_getaffinity(0))) // donors)
