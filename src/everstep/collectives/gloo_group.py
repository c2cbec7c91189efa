"""One quorum's Gloo group: built on a thread of its own, severed by its sockets, taken down without a trace.

Gloo's own abort does nothing, and torch names none of the sockets it opens. But each group listens on a port of its
own; every connection of it is either accepted there or leads to where a peer listens, and the peers tell each other
through the store. So the group's sockets are known exactly, whatever else the process opens at the same time.
"""

import contextlib
import json
import logging
import re
import socket
import struct
import threading
import time

import torch
from torch import Tensor

from everstep.collectives import torch_private
from everstep.collectives.epolls import leave_alone
from everstep.collectives.fate import GroupFate
from everstep.collectives.gloo_threads import sleep_of, thread_ids
from everstep.collectives.gloo_work import Alone, GlooWork, free_parked, park
from everstep.collectives.process_group import Membership, ReduceOp
from everstep.collectives.sockets import (
    Address,
    Ends,
    OpenSocket,
    close_on_exec,
    ends_of,
    find_lasting,
    find_sockets,
    has_peer_gone,
    host_and_port,
    is_emptied,
    is_open,
    joined,
    open_recognised,
    open_sockets,
    route_to,
    sever,
)
from everstep.collectives.store_client import StoreClient, connect_store
from everstep.errors import ConfigError, PeerLost, StepInterrupted

SETTLE_TIMEOUT_S = 10.0
# Severing ends an operation in milliseconds. One that goes on for so long keeps its tensor, and the member goes on;
# well before others take it for hung.
GIVE_UP_AFTER_S = 3.0
# How long a severed connection stays open for what peers still send into it, until they are told, too.
LINGER_S = 0.1
# Gloo closes a severed connection at once, or is never going to (`_are_emptied`).
CLOSES_WITHIN_S = 0.3
# A member that has its result may leave; what it sent is on its way to the others for a moment longer.
CLOSED_GRACE_S = 0.1
# Gloo closes a connection that its peer has ended as soon as it has read what came before, or is never going to.
GONE_GRACE_S = 0.5

_log = logging.getLogger(__name__)

HELPER_NAME = "everstep-gloo"
_OPTIONS = {op: torch_private.allreduce_options(op) for op in ReduceOp}
_PEER_IN_ERROR = re.compile(r"\[([0-9a-fA-F.:]+)\]:(\d+)")


class GlooGroup(GroupFate[GlooWork]):
    """The group of one membership. `build` runs on a helper thread; `condemn` and `cut` may be called from any."""

    def __init__(self, membership: Membership, bind_host: str | None, threads: int) -> None:
        super().__init__(membership)
        self._bind_host = bind_host
        self._threads = threads
        self._gloo: torch_private.TorchGloo | None = None
        self._device: torch_private.GlooDevice | None = None
        self._client: StoreClient | None = None
        self._listening: OpenSocket | None = None
        self._listener: Address | None = None
        self._peers: dict[Address, int] = {}  # where each peer listens
        self._has_knocked = False
        self._connections: list[OpenSocket] = []  # complete once built
        self._rank_at: dict[Address, int] = {}  # the far end of each connection
        self._rank_of: dict[OpenSocket, int] = {}
        self._cut_at: float | None = None
        self._closed_at: float | None = None  # since when a connection is known to be closed
        self._new_threads: list[int] = []  # Gloo's for this group among them
        self._sleeps_seen: list[str] = []  # at the last look
        self._has_given_up = False
        self._stuck: list[torch_private.TorchWork] = []
        self._kept: list[socket.socket] = []  # what severing keeps open for a while
        self._linger: threading.Timer | None = None
        self._cutting = threading.Lock()

    @property
    def is_usable(self) -> bool:
        return self._gloo is not None and not self.is_severed

    # ---- operations

    def allreduce(self, tensor: Tensor, op: ReduceOp) -> GlooWork:
        gloo = self._gloo
        if gloo is None or self._failure is not None:
            raise self.failure()
        work = GlooWork(self, gloo.allreduce([tensor], _OPTIONS[op]))
        self._note(work)
        return work

    def allgather(self, tensor: Tensor) -> Tensor:
        gloo = self._gloo
        if gloo is None or self._failure is not None:
            raise self.failure()
        gathered = torch.empty((self.membership.size, *tensor.shape), dtype=tensor.dtype, device=tensor.device)
        work = GlooWork(self, torch_private.gather_into(gloo, gathered, tensor))
        self._note(work)
        work.wait()
        return gathered

    def lost_by(self, error: str) -> BaseException:
        """What an operation's error means; the first such is what every later operation raises."""
        if "gloo/" not in error:  # not of the transport: a tensor that cannot be reduced, say
            return RuntimeError(error)
        if self._failure is None:
            self._failure = self._translated(error)
        return self.failure()

    # ---- severing and taking down

    def cut(self, *, is_idle: bool = False) -> None:
        """Sever a condemned group; one that is being built opens more sockets, so repeat until it has `ended`.

        An idle one ends at once; otherwise peers get LINGER_S to be told, before their sends into it fail.
        """
        with self._cutting:
            self._cut_at = self._cut_at or time.monotonic()
            if self.ended.is_set():
                self._kept += sever(self._connections)
            else:
                self._kept += sever(find_sockets(self._is_connection))
                self._knock()
            if self._client is not None:
                self._client.sever()
            if is_idle:
                self._let_go()
            elif self._kept and self._linger is None:
                self._linger = threading.Timer(LINGER_S, self._let_go)
                self._linger.daemon = True
                self._linger.name = HELPER_NAME
                self._linger.start()

    def _let_go(self) -> None:
        while self._kept:
            self._kept.pop().close()

    def is_stuck(self) -> bool:
        """Whether its operations sleep for good (see gloo_work). Ask some milliseconds apart: it compares two looks."""
        if not self.is_severed or not self.ended.is_set():
            return False
        still_open = [c for c in self._connections if is_open(c)]
        if still_open and not self._are_emptied(still_open):
            return False
        look = [sleep for thread in self._new_threads if (sleep := sleep_of(thread)) is not None]
        is_same = look == self._sleeps_seen and all(look)
        self._sleeps_seen = look
        if not look or not is_same:
            return False
        leave_alone(still_open)  # or Gloo's device thread would look at them without a pause until they are freed
        return True

    def _are_emptied(self, still_open: list[OpenSocket]) -> bool:
        """Connections that Gloo reads no more, and so never closes. Nothing can come out of them any more.

        A pair that has received part of a message for an operation that has failed meanwhile, because of another
        peer, finds its buffer gone at each look, and gives up before it would see the end of the connection (torch
        2.13, pair.cc, prepareRead). Whoever waits on that pair sleeps for good.
        """
        if self._cut_at is None or time.monotonic() - self._cut_at < CLOSES_WITHIN_S:
            return False
        emptied = [is_emptied(c) for c in still_open]
        return all(emptied)

    def watch(self) -> None:
        """While an operation waits: a connection that Gloo has closed means that the group is lost, all of it.

        Gloo itself tells only the operations that wait on that very connection, and not always those.
        """
        if self.is_severed:
            return
        closed = next((c for c in self._connections if not is_open(c)), None)
        grace_s = CLOSED_GRACE_S
        if closed is None:
            closed, grace_s = next((c for c in self._connections if has_peer_gone(c)), None), GONE_GRACE_S
        now = time.monotonic()
        if closed is None or self._closed_at is None:
            self._closed_at = None if closed is None else now
        elif now - self._closed_at >= grace_s:
            rank = self._rank_of.get(closed)
            who = "a member" if rank is None else f"rank {rank}"
            self.condemn(PeerLost(f"quorum {self.membership.quorum_id}: {who} closed its connection", rank))
            self.cut()

    def park(self, work: torch_private.TorchWork) -> None:
        self._stuck.append(work)

    def fds(self) -> list[int]:
        """Every socket of the group that is open now, the listener too. Takes no lock: a forked child calls it."""
        known = [self._listening] if self._listening is not None else []
        known += self._connections if self.ended.is_set() else find_sockets(self._is_connection)
        pythons = [kept.fileno() for kept in self._kept]
        if self._client is not None:
            pythons.append(self._client.fileno())
        return [opened.fd for opened in known if is_open(opened)] + [fd for fd in pythons if fd >= 0]

    def keep(self) -> None:
        """In a forked child: never free torch's group, which would join threads that are the parent's alone."""
        if self._gloo is not None:
            torch_private.keep_beyond_exit(self._gloo)

    def drain(self, deadline: float) -> bool:
        """Wait until no operation of a severed group can touch its tensor any more; False when `deadline` passed."""
        if self._cut_at is not None:
            deadline = min(deadline, self._cut_at + GIVE_UP_AFTER_S)
        return all(work.settle(deadline) for work in tuple(self._pending))

    def is_given_up(self) -> bool:
        """Whether it was severed so long ago that what has not ended is not waited for any more."""
        if not self.is_severed or self._cut_at is None or time.monotonic() - self._cut_at < GIVE_UP_AFTER_S:
            return False
        self.give_up()
        return True

    def give_up(self) -> None:
        """Says so, once; the operations' own references keep their tensors alive, and theirs alone."""
        if self._has_given_up:
            return
        self._has_given_up = True
        _log.error(
            "quorum %s: %d operations do not end and are given up; connections still open: %s; threads: %s",
            self.membership.quorum_id,
            sum(work.unended() is not None for work in tuple(self._pending)),
            [c for c in self._connections if is_open(c)],
            {thread: sleep_of(thread) for thread in self._new_threads},
        )

    def take_down(self) -> None:
        """Free its threads and descriptors. Takes up to 20 ms, without the GIL; more while an operation is stuck."""
        self.condemn()
        if self._linger is None:
            self.cut(is_idle=not self._pending)
        self.drain(time.monotonic() + SETTLE_TIMEOUT_S)
        with self._cutting:
            linger = self._linger
        if linger is not None:
            linger.join()
        self._let_go()
        left = self._stuck + [work for pending in tuple(self._pending) if (work := pending.unended()) is not None]
        if self._gloo is not None and left:
            park(self._gloo, left)
            self._stuck = []
        self._device = None
        self._gloo = None
        if self._client is not None and self.ended.is_set():
            self._client.close()
        self._client = None
        free_parked()

    def _knock(self) -> None:
        """Answer for peers that never connect: Gloo waits for them without a socket that could be cut.

        The connecting side introduces itself by the number of the pair it belongs to, which is its rank. Our call is
        taken for the peer's and ends at once, which Gloo takes for the death of the peer.
        """
        listener = self._listener
        if listener is None or not self._peers or self._has_knocked:
            return
        self._has_knocked = True
        for rank in self._peers.values():
            with contextlib.suppress(OSError), socket.create_connection(listener, timeout=0.05) as knock:
                knock.sendall(struct.pack("=q", rank))

    def _is_connection(self, ends: Ends) -> bool:
        if ends.remote is None or self._listener is None:
            return False
        return ends.local[1] == self._listener[1] or ends.remote in self._peers

    # ---- building

    def build(self) -> None:
        """Connect to every member; the outcome is `is_usable` or `failure()`."""
        try:
            self._build()
        except StepInterrupted as error:
            self._failure = self._failure or error
        except RuntimeError as error:  # torch's, whatever went wrong
            self._failure = self._failure or self._translated(str(error))
        except BaseException as error:  # boundary: it is for the thread that called configure, not for this one
            self._failure = self._failure or error
        self.ended.set()
        self.changed.set()

    def _build(self) -> None:
        me = self.membership
        if me.size == 1:
            self._gloo = Alone()
            return
        store_address = host_and_port(me.store)
        host = self._bind_host or route_to(store_address)
        before, threads_before = open_sockets(), thread_ids()
        self._client = connect_store(store_address, lambda: self.is_severed)
        self._listen(host)
        self._learn_peers()
        assert self._device is not None
        gloo = torch_private.connect_gloo(
            torch_private.Place(rank=me.rank, size=me.size, timeout_s=me.timeout_s, threads=self._threads),
            self._device,
            lambda mine: self._gather("gloo", mine),
        )
        self._connections = find_lasting(self._is_connection, among=open_sockets() - before)
        close_on_exec(self._connections)
        self._new_threads = sorted(thread_ids() - threads_before)
        self._gloo = gloo

    def _listen(self, host: str) -> None:
        def is_listener(ends: Ends) -> bool:
            return ends.is_listening and ends.local[0] == host

        try:
            self._device, self._listening = open_recognised(lambda: torch_private.gloo_device(host), is_listener)
        except RuntimeError as error:
            raise ConfigError(
                f"cannot listen on {host}; pass as bind_host an address of this machine: {error}"
            ) from None
        ends = ends_of(self._listening)
        assert ends is not None
        self._listener = ends.local

    def _learn_peers(self) -> None:
        """Wait until every member has come, and learn where each listens."""
        assert self._listener is not None
        self._raise_if_severed()
        for rank, where in enumerate(self._gather("listener", joined(self._listener).encode())):
            if rank != self.membership.rank:
                self._peers[host_and_port(where.decode())] = rank

    def _gather(self, what: str, mine: bytes) -> list[bytes]:
        me, client = self.membership, self._client
        self._raise_if_severed()
        assert client is not None
        try:
            return client.gather(f"{me.quorum_id}/{me.prefix}/{what}", me.rank, me.size, mine, me.timeout_s)
        except PeerLost as error:
            self._raise_if_severed()
            raise PeerLost(f"quorum {me.quorum_id}: {error}", error.peer) from None

    def after_build(self) -> None:
        """Off the critical path: which member is at the far end of a connection that we accepted.

        Its address there is a port that only that member knows; each tells the others through the store.
        """
        client = self._client
        if client is None or not self.is_usable:
            return
        opened: dict[int, str] = {}  # rank of a peer -> our end of the connection that we opened to it
        accepted: dict[Address, OpenSocket] = {}
        for connection in self._connections:
            ends = ends_of(connection)
            if ends is None or ends.remote is None:
                continue
            accepted[ends.remote] = connection
            if ends.remote in self._peers:
                peer = self._peers[ends.remote]
                self._rank_at[ends.remote] = self._rank_of[connection] = peer
                opened[peer] = joined(ends.local)
        with contextlib.suppress(StepInterrupted):  # severed meanwhile, or the store is gone: errors name fewer peers
            for rank, said in enumerate(self._gather("ends", json.dumps(opened).encode())):
                mine = json.loads(said).get(str(self.membership.rank))
                far_end = None if mine is None else host_and_port(mine)
                if far_end in accepted:
                    self._rank_at[far_end] = self._rank_of[accepted[far_end]] = rank
        client.close()

    def _raise_if_severed(self) -> None:
        if self.is_severed:
            raise StepInterrupted(f"quorum {self.membership.quorum_id} was aborted")

    def _translated(self, error: str) -> PeerLost:
        text = re.sub(r"^\[[^\]]*\.cc:\d+\] ", "", error.partition("\n")[0]).split(". This is typically")[0]
        return PeerLost(f"quorum {self.membership.quorum_id}: {text}", self._peer_in(text))

    def _peer_in(self, text: str) -> int | None:
        found = _PEER_IN_ERROR.search(text)
        if found is None:
            return None
        if self.membership.size == 2:
            return 1 - self.membership.rank
        host, port = found[1], int(found[2])
        ranks = self._peers | self._rank_at
        # Gloo writes a port as it stands in the socket address: most significant byte first (seen with torch 2.13).
        return ranks.get((host, socket.ntohs(port)), ranks.get((host, port)))
