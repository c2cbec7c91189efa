"""How fast is live state over a process group? The donor's and the joiner's part of it, for live_recovery.py."""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from everstep.collectives.store import HostedStore
from everstep.core.types import QuorumId
from everstep.recovery import Arrival, InPlace, Meeting, Peer, Place, Snapshot, Transfer
from everstep.train.transports import transport_for

JOINER = Peer(rank=0, name="joiner")


class GroupDonor:
    """One a donor's process: lends its state for one transfer after the other."""

    def __init__(self) -> None:
        self._transport = transport_for("process_group")
        self._transport.open(Place(host="127.0.0.1"))
        self._key = ""

    def offer(self, state: dict[str, Any], transfer: Transfer) -> None:
        if self._key:
            self._transport.withdraw(self._key)
        self._key = transfer.key
        self._transport.offer(Snapshot.lend(state), [transfer])

    def close(self) -> None:
        self._transport.close()


class GroupJoiner:
    """Hosts the store, makes up the quorums, and fetches."""

    def __init__(self) -> None:
        self._transport = transport_for("process_group")
        self._store = HostedStore("127.0.0.1")
        self._quorums = 0

    def __enter__(self) -> "GroupJoiner":
        self._transport.open(Place(host="127.0.0.1"))
        self._store.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._transport.close()
        self._store.close()

    def fetch(self, offers: list[Callable[[Transfer], Any]], own: dict[str, Any]) -> float:
        """Seconds, the building of the group among them. Each of `offers` tells one donor about the transfer."""
        self._quorums += 1
        for rank, offer in enumerate(offers, 1):
            offer(self._transfer(rank, len(offers)))
        began_at = time.perf_counter()
        self._transport.fetch(self._transfer(0, len(offers)), Arrival(own, InPlace(own))).run()
        return time.perf_counter() - began_at

    def _transfer(self, rank: int, donors: int) -> Transfer:
        return Transfer(
            key=f"bench/{self._quorums}",
            rank=rank,
            joiner=JOINER,
            donors=tuple(Peer(rank=number, name=f"donor {number}") for number in range(1, donors + 1)),
            meeting=Meeting(quorum_id=QuorumId(1, self._quorums), store=self._store.address, prefix="bench"),
        )
