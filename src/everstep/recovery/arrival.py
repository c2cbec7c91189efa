"""A state as it arrives at a joiner, chunk by chunk: what a transport of one's own fills and has verified."""

import time
from collections.abc import Mapping

from everstep.errors import RecoveryFailed
from everstep.recovery.assembly import Assembly, plain_leaf
from everstep.recovery.fit import check_fit
from everstep.recovery.landing import Landing
from everstep.recovery.manifest import Limits, build, decode
from everstep.recovery.report import FetchReport
from everstep.recovery.request import SAME_KEYS_UNDER, Progress
from everstep.recovery.snapshot import digest_of


class Arrival:
    """Fill it: `begin` with one donor's manifest, each `chunk`, each `landed`, then take `state`. One thread at a time.

    All chunks' digests must be of the donor whose manifest it is: the states of two donors are not the same in every
    byte (random number generators are each one's own). The bytes may come from any.

    `expected` is this member's own state; `landing` says where in memory the peer's comes to lie: in the member's own
    tensors, as a rule; they hold neither state meanwhile. `on_progress(bytes_done, bytes_total)` must not block.
    """

    def __init__(self, expected: Mapping[str, object], landing: Landing, on_progress: Progress | None = None) -> None:
        self.expected = expected
        self.landing = landing
        self.on_progress = on_progress
        self.report = FetchReport()
        self._assembly: Assembly | None = None
        self._chunks: list[list[memoryview]] = []
        self._is_missing: list[bool] = []

    @property
    def chunk_count(self) -> int:
        return len(self._chunks)

    def begin(self, manifest: bytes) -> None:
        """Take the memory that it needs. Raises RemoteProtocolError unless sound, StateMismatch unless it fits."""
        said = decode(manifest, Limits())
        check_fit(build(said, plain_leaf), self.expected, SAME_KEYS_UNDER)
        try:
            self._assembly = Assembly(said, self.landing, self.expected)
        except (RuntimeError, MemoryError) as error:  # torch's allocator raises RuntimeError
            raise RecoveryFailed(f"no memory for a state of {said.total_bytes} bytes: {error}") from error
        self._chunks = list(self._assembly.chunks())
        self._is_missing = [True] * len(self._chunks)
        self.report.total_bytes, self.report.prepared_at = said.total_bytes, time.monotonic()

    def chunk(self, index: int) -> list[memoryview]:
        """The pieces of memory for its bytes, one after another, writable."""
        return self._chunks[index]

    def landed(self, index: int, digest: bytes) -> bool:
        """Whether what lies there has the donor's digest (`Snapshot.digest`); if not it is counted: fetch it again."""
        if digest_of(self._chunks[index]) != digest:
            self.report.digest_errors += 1
            return False
        if self._is_missing[index]:
            self._is_missing[index] = False
            self.report.done_bytes += sum(map(len, self._chunks[index]))
            if self.on_progress is not None:
                self.on_progress(self.report.done_bytes, self.report.total_bytes)
        return True

    def state(self) -> dict[str, object]:
        """All of it; RecoveryFailed while a chunk has not landed."""
        if self._assembly is None or any(self._is_missing):
            raise RecoveryFailed(f"{sum(self._is_missing)} of {len(self._chunks)} chunks have not landed")
        return self._assembly.tree()

    def discard(self) -> None:
        """After a failure: its memory may be used again. Nothing may write there any more."""
        if self._assembly is not None:
            self._assembly.discard()
            self._assembly = None
