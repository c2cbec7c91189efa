"""A group's rendezvous as its agent uses it: calls that never block, and events that come from two threads of its own.

One thread waits: for the next round, then for news about it. The other one closes and leaves, which takes round trips.
"""

import dataclasses
import json
import logging
import queue
import socket
import threading
from collections.abc import Callable
from urllib.parse import urlsplit

from everstep.config import is_loopback
from everstep.core.node_messages import CloseScope, NodeHealth, RoundInfo
from everstep.core.ranks import NodeRole, WorkerRanks, worker_ranks
from everstep.core.restart_events import (
    Closed,
    Evicted,
    Joined,
    JoinFailed,
    LinkChanged,
    NodesWait,
    RestartEvent,
    RoundOver,
)
from everstep.core.restart_policy import CODE_CONFIGURATION, CODE_DRAINED, CODE_FAILED, CODE_UNREACHABLE
from everstep.errors import (
    ConfigError,
    EverstepError,
    LighthouseRefused,
    LighthouseUnreachable,
    NodeEvicted,
    NodeExcluded,
    RendezvousEnded,
    RendezvousTimedOut,
    RoundStoreError,
)
from everstep.launcher.settings import JobSettings
from everstep.launcher.starting import WorkerNotStarted
from everstep.link.node import NodeClient

__all__ = ["GroupRendezvous", "Round", "address_for_store", "free_address"]

REASON_CHARS_MAX = 1000
CLOSE_S = 2.0
WATCH_S = 3600.0  # of waiting for news; then again
LEAVE_S = 10.0
READY_S = 0.25  # of waiting for workers to be startable; then a look at whether this leaves, and again

log = logging.getLogger("everstep.launcher")


@dataclasses.dataclass(frozen=True)
class Round:
    """A completed round, and this node's workers' ranks in it. Goes out before its Joined event."""

    group: str
    info: RoundInfo
    ranks: WorkerRanks


class GroupRendezvous:
    """`open_store` is called on a thread of this: it opens the workers' store and returns host:port.

    `is_ready` waits for so many seconds at most until workers can be started.
    """

    def __init__(
        self,
        group: str,
        client: NodeClient,
        settings: JobSettings,
        open_store: Callable[[], str],
        is_ready: Callable[[float], bool],
        tell: Callable[[RestartEvent | Round], None],
    ) -> None:
        self.group = group
        self.client = client
        self._settings = settings
        self._open_store = open_store
        self._is_ready = is_ready
        self._tell = tell
        self._wanted: queue.SimpleQueue[int | None] = (
            queue.SimpleQueue()
        )  # restarts known, of the next round; None: end
        self._orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._is_leaving = False
        self._threads = [
            threading.Thread(target=self._wait, name=f"everstep-rounds-{group}", daemon=True),
            threading.Thread(target=self._obey, name=f"everstep-orders-{group}", daemon=True),
        ]

    def start(self) -> None:
        self.client.start()
        for thread in self._threads:
            thread.start()

    def join_next(self, restarts: int) -> None:
        self._wanted.put(restarts)
        self.client.poke()

    def stand(self, health: NodeHealth) -> None:
        self.client.stand(health)

    def close(self, reason: str) -> None:
        """For all nodes; `leave` comes after it."""
        self._orders.put(lambda: self._close_now(reason[:REASON_CHARS_MAX]))

    def leave(self, reason: str) -> None:
        """For good; nothing is told any more."""
        self._is_leaving = True
        self._orders.put(lambda: self.client.shutdown(reason[:REASON_CHARS_MAX]))
        self._orders.put(None)
        self._wanted.put(None)
        self.client.poke()

    def wait_left(self) -> None:
        for thread in self._threads:
            thread.join(LEAVE_S)

    # ---- the thread that obeys

    def _obey(self) -> None:
        while (order := self._orders.get()) is not None:
            order()

    def _close_now(self, reason: str) -> None:
        if not self.client.close(CloseScope.JOB, reason, CLOSE_S):
            log.warning("rendezvous not closed group=%r: the lighthouse cannot be reached", self.group)

    # ---- the thread that waits

    def _wait(self) -> None:
        while not self._is_leaving:
            restarts = self._wanted.get()
            if restarts is None:
                return
            self._await_ready()
            try:
                info = self.client.next_round(self._open_store, restarts)
                ranks = self._numbered(info)
            except RoundStoreError as error:
                self._say(RoundOver(self.group, str(error)))
                continue
            except (EverstepError, WorkerNotStarted) as error:
                self._say(self._as_event(error))
                continue
            self._say(Round(self.group, info, ranks))
            self._say(Joined(self.group, info.restarts, info.size))
            self._watch(info)

    def _await_ready(self) -> None:
        """A round gives its node some seconds to open the store, which loading torch may outlast.

        Where nodes may come late, though, the round's last call goes on meanwhile.
        """
        if self._settings.min_nodes == self._settings.max_nodes:
            while not self._is_leaving and not self._is_ready(READY_S):
                pass

    def _say(self, event: RestartEvent | Round) -> None:
        if not self._is_leaving:
            self._tell(event)

    def _as_event(self, error: Exception) -> RestartEvent:
        match error:
            case RendezvousEnded(was_spare=was_spare):
                return Closed(self.group, str(error), was_spare)
            case NodeEvicted():
                return Evicted(self.group, str(error))
            case NodeExcluded():
                return JoinFailed(self.group, CODE_DRAINED, str(error))
            case LighthouseUnreachable():
                return JoinFailed(self.group, CODE_UNREACHABLE, str(error))
            case LighthouseRefused() | ConfigError():
                return JoinFailed(self.group, CODE_CONFIGURATION, str(error))
            case RendezvousTimedOut():
                return JoinFailed(self.group, CODE_FAILED, str(error))
        return JoinFailed(self.group, CODE_FAILED, str(error))

    def _numbered(self, info: RoundInfo) -> WorkerRanks:
        """As torchrun's agents: each says what it runs, the first one numbers all. Raises RoundStoreError."""
        mine = NodeRole(role=self._settings.role, local_world_size=self._settings.nproc_per_node)
        if info.size == 1:
            return worker_ranks([mine])[0]
        store = self.client.store(info)
        store.set(f"role/{info.rank}", json.dumps([mine.role, mine.local_world_size]).encode())
        if info.rank == 0:
            told = [json.loads(value) for value in store.multi_get([f"role/{rank}" for rank in range(info.size)])]
            ranks = worker_ranks([NodeRole(role=role, local_world_size=size) for role, size in told])
            values = [json.dumps(dataclasses.asdict(each)).encode() for each in ranks]
            store.multi_set([f"ranks/{rank}" for rank in range(info.size)], values)
        return WorkerRanks(**json.loads(store.get(f"ranks/{info.rank}")))

    def _watch(self, info: RoundInfo) -> None:
        """Tell what becomes of this round, until it is over or the next is wanted."""
        was_open, were_waiting, is_closed = True, False, False
        while True:
            news = _News()

            def has_news(
                client: NodeClient,
                news: "_News" = news,
                known: tuple[bool, bool, bool] = (was_open, were_waiting, is_closed),
            ) -> bool:
                news.look(client, info)
                return news.is_over or (news.is_open, news.are_waiting, news.is_closed) != known or self._is_wanted

            self.client.wait_changed(has_news, WATCH_S)
            if self._is_wanted:
                return
            if news.is_open != was_open:
                self._say(LinkChanged(self.group, news.is_open))
            if news.are_waiting and not were_waiting:
                self._say(NodesWait(self.group))
            if news.is_closed and not is_closed:
                closed = self.client.closed
                self._say(Closed(self.group, closed.reason if closed is not None else ""))
            if news.is_over:
                self._say(Evicted(self.group, news.why) if news.is_evicted else RoundOver(self.group, news.why))
                return
            was_open, were_waiting, is_closed = news.is_open, news.are_waiting, news.is_closed

    @property
    def _is_wanted(self) -> bool:
        return self._is_leaving or not self._wanted.empty()


@dataclasses.dataclass
class _News:
    """What a round's watcher looks at; under the client's lock."""

    is_open: bool = True
    are_waiting: bool = False
    is_closed: bool = False
    is_over: bool = False
    is_evicted: bool = False
    why: str = ""

    def look(self, client: NodeClient, info: RoundInfo) -> None:
        try:
            self.is_open = client.is_open
            self.are_waiting = client.waiting > 0
            closed = client.closed
            self.is_closed = closed is not None and closed.scope is CloseScope.JOB
            if not client.is_in(info):
                self.is_over, self.why = True, client.why_dissolved or "its round is over"
        except EverstepError as error:
            # NodeEvicted, or the link has failed for good, for which there is no next round either.
            self.is_over, self.is_evicted, self.why = True, isinstance(error, NodeEvicted), str(error)


def address_for_store(settings: JobSettings, lighthouse: str, link_address: str) -> str:
    """Where the other nodes' workers reach a store on this node. `link_address`: its own, towards the lighthouse."""
    if settings.local_addr:
        return settings.local_addr
    if settings.max_nodes == 1 or is_loopback(urlsplit(lighthouse).hostname or ""):
        return "127.0.0.1"
    if link_address and not is_loopback(link_address):
        return link_address
    return socket.getfqdn()  # the lighthouse is on this very host


def free_address(host: str) -> str:
    """For a store that the workers' rank 0 opens itself."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
        sock.bind(("", 0))
        port = sock.getsockname()[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
