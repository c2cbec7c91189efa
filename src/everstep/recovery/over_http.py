"""The default transport: live state over HTTP, or out of the donor's memory where both ends are on one host."""

import math
from collections.abc import Sequence

from everstep.recovery.arrival import Arrival
from everstep.recovery.auth import TransferAuth
from everstep.recovery.client import Fetch
from everstep.recovery.request import FetchRequest
from everstep.recovery.server import RecoveryServer, ServerOptions
from everstep.recovery.snapshot import Snapshot
from everstep.recovery.transport import Place, Transfer


class HttpTransport:
    """A RecoveryTransport (transport.py) of RecoveryServer and Fetch."""

    name = "http"

    def __init__(self) -> None:
        self._auth: TransferAuth | None = None
        self._server: RecoveryServer | None = None

    def open(self, place: Place) -> str:
        self._auth = place.auth
        self._server = RecoveryServer(ServerOptions(auth=place.auth))
        return self._server.start(place.host, place.host)

    def offer(self, snapshot: Snapshot, transfers: Sequence[Transfer]) -> None:
        assert self._server is not None
        self._server.offer(transfers[0].key, snapshot)

    def withdraw(self, key: str) -> None:
        assert self._server is not None
        self._server.withdraw(key)

    def fetch(self, transfer: Transfer, arrival: Arrival) -> Fetch:
        first, *others = (donor.address for donor in transfer.donors)
        request = FetchRequest(
            source_url=first,
            other_urls=tuple(others),
            key=transfer.key,
            deadline=math.inf,  # a failure of a source aborts it; a slow one is waited for
            expected=arrival.expected,
            auth=self._auth,
        )
        return Fetch(request, arrival.on_progress, arrival.landing)

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
