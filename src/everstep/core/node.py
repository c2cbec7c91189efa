"""A node's side of a rendezvous: what it knows, what it says, and what it asked for. Time is not its business.

Its shell sends what these methods return on the link that is open now, or not at all: on the next link `link_up` says
everything again.
"""

import collections
import enum

import msgspec

from everstep.core.node_messages import (
    CloseRendezvous,
    CloseScope,
    ExcludedNode,
    ExcludeNode,
    FromNode,
    HostStore,
    IntervalsSeen,
    JoinRound,
    LeaveRendezvous,
    NodeHealth,
    NodeHello,
    NodeRefusal,
    NodeRefused,
    NodesExcluded,
    NodeSpec,
    NodeStands,
    NodesWaiting,
    NodeWelcome,
    RankReport,
    RendezvousClosed,
    RoundComplete,
    RoundDissolved,
    RoundInfo,
    SeenInterval,
    StoreHosted,
    ToNode,
    WorkerEnded,
    WorkersRunning,
)
from everstep.core.types import LocalProtocolError, RendezvousRound

ENDED_KEPT_MAX = 64  # workers whose end is said again on a new link
REPORTS_KEPT_MAX = 64  # of ranks, for a lighthouse that is away


class NodeStage(enum.Enum):
    """What this node is doing."""

    IDLE = "idle"  # in no round, and not asking for one
    JOINING = "joining"
    MEMBER = "member"  # of `last`, which stands as far as this node knows


class NodeMachine:
    """One node of one (job, group). `spec.nonce` names the process; after an eviction it goes on under another."""

    def __init__(self, group: str, spec: NodeSpec) -> None:
        self._group = group
        self._process = spec.nonce
        self._evictions = 0
        self.lighthouse = ""  # as it named itself last
        self.is_registered = False  # the lighthouse has welcomed it on the link that is open
        self.spec = spec
        self.stage = NodeStage.IDLE
        self.last: RoundInfo | None = None  # the last completed round it was in
        self.host: RendezvousRound | None = None  # it is asked to open the store of this round
        self.restarts = 0  # of the group's workers
        self.health = NodeHealth.HEALTHY
        self.waiting = 0  # nodes for which there is room in the next round
        self.closed: RendezvousClosed | None = None
        self.refusal: NodeRefused | None = None  # to be told at the next call
        self.why_dissolved = ""
        self.welcome: NodeWelcome | None = None
        self._workers: dict[str, None] = {}
        self._ended: collections.deque[WorkerEnded] = collections.deque(maxlen=ENDED_KEPT_MAX)
        self._excluded: tuple[ExcludedNode, ...] = ()  # nodes, as the lighthouse said it last
        self._exclusion: list[FromNode] = []  # of this node; not sent yet
        self._reports: collections.deque[RankReport] = collections.deque(maxlen=REPORTS_KEPT_MAX)  # not sent yet
        self._intervals: list[FromNode] = []  # that ranks of this node saw, as it said it last

    # ---- the link

    def link_up(self) -> list[FromNode]:
        self.is_registered = False
        running: list[FromNode] = [WorkersRunning(tuple(self._workers))] if self._workers else []
        stands: list[FromNode] = self.stand(self.health) if self.health is not NodeHealth.HEALTHY else []
        return [self._hello(), *self._ended, *running, *stands]

    def link_down(self) -> None:
        self.is_registered = False
        self.host = None

    def receive(self, message: ToNode) -> list[FromNode]:
        match message:
            case NodeWelcome(lighthouse):
                self.lighthouse, self.is_registered, self.welcome = lighthouse, True, message
                kept = [*self._exclusion, *self._intervals, *self._reports]
                self._exclusion.clear()
                self._reports.clear()
                return kept
            case NodesExcluded(nodes):
                self._excluded = nodes
            case HostStore(round_):
                if self.stage is NodeStage.JOINING:
                    self.host = round_
            case RoundComplete(info):
                self._complete(info)
            case RoundDissolved(round_, reason):
                if self.stage is NodeStage.MEMBER and self.last is not None and self.last.round == round_:
                    self.stage, self.why_dissolved, self.waiting = NodeStage.IDLE, reason, 0
            case NodesWaiting(count):
                self.waiting = count
            case RendezvousClosed():
                self._close(message)
            case NodeRefused():
                return self._refuse(message)
        return []

    def _complete(self, info: RoundInfo) -> None:
        if self.stage is NodeStage.JOINING and (self.last is None or self.last.round != info.round):
            self.stage, self.last, self.host = NodeStage.MEMBER, info, None
            self.waiting, self.why_dissolved = 0, ""
            self.restarts, self.health = max(self.restarts, info.restarts), NodeHealth.HEALTHY

    def _close(self, message: RendezvousClosed) -> None:
        if self.closed is None or self.closed.scope is CloseScope.ROUND:
            self.closed = message
        if self.stage is NodeStage.JOINING:
            self.stage, self.host = NodeStage.IDLE, None

    def _refuse(self, refusal: NodeRefused) -> list[FromNode]:
        if refusal.nonce and refusal.nonce != self.spec.nonce:
            return []
        if refusal.code is not NodeRefusal.TIMEOUT:
            self.is_registered = False
        was_joining = self.stage is NodeStage.JOINING
        self.stage, self.host, self.waiting = NodeStage.IDLE, None, 0
        if refusal.code is NodeRefusal.EVICTED:
            self._evictions += 1
            self.spec = msgspec.structs.replace(self.spec, nonce=f"{self._process}.{self._evictions}")
            if was_joining:  # it is where an evicted node belongs: among the newcomers
                self.stage = NodeStage.JOINING
            else:
                self.refusal = refusal
            return [self._hello()]
        self.refusal = refusal
        return []

    def _hello(self) -> NodeHello:
        return NodeHello(
            group=self._group,
            node=self.spec,
            lighthouse=self.lighthouse,
            last=self.last,
            is_member=self.stage is NodeStage.MEMBER,
            is_joining=self.stage is NodeStage.JOINING,
            is_closed=self.closed is not None and self.closed.scope is CloseScope.JOB,
            restarts=self.restarts,
            excluded=self._excluded,
        )

    # ---- its workers (core/agents.py is the other side)

    def worker_started(self, worker: str) -> list[FromNode]:
        self._workers[worker] = None
        return [WorkersRunning(tuple(self._workers))]

    def worker_ended(self, report: WorkerEnded) -> list[FromNode]:
        if report.worker not in self._workers:
            return []
        del self._workers[report.worker]
        self._ended.append(report)
        return [report]

    def report_rank(self, report: RankReport) -> list[FromNode]:
        """Now, or when the lighthouse is back: the newest of them."""
        if self.is_registered:
            return [report]
        self._reports.append(report)
        return []

    def saw(self, intervals: tuple[SeenInterval, ...]) -> list[FromNode]:
        """Its ranks: all of it. Said again to a lighthouse that welcomes this node anew."""
        self._intervals = [IntervalsSeen(intervals)]
        return [*self._intervals] if self.is_registered else []

    def exclude(self, reason: str) -> list[FromNode]:
        """Keep this node out from its next join on. Nothing ends by that: what runs here ends in its own way."""
        if self.is_registered:
            return [ExcludeNode(reason)]
        self._exclusion = [ExcludeNode(reason)]
        return []

    # ---- calls

    @property
    def needs_new_round(self) -> bool:
        """Its round is over although it did not ask for that, or others wait to be let in."""
        return self.waiting > 0 or (self.stage is NodeStage.IDLE and bool(self.why_dissolved))

    def take_refusal(self) -> NodeRefused | None:
        """What this node has to be told, once."""
        refusal, self.refusal = self.refusal, None
        return refusal

    def join(self, restarts: int = 0) -> list[FromNode]:
        """Ask for the next round; the one it is in, if any, is over for it. `restarts`: as in JoinRound."""
        self.restarts = max(self.restarts, restarts)
        if self.stage is NodeStage.JOINING:
            return []
        if self.closed is not None and self.closed.scope is CloseScope.ROUND:
            self.closed = None
        self.stage, self.refusal, self.waiting, self.why_dissolved = NodeStage.JOINING, None, 0, ""
        if not self.is_registered:
            return [self._hello()]
        return [JoinRound(self.last.round if self.last is not None else None, self.restarts)]

    def stand(self, health: NodeHealth) -> list[FromNode]:
        """How this node stands in its round; nothing once that is over."""
        if self.stage is not NodeStage.MEMBER or self.last is None:
            return []
        self.health = health
        return [NodeStands(self.last.round, health)]

    def hosted(self, round_: RendezvousRound, address: str) -> list[FromNode]:
        """The store of the round that it was asked to host is open there."""
        if self.host != round_:
            return []
        self.host = None
        return [StoreHosted(round_, address)]

    def leave(self, reason: str) -> list[FromNode]:
        self.stage, self.host, self.waiting = NodeStage.IDLE, None, 0
        self.why_dissolved = ""
        self.is_registered = False
        return [LeaveRendezvous(reason)]

    def close(self, scope: CloseScope, reason: str) -> list[FromNode]:
        if len(reason) > 1000:
            raise LocalProtocolError(f"a reason of {len(reason)} characters")
        return [CloseRendezvous(scope, reason)]
