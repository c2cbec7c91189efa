"""How live state gets from donors to a joiner: the protocol of every transport, ours and yours.

    donor                                          joiner
    open(place) -> where it is reached             open(place)
    offer(snapshot, transfers)                     fetch(transfer, arrival).run() -> the state
       ... every joiner has said that it has it ...
    withdraw(key)
    close()                                        close()

Each member tells the others, when a quorum forms, which transport it uses (`name`, the same on all) and where it is
reached. docs/recovery.md has an example of one's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from everstep.core.types import QuorumId
from everstep.recovery.arrival import Arrival
from everstep.recovery.auth import TransferAuth
from everstep.recovery.report import FetchReport
from everstep.recovery.snapshot import Snapshot


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where this process is. `host` is its address for the other groups; `auth` signs with the job token, None without.

    `timeout_s` bounds the building of connections (`collective_timeout_s`).
    """

    host: str
    auth: TransferAuth | None = None
    timeout_s: float = 300.0


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A member of the quorum. `address` is what its transport's `open` returned."""

    rank: int
    name: str
    address: str = ""


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """How members find each other without addresses: in the quorum's store (`host:port`), under names of their own."""

    quorum_id: QuorumId
    store: str
    prefix: str


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """One joiner and its donors, as each of them computes it: the same at all ends, but for the member's own `rank`.

    `key` names the state and the quorum, for ever: a transfer that failed comes again under another one. The first of
    the donors is the one to ask first; no two joiners have to begin with the same.
    """

    key: str
    rank: int
    joiner: Peer
    donors: tuple[Peer, ...]
    meeting: Meeting


class Fetching(Protocol):
    """One attempt."""

    @property
    def report(self) -> FetchReport:
        """How it goes, and went. Any thread."""

    def run(self) -> dict[str, object]:
        """Block until the state is here: `arrival.state()`, which has every chunk verified. The training thread, once.

        Raises StepInterrupted after `abort`; RecoveryFailed for what may go better next time; StateMismatch or
        ConfigError for good. Whatever it raises or returns, from then on nothing writes to the arrival's memory.
        """

    def abort(self) -> None:
        """Make `run` raise within milliseconds, or as soon as it is called. Any thread, at any time; must not block."""


@runtime_checkable
class RecoveryTransport(Protocol):
    """One object a process; only `Fetching.abort` is called by others than the training thread.

    What a donor offers is lent (snapshot.py): it keeps still until all joiners have said that they have the state, or
    somebody died. Then it revokes the snapshot, withdraws, and goes on, whatever is still being read. So give a
    chunk's digest away only after a look at `snapshot.is_revoked` that follows the last read of the chunk.
    """

    @property
    def name(self) -> str:
        """The same on all members of the job; at most 64 characters."""

    def open(self, place: Place) -> str:
        """Once, before the process joins. Returns where it is reached, at most 200 characters; ConfigError if nowhere.

        Whoever is let in must know the job token; without one let nobody in but this host.
        """

    def offer(self, snapshot: Snapshot, transfers: Sequence[Transfer]) -> None:
        """Serve it, from threads of the transport's own, to the joiners of these transfers, which share one key.

        Returns at once. Nothing is reported back: a joiner that is not served fails, and says so to all.
        """

    def withdraw(self, key: str) -> None:
        """Serve it no more; the snapshot is revoked already. Returns at once, whatever a reader does."""

    def fetch(self, transfer: Transfer, arrival: Arrival) -> Fetching:
        """An attempt to get the state into `arrival`. Moves nothing before its `run`."""

    def close(self) -> None:
        """End every thread and connection. May be called twice, and without `open`."""
