"""A node's connection to its rendezvous: blocking calls over a link that has a thread of its own.

An agent is the user: `next_round` until there is one, then run the workers until `needs_new_round`. Nothing is polled:
what the lighthouse has to say arrives by itself, and `wait_changed` wakes up.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable

from everstep.core.node import NodeMachine, NodeStage
from everstep.core.node_messages import (
    CloseScope,
    Fence,
    FromNode,
    IntervalsLargest,
    NodeHealth,
    NodeHeartbeat,
    NodeRefusal,
    NodeSpec,
    NodeWelcome,
    RankReport,
    RendezvousClosed,
    RoundInfo,
    SeenInterval,
    StoreReply,
    ToNode,
    Vouched,
    VouchFor,
    WorkerEnded,
)
from everstep.core.types import RendezvousRound
from everstep.core.worker_book import worker_name
from everstep.errors import (
    ConfigError,
    LighthouseUnreachable,
    NodeEvicted,
    NodeExcluded,
    RendezvousEnded,
    RendezvousTimedOut,
)
from everstep.link import codec
from everstep.link.client import LinkClient
from everstep.link.dial import LinkTarget
from everstep.link.round_store import RoundStore, StoreCalls

LEAVE_S = 2.0

log = logging.getLogger("everstep.rendezvous")


class NodeClient:
    """One node of one (job, group). `start` first; then any method from any thread, one `next_round` at a time.

    Set `on_fence` and `vouch` before `start`, where there are workers to speak for. Both are given a worker's token, on
    the link's thread, and must not block or raise. `on_fence` ends the worker; its end is then reported as any other.
    `vouch` returns the state of its process: a letter as in /proc, "" when it is gone. `on_largest` is given what the
    ranks of all nodes saw, there too.
    """

    on_fence: Callable[[str], None] | None = None
    vouch: Callable[[str], str] | None = None
    on_largest: Callable[[IntervalsLargest], None] | None = None

    def __init__(self, target: LinkTarget, group: str, spec: NodeSpec) -> None:
        self._target = target
        self._changed = threading.Condition()
        self._machine = NodeMachine(group, spec)  # under the condition, as all below
        self._client: LinkClient[ToNode] = LinkClient(target, self, codec.decode_to_node)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._error: Exception | None = None
        self._is_open = False
        self._open_changed_at = time.monotonic()
        self._calls = StoreCalls(self._changed, self._send_one)
        self._names: dict[str, str] = {}  # running workers by token, as they are called on the links
        self._tokens: dict[str, str] = {}  # and the other way round

    def __enter__(self) -> "NodeClient":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def start(self) -> None:
        """Returns at once; the link connects by itself, and again whenever it is lost."""
        self._client.start()

    def shutdown(self, reason: str = "") -> None:
        """Leave the rendezvous if it can be reached, and end the link and its thread."""
        with self._changed:
            self._error = self._error or RendezvousEnded("this node has left")
            self._say(self._machine.leave(reason))
            self._calls.end("this node has left the rendezvous")
            self._changed.notify_all()
        self._client.close(None, LEAVE_S)

    # ---- rounds

    def next_round(self, open_store: Callable[[], str], restarts: int = 0) -> RoundInfo:
        """Leave the round this node is in, and wait for the next to be complete. Blocks.

        `restarts`: of the group's workers after failures, as far as this node knows; `RoundInfo` has what all know.

        `open_store` is called on this thread if this node is to host the round's store; it returns `host:port`.
        Raises RendezvousTimedOut, RendezvousEnded, NodeEvicted (once; the next call joins anew), NodeExcluded,
        ConfigError, LighthouseRefused and LighthouseUnreachable.
        """
        with self._changed:
            self._raise_if_refused()
            self._raise_if_ended()
            self._say(self._machine.join(restarts))
            while True:
                self._raise_if_refused()
                self._raise_if_closed()
                if self._machine.stage is NodeStage.MEMBER:
                    assert self._machine.last is not None
                    return self._machine.last
                if self._machine.stage is NodeStage.IDLE:
                    # A round was complete and over before this thread woke up.
                    self._say(self._machine.join())
                host = self._machine.host
                if host is not None:
                    self._host(host, open_store)
                    continue
                self._changed.wait(self._patience())

    def _host(self, round_: RendezvousRound, open_store: Callable[[], str]) -> None:
        """Under the lock, which is let go while the store opens."""
        self._changed.release()
        try:
            address = open_store()
        finally:
            self._changed.acquire()
        self._say(self._machine.hosted(round_, address))

    def _patience(self) -> float | None:
        """How long to wait at most; raises once the lighthouse has been away for the join timeout."""
        if self._is_open:
            return None
        left = self._open_changed_at + self._machine.spec.join_timeout_s - time.monotonic()
        if left <= 0:
            raise LighthouseUnreachable(
                f"no lighthouse at {self._target.url} for {self._machine.spec.join_timeout_s:g} s while this node "
                "waits for a round: start it again, or correct the endpoint"
            )
        return left

    def stand(self, health: NodeHealth) -> None:
        """Say how this node stands in its round; once all healthy nodes have FINISHED, the rendezvous is closed."""
        with self._changed:
            self._say(self._machine.stand(health))

    @property
    def needs_new_round(self) -> bool:
        """The round is over, or nodes wait for which there is room. Raises NodeEvicted, once. False without a link."""
        with self._changed:
            self._raise_if_refused()
            return self._machine.needs_new_round

    def is_in(self, info: RoundInfo) -> bool:
        """Whether this round stands, and this node is in it, as far as it knows. Raises NodeEvicted, once."""
        with self._changed:
            self._raise_if_refused()
            last = self._machine.last
            return self._machine.stage is NodeStage.MEMBER and last is not None and last.round == info.round

    @property
    def is_open(self) -> bool:
        """Whether the lighthouse can be reached at this moment."""
        return self._is_open

    @property
    def waiting(self) -> int:
        """Nodes that wait and would find room in the next round; 0 without a lighthouse. Raises NodeEvicted, once."""
        with self._changed:
            self._raise_if_refused()
            return self._machine.waiting if self._is_open else 0

    @property
    def why_dissolved(self) -> str:
        with self._changed:
            return self._machine.why_dissolved

    def wait_changed(self, is_wanted: Callable[["NodeClient"], bool], timeout_s: float) -> bool:
        """Until `is_wanted(self)`, looked at whenever something has changed. False after `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: is_wanted(self), timeout_s)

    def poke(self) -> None:
        """Let `wait_changed` look again: something that its caller knows has changed."""
        with self._changed:
            self._changed.notify_all()

    # ---- closing

    @property
    def closed(self) -> RendezvousClosed | None:
        with self._changed:
            return self._machine.closed

    def close(self, scope: CloseScope = CloseScope.JOB, reason: str = "", timeout_s: float = 2.0) -> bool:
        """Close it for all nodes; whether the lighthouse has confirmed that within the time."""
        with self._changed:
            if self._machine.closed is not None:
                return True
            self._say(self._machine.close(scope, reason))
            if not self._is_open:
                return False
            return self._changed.wait_for(lambda: self._machine.closed is not None, timeout_s)

    # ---- the round's store

    def store(self, info: RoundInfo) -> RoundStore:
        """The key-value store of a round that this node is in; it ends with the round."""
        return RoundStore(self._calls, info.round)

    # ---- workers

    def worker_started(self, worker: str, pid: int) -> None:
        """Process `pid` runs with this token as EVERSTEP_WORKER; no token is used twice. Any thread; never blocks."""
        with self._changed:
            name = worker_name(worker, pid)
            self._names[worker], self._tokens[name] = name, worker
            self._say(self._machine.worker_started(name))

    def worker_ended(self, worker: str, detail: str, *, is_clean: bool = False) -> None:
        """It has ended, for certain; `detail` says how: "SIGKILL", "exit code 1", "out of memory".

        The others go on without it from here on: say it as early as it is known. It is said again after every
        reconnect; of one that was not started here nothing is said. `is_clean`: it exited with 0. Any thread; never
        blocks.
        """
        with self._changed:
            name = self._names.pop(worker, None)
            if name is not None:
                del self._tokens[name]
                self._say(self._machine.worker_ended(WorkerEnded(name, detail, is_clean)))

    def report_rank(self, report: RankReport) -> None:
        """For the job's events. Any thread; never blocks; the newest few wait for a lighthouse that is away."""
        with self._changed:
            self._say(self._machine.report_rank(report))

    def saw(self, intervals: tuple[SeenInterval, ...]) -> None:
        """What ranks of this node saw, all of it, for the other nodes. Any thread; never blocks."""
        with self._changed:
            self._say(self._machine.saw(intervals))

    def exclude(self, reason: str) -> None:
        """Keep this node out of the job from its next join on, until it is admitted. Any thread; never blocks."""
        with self._changed:
            self._say(self._machine.exclude(reason))

    def _answer(self, name: str) -> None:
        """On the link's thread."""
        worker = self._tokens.get(name)
        state = self.vouch(worker) if self.vouch is not None and worker is not None else ""
        if self.vouch is not None:
            self._client.send(Vouched(name, state))

    def _fence(self, name: str) -> None:
        """On the link's thread."""
        worker = self._tokens.get(name)
        if worker is not None and self.on_fence is not None:
            log.warning("worker fenced worker=%s: the others went on without it", worker)
            self.on_fence(worker)

    # ---- the link's thread

    def on_start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def on_open(self) -> None:
        with self._changed:
            self._is_open, self._open_changed_at = True, time.monotonic()
            self._say(self._machine.link_up())
            self._calls.link_up()
            self._changed.notify_all()

    def on_message(self, message: ToNode) -> None:
        if isinstance(message, VouchFor):
            self._answer(message.worker)
            return
        if isinstance(message, Fence):
            self._fence(message.worker)
            return
        if isinstance(message, IntervalsLargest):
            if self.on_largest is not None:
                self.on_largest(message)
            return
        with self._changed:
            if isinstance(message, StoreReply):
                self._calls.answer(message)
                return
            was, lighthouse = self._machine.stage, self._machine.lighthouse
            self._say(self._machine.receive(message))
            if isinstance(message, NodeWelcome):
                self._beat_every(message.heartbeat_interval_s)
                if lighthouse not in ("", message.lighthouse) and self._machine.last is not None:
                    self._calls.put_back(self._machine.last.round)
            if was is NodeStage.MEMBER and self._machine.stage is NodeStage.IDLE:
                why = self._machine.why_dissolved or (self._machine.refusal.detail if self._machine.refusal else "")
                log.info("round over node=%s reason=%r", self._machine.spec.node_id, why)
            self._changed.notify_all()

    def on_close(self, detail: str) -> None:  # noqa: ARG002
        self._stop_beating()
        with self._changed:
            self._is_open, self._open_changed_at = False, time.monotonic()
            self._machine.link_down()
            self._calls.link_down()
            self._changed.notify_all()

    def on_failed(self, error: Exception) -> None:
        with self._changed:
            self._error = error
            self._calls.end(str(error))
            self._changed.notify_all()

    def _beat_every(self, interval_s: float) -> None:
        self._stop_beating()
        assert self._loop is not None
        self._timer = self._loop.call_later(interval_s, self._beat, interval_s)

    def _beat(self, interval_s: float) -> None:
        self._client.send(NodeHeartbeat())
        self._beat_every(interval_s)

    def _stop_beating(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # ---- under the lock

    def _say(self, messages: list[FromNode]) -> None:
        for message in messages:
            self._send_one(message)

    def _send_one(self, message: FromNode) -> bool:
        return self._client.send(message) == ""

    def _raise_if_refused(self) -> None:
        if self._error is not None:
            raise self._error
        refusal = self._machine.take_refusal()
        if refusal is None:
            return
        match refusal.code:
            case NodeRefusal.EVICTED:
                raise NodeEvicted(refusal.detail)
            case NodeRefusal.EXCLUDED:
                raise NodeExcluded(refusal.detail)
            case NodeRefusal.TIMEOUT:
                raise RendezvousTimedOut(refusal.detail)
            case NodeRefusal.NODE_ID_TAKEN | NodeRefusal.BAD_CONFIG:
                raise ConfigError(refusal.detail)

    def _raise_if_ended(self) -> None:
        closed = self._machine.closed
        if closed is not None and closed.scope is CloseScope.JOB:
            raise RendezvousEnded(closed.reason, was_spare=closed.was_spare)

    def _raise_if_closed(self) -> None:
        closed = self._machine.closed
        if closed is not None and self._machine.stage is NodeStage.IDLE:
            raise RendezvousEnded(closed.reason, was_spare=closed.was_spare)

    @property
    def link_address(self) -> str:
        """This host's address as the lighthouse's network sees it; "" without a link."""
        return self._client.local_host
