"""Whether the hosts of the other members answer, asked while a collective takes long.

A path that loses packets in silence ends no connection for a quarter of an hour: whoever waits on it waits, and so do
all who wait for him. Nor can the lighthouse tell who it is, since all of them wait alike. But a host that lives
answers a connection attempt at once, whatever its processes do. So the one that waits calls at a port of each peer.
"""

import asyncio
import dataclasses
import errno
import ipaddress
import socket
from collections.abc import Callable, Mapping

from everstep.core.types import QuorumId

LOOK_INTERVAL_S = 0.5
PROBE_S_MIN = 3.5  # the kernel sends the first packet again after 1 s and after 3
PROBES_MAX = 64  # with more peers, those at distances of a power of two: a ring's neighbours among them
SILENT = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongWait:
    """A collective that this process is waiting in, since `since`, and where the peers' hosts listen, by rank."""

    quorum_id: QuorumId
    since: float
    waited_s: float
    patience_s: float
    rank: int
    addresses: tuple[tuple[str, int], ...]


class PathWatch:
    """On the link's loop, all of it but `close`, which comes once the loop has ended.

    `waits` says what this process waits in, if it does; `report` hears of each rank whose host does not answer.
    """

    def __init__(
        self, waits: Callable[[], LongWait | None], report: Callable[[QuorumId, Mapping[int, str]], None]
    ) -> None:
        self._waits = waits
        self._report = report
        self._loop: asyncio.AbstractEventLoop | None = None
        self._asked: LongWait | None = None  # the wait of the last probe
        self._silent: dict[int, socket.socket | None] = {}  # ranks that have not answered yet
        self._end: asyncio.TimerHandle | None = None

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        loop.call_later(LOOK_INTERVAL_S, self._look)

    def close(self) -> None:
        for sock in self._silent.values():
            if sock is not None:
                sock.close()
        self._silent.clear()

    def _look(self) -> None:
        assert self._loop is not None
        self._loop.call_later(LOOK_INTERVAL_S, self._look)
        wait = self._waits()
        if wait is None or self._end is not None:
            return
        asked = self._asked
        is_same = asked is not None and (asked.quorum_id, asked.since) == (wait.quorum_id, wait.since)
        # Twice as late each time: a long reduction is not disturbed for nothing.
        due_s = 2 * asked.waited_s if is_same and asked is not None else wait.patience_s
        if wait.waited_s >= due_s:
            self._asked = wait
            self._probe(wait)

    def _probe(self, wait: LongWait) -> None:
        assert self._loop is not None
        self._end = self._loop.call_later(max(PROBE_S_MIN, wait.patience_s), self._conclude)
        for rank in _ranks_to_ask(wait.rank, len(wait.addresses)):
            host, port = wait.addresses[rank]
            if not _is_numeric(host):
                continue  # looking a name up would block this thread
            sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
            sock.setblocking(False)
            self._silent[rank] = sock
            refusal = sock.connect_ex((host, port))
            if refusal == errno.EINPROGRESS:
                self._loop.add_writer(sock, self._answered, rank)
            else:
                self._answered(rank, refusal)

    def _answered(self, rank: int, error: int | None = None) -> None:
        """A refusal is an answer, too; so is everything else but that nobody is there."""
        sock = self._silent.pop(rank, None)
        if sock is None:
            return
        assert self._loop is not None
        self._loop.remove_writer(sock)
        if error is None:
            error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        sock.close()
        if error in SILENT:
            self._silent[rank] = None
        if not self._silent and self._end is not None:
            self._end.cancel()
            self._end = None

    def _conclude(self) -> None:
        self._end = None
        silent, self._silent = self._silent, {}
        for sock in silent.values():
            if sock is not None:
                assert self._loop is not None
                self._loop.remove_writer(sock)
                sock.close()
        wait, asked = self._waits(), self._asked
        if silent and wait is not None and asked is not None and wait.quorum_id == asked.quorum_id:
            took = f"after {wait.waited_s:.1f} s in a collective"
            self._report(
                wait.quorum_id, {rank: f"no answer from {wait.addresses[rank][0]}, {took}" for rank in sorted(silent)}
            )


def _is_numeric(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _ranks_to_ask(rank: int, size: int) -> list[int]:
    if size <= PROBES_MAX:
        return [other for other in range(size) if other != rank]
    distances = [1 << k for k in range((size - 1).bit_length())]
    return sorted({(rank + d) % size for d in distances} | {(rank - d) % size for d in distances} - {rank})
