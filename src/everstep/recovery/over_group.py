"""The transport over a process group: live state by sends and receives, on a group of donors and joiner alone."""

import math
import threading
from collections.abc import Callable, Sequence

import torch

from everstep.errors import LocalProtocolError, RecoveryFailed, StepInterrupted
from everstep.recovery.arrival import Arrival
from everstep.recovery.auth import TransferAuth
from everstep.recovery.client import Fetch
from everstep.recovery.connection import Connection, Wanted
from everstep.recovery.giving import Gift, Giving
from everstep.recovery.manifest import Limits
from everstep.recovery.peers import Peers
from everstep.recovery.report import FetchReport
from everstep.recovery.request import FetchRequest
from everstep.recovery.snapshot import Snapshot
from everstep.recovery.staging import Staging
from everstep.recovery.taking import DonorConnection, Taken
from everstep.recovery.transport import Place, Transfer

SETTLE_S = 30.0  # it takes milliseconds, and a third of a second where Gloo does not close a connection
DEVICE_BYTES_MIN = 64 << 20  # building lane DEVICE takes some tenths of a second
STALL_S = 15.0  # a donor that says nothing for so long has stopped
_JOIN_S = 5.0

MakePeers = Callable[[Place, Transfer, int], Peers]


class GroupTransport:
    """A RecoveryTransport (transport.py). `make_peers(place, transfer, number)` makes this member's part in a group.

    A group for each joiner: what becomes of one is no matter of the other's.
    """

    name = "process_group"

    def __init__(
        self,
        make_peers: MakePeers,
        check_place: Callable[[Place], None],
        *,
        stage: Callable[[torch.device], Staging] = Staging,
        device_bytes_min: int = DEVICE_BYTES_MIN,
    ) -> None:
        """`check_place` raises ConfigError where groups may not be opened; `stage` is for a joiner's device."""
        self._make_peers = make_peers
        self._check_place = check_place
        self._stage = stage
        self.device_bytes_min = device_bytes_min
        self._place: Place | None = None
        self._givings: list[Giving] = []
        self._closing: list[threading.Thread] = []

    def open(self, place: Place) -> str:
        self._check_place(place)
        self._place = place
        return ""

    def offer(self, snapshot: Snapshot, transfers: Sequence[Transfer]) -> None:
        assert self._place is not None
        self._givings = [giving for giving in self._givings if not giving.has_ended]
        for transfer in transfers:
            number = 1 + [donor.rank for donor in transfer.donors].index(transfer.rank)
            gift = Gift(
                snapshot=snapshot,
                key=transfer.key,
                joiner=transfer.joiner.name,
                donor=number,
                has_notary=len(transfer.donors) > 1,
                auth=self._place.auth,
            )
            giving = Giving(self._make_peers(self._place, transfer, number), gift)
            self._givings.append(giving)
            giving.start()

    def withdraw(self, key: str) -> None:
        for giving in self._givings:
            if giving.key == key:
                giving.abort()

    def fetch(self, transfer: Transfer, arrival: Arrival) -> "GroupFetch":
        assert self._place is not None
        peers = self._make_peers(self._place, transfer, 0)
        if peers.device is not None:
            arrival.landing.staging = self._stage(peers.device)
        return GroupFetch(peers, transfer, arrival, self)

    @property
    def auth(self) -> TransferAuth | None:
        return self._place.auth if self._place is not None else None

    def close_aside(self, peers: Peers) -> None:
        """What takes a while, and nobody waits for."""
        self._closing = [thread for thread in self._closing if thread.is_alive()]
        thread = threading.Thread(target=peers.close, name="everstep-recovery-close", daemon=True)
        self._closing.append(thread)
        thread.start()

    def close(self) -> None:
        for giving in self._givings:
            giving.abort()
        for giving in self._givings:
            giving.join(_JOIN_S)
        for thread in self._closing:
            thread.join(_JOIN_S)


class GroupFetch:
    """One attempt; a Fetching (transport.py)."""

    def __init__(self, peers: Peers, transfer: Transfer, arrival: Arrival, transport: GroupTransport) -> None:
        self._peers = peers
        self._transport = transport
        self._members = members = tuple(peer.name for peer in (transfer.joiner, *transfer.donors))
        self._is_aborted = False
        auth, limits, staging = transport.auth, Limits(), arrival.landing.staging

        def dial(wanted: Wanted) -> Connection:  # holds nothing of the fetch, which holds it
            taken = Taken(
                members=members,
                donor=members.index(wanted.url),
                key=transfer.key,
                auth=auth,
                limits=limits,
                stall_s=STALL_S,
                staging=staging,
                device_bytes_min=transport.device_bytes_min,
            )
            return DonorConnection(peers, taken, wanted)

        _, first, *others = members
        request = FetchRequest(
            source_url=first,
            other_urls=tuple(others),
            key=transfer.key,
            deadline=math.inf,  # a failure of a donor aborts it; a slow one is waited for
            stall_timeout_s=STALL_S,
            limits=limits,
            expected=arrival.expected,
            auth=auth,
            dial=dial,
        )
        self._fetch = Fetch(request, arrival.on_progress, arrival.landing)

    @property
    def report(self) -> FetchReport:
        return self._fetch.report

    def run(self) -> dict[str, object]:
        try:
            self._connect()
            return self._fetch.run()
        finally:
            self._peers.abort()
            has_settled = self._peers.settle(SETTLE_S)
            self._transport.close_aside(self._peers)
            if not has_settled:
                raise LocalProtocolError("a transfer that has ended still writes to this process's memory")

    def abort(self) -> None:
        self._is_aborted = True
        self._fetch.abort()
        self._peers.abort()

    def _connect(self) -> None:
        try:
            self._peers.connect()
        except StepInterrupted as error:
            if self._is_aborted:
                raise
            raise RecoveryFailed(f"no group with {', '.join(self._members[1:])}: {error}") from error
        for name in self._members[1:]:
            self.report.transport[name] = GroupTransport.name
