"""What a fetch needs of a connection to one source, over whatever it is made."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from everstep.recovery.manifest import Manifest
from everstep.recovery.same_host import PeerMemory
from everstep.recovery.staging import Piece


class Connection(Protocol):
    """Blocking, on one thread; `shut` may come from any other. Errors: OSError and Damaged (it is made again),
    RecoveryFailed, RemoteProtocolError and ConfigError (this source serves no more).
    """

    url: str

    def shut(self) -> None:
        """Any thread: what waits raises OSError at once, and so does whatever comes."""

    def close(self) -> None: ...

    def list_fds(self) -> list[int]:
        """For the fork guard. Takes no lock."""

    def connect(self) -> None: ...

    def manifest(self, *, may_wait: bool = True) -> tuple[Manifest, str]:
        """And the snapshot's id; `may_wait`: until the source offers it."""

    def memory(self, manifest: Manifest, snapshot_id: str) -> PeerMemory | None:
        """The source's own, where it can be read from here."""

    def ask_for_chunks(self, manifest: Manifest, snapshot_id: str, chunks: range, *, with_digests: bool = True) -> None:
        """Then `receive` each of them, in order. `with_digests` False: the source need not look at what it sends."""

    def receive(self, pieces: Sequence[Piece]) -> tuple[bytes | None, bytes]:
        """One chunk into its place; returns the digest that the source sent with it, and that of what arrived."""

    def ask_for_digests(self, snapshot_id: str, chunks: range) -> None:
        """Then read `digests`."""

    def digests(self, count: int) -> Iterator[list[bytes]]:
        """In order, some at a time."""


class Run(NamedTuple):
    """What one source shall send next."""

    chunks: range
    manifest: Manifest
    snapshot_id: str
    needs_digests: bool


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which connection a fetch wants: to source `url`; `is_notary`: for its digests, beside the one for its chunks.

    `pieces_of(chunk)` is where a chunk goes, for who starts to receive one before he is asked to.
    """

    url: str
    is_notary: bool
    pieces_of: Callable[[int], list[Piece]]


Dial = Callable[[Wanted], Connection]
