"""Messages between the nodes of a job and its rendezvous. The tables in docs/protocol.md are generated from this file.

A completed round is told to each of its nodes in a few bytes: its rank, how many take part, where the store is. Nobody
needs the list of nodes, so no message has one. The rules of version skew are those of messages.py.
"""

import enum

import msgspec

from everstep.core.ranks import RankPolicy
from everstep.core.types import RendezvousRound


class CloseScope(str, enum.Enum):
    """What is closed."""

    ROUND = "round"  # the round that is complete or forming; the nodes may join the next
    JOB = "job"  # this rendezvous for good


class NodeRefusal(str, enum.Enum):
    """Why a node is turned away."""

    EVICTED = "evicted"  # from the round it was in: nothing was heard of it for too long; it may join as a newcomer
    TIMEOUT = "timeout"  # min_nodes were not reached in time; not retryable
    NODE_ID_TAKEN = "node-id-taken"  # by another live process
    EXCLUDED = "excluded"  # a script asked that this node be left out; until the operator admits it
    BAD_CONFIG = "bad-config"  # it contradicts itself, or the nodes that are here


class StoreOp(str, enum.Enum):
    """An operation on the round's store; named as in torch.distributed.Store."""

    SET = "set"
    GET = "get"  # waits for its keys, as multi_get does
    ADD = "add"
    COMPARE_SET = "compare_set"  # values: expected, desired
    WAIT = "wait"
    CHECK = "check"
    DELETE_KEY = "delete_key"
    NUM_KEYS = "num_keys"
    LIST_KEYS = "list_keys"
    APPEND = "append"
    QUEUE_PUSH = "queue_push"
    QUEUE_POP = "queue_pop"
    QUEUE_LEN = "queue_len"
    CANCEL = "cancel"  # nobody waits for the answer to the call `amount` any more


class StoreStatus(str, enum.Enum):
    """How an operation ended."""

    OK = "ok"
    ROUND_OVER = "round-over"  # the round is dissolved, and its store with it
    BAD_CALL = "bad-call"  # `detail` says what is wrong with it
    FULL = "full"  # a bound of the store is reached; `detail` says which


class NodeHealth(str, enum.Enum):
    """How a node stands in its complete round."""

    HEALTHY = "healthy"  # all of its workers run
    UNHEALTHY = "unhealthy"  # one failed, and nobody is to start again for that (`min_healthy`)
    FINISHED = "finished"  # all of its workers have ended cleanly


class RankNews(str, enum.Enum):
    """What the monitor of a node's agent says of a rank."""

    SUSPECTED = "suspected"  # past its soft deadline
    CLEARED = "cleared"  # it was suspected, and moves on
    HUNG = "hung"  # past its hard deadline; it is being ended


class NodeSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A node, and what it wants. `node_id` is its name in every round; `nonce` names its process."""

    node_id: str
    nonce: str
    min_nodes: int = 1
    max_nodes: int = 1
    join_timeout_s: float = 600.0  # for min_nodes to come together
    last_call_s: float = 5.0  # to wait for more once there are min_nodes
    ranks: RankPolicy = RankPolicy.PREVIOUS
    infrastructure_rank: int | None = None  # SLURM_PROCID, else GROUP_RANK
    domain: str = ""  # for RankPolicy.TOPOLOGY: nodes that share a switch, say
    domain_size: int = 0  # nodes that make a domain whole; 0: as many as the largest has
    min_healthy: int = 0  # a round stands while so many of its nodes are healthy; 0: while all of them live
    machine: str = ""  # that it runs on, which is what is excluded: a node_id may name one process; "": the node_id

    @property
    def excluded_as(self) -> str:
        return self.machine or self.node_id


class RoundInfo(msgspec.Struct, frozen=True, array_like=True):
    """A completed round as one of its nodes knows it."""

    round: RendezvousRound
    rank: int
    size: int
    store: str
    restarts: int = 0  # after failures of workers: the most that any of its nodes knew of


class ExcludedNode(msgspec.Struct, frozen=True, array_like=True):
    """A node that stays out of the job, by its machine, and why."""

    machine: str
    reason: str


class SeenInterval(msgspec.Struct, frozen=True, array_like=True):
    """How long ranks were at most, of late, in a section, between heartbeats, or outside of sections."""

    key: str  # a section's name, "<heartbeat>" or "<outside>"
    longest_s: float


# ---- node to lighthouse


class NodeHello(msgspec.Struct, frozen=True, kw_only=True, tag="node_hello"):
    """First message on every (re)connected link of a node: everything a lighthouse that has just started must know."""

    group: str
    node: NodeSpec
    lighthouse: str = ""  # as NodeWelcome named it last
    last: RoundInfo | None = None  # the last completed round it was in
    is_member: bool = False  # and it has not heard that this round is over
    is_joining: bool = False
    is_closed: bool = False  # it knows that this rendezvous is closed for good
    restarts: int = 0
    excluded: tuple[ExcludedNode, ...] = ()  # as NodesExcluded had them last; counts for another life of the lighthouse


class JoinRound(msgspec.Struct, frozen=True, tag="join_round"):
    """Wants into the next round. `known` is the last completed one it was in: that one is over for it."""

    known: RendezvousRound | None = None
    restarts: int = 0  # of its group's workers after failures, as far as this node knows


class NodeStands(msgspec.Struct, frozen=True, tag="node_stands"):
    """How it stands in this round. When all healthy nodes have finished, the rendezvous is closed."""

    round: RendezvousRound
    health: NodeHealth


class StoreHosted(msgspec.Struct, frozen=True, tag="store_hosted"):
    """Answer to HostStore."""

    round: RendezvousRound
    address: str  # host:port


class LeaveRendezvous(msgspec.Struct, frozen=True, tag="leave_rendezvous"):
    """The node goes, on purpose: at once, with no grace."""

    reason: str = ""


class CloseRendezvous(msgspec.Struct, frozen=True, tag="close_rendezvous"):
    """Asks to close it, for all nodes."""

    scope: CloseScope
    reason: str = ""


class NodeHeartbeat(msgspec.Struct, frozen=True, tag="node_heartbeat"):
    """Alive."""


class StoreCall(msgspec.Struct, frozen=True, tag="store_call"):
    """One operation on the store of `round`; answered by the StoreReply of the same number."""

    number: int
    round: RendezvousRound
    op: StoreOp
    keys: tuple[str, ...] = ()
    values: tuple[bytes, ...] = ()
    amount: int = 0  # of ADD; of QUEUE_POP: 1 waits for an element


class WorkersRunning(msgspec.Struct, frozen=True, tag="workers_running"):
    """All workers that this node's agent runs now, by the names that members' Hellos have for them."""

    workers: tuple[str, ...]


class WorkerEnded(msgspec.Struct, frozen=True, tag="worker_ended"):
    """Its process has ended, for certain. Said again on each new link: it may have been lost."""

    worker: str
    detail: str = ""  # "SIGKILL", "exit code 1", "out of memory"
    is_clean: bool = False  # it exited with 0


class Vouched(msgspec.Struct, frozen=True, tag="vouched"):
    """Answer to VouchFor."""

    worker: str
    state: str  # as in /proc: R, S and D live, T is stopped; "" when it is gone


class ExcludeNode(msgspec.Struct, frozen=True, tag="exclude_node"):
    """This node asks to be kept out of the job from its next join on, by its machine, until it is admitted."""

    reason: str


class IntervalsSeen(msgspec.Struct, frozen=True, tag="intervals_seen"):
    """What ranks of this node saw, where limits are learned of it. Replaces what it said before."""

    intervals: tuple[SeenInterval, ...]


class RankReport(msgspec.Struct, frozen=True, kw_only=True, tag="rank_report"):
    """A rank of this node may hang, or does. Said once, to a lighthouse that has welcomed the node."""

    news: RankNews
    rank: str  # as people call it: "rank 3"
    detail: str
    section: str = ""  # that is open for too long; "" where it is something else
    age_s: float = 0.0
    culprit: str = ""  # the rank that the others wait for, where it can be told
    waiting: tuple[str, ...] = ()  # who waits for it
    stacks: str = ""  # of the rank, cut


# ---- lighthouse to node


class NodeWelcome(msgspec.Struct, frozen=True, tag="node_welcome"):
    """Answer to NodeHello."""

    lighthouse: str  # names this life of the rendezvous
    heartbeat_interval_s: float
    heartbeat_timeout_s: float


class HostStore(msgspec.Struct, frozen=True, tag="host_store"):
    """To rank 0 of a round whose nodes are chosen: open its store, and say where (StoreHosted)."""

    round: RendezvousRound
    size: int


class RoundComplete(msgspec.Struct, frozen=True, tag="round_complete"):
    """The round stands."""

    info: RoundInfo


class RoundDissolved(msgspec.Struct, frozen=True, tag="round_dissolved"):
    """The round is over; join the next."""

    round: RendezvousRound
    reason: str


class NodesWaiting(msgspec.Struct, frozen=True, tag="nodes_waiting"):
    """So many nodes wait for the next round, and there is room for them in it."""

    count: int


class RendezvousClosed(msgspec.Struct, frozen=True, tag="rendezvous_closed"):
    """It is closed, for everybody."""

    scope: CloseScope
    reason: str
    was_spare: bool = False  # this node waited beside a full round


class NodeRefused(msgspec.Struct, frozen=True, tag="node_refused"):
    """Turned away; `detail` says why, and what to change. `nonce` says whom it concerns."""

    code: NodeRefusal
    detail: str
    nonce: str = ""


class NodesExcluded(msgspec.Struct, frozen=True, tag="nodes_excluded"):
    """All nodes that stay out, to be remembered for a lighthouse that starts again."""

    nodes: tuple[ExcludedNode, ...]


class IntervalsLargest(msgspec.Struct, frozen=True, tag="intervals_largest"):
    """The largest over all nodes of the job, now. Replaces what was said before."""

    intervals: tuple[SeenInterval, ...]


class StoreReply(msgspec.Struct, frozen=True, tag="store_reply"):
    """How a StoreCall ended."""

    number: int
    status: StoreStatus = StoreStatus.OK
    values: tuple[bytes, ...] = ()
    amount: int = 0  # a count, a sum, or 1 for yes
    detail: str = ""


class VouchFor(msgspec.Struct, frozen=True, tag="vouch_for"):
    """The member whose worker this is has fallen silent: does its process live?"""

    worker: str


class Fence(msgspec.Struct, frozen=True, tag="fence"):
    """The others went on without this worker: end it."""

    worker: str


FromAgent = WorkersRunning | WorkerEnded | Vouched
FromNode = (
    NodeHello
    | JoinRound
    | NodeStands
    | StoreHosted
    | LeaveRendezvous
    | CloseRendezvous
    | NodeHeartbeat
    | StoreCall
    | ExcludeNode
    | RankReport
    | IntervalsSeen
    | FromAgent
)
ToNode = (
    NodeWelcome
    | HostStore
    | RoundComplete
    | RoundDissolved
    | NodesWaiting
    | RendezvousClosed
    | NodeRefused
    | NodesExcluded
    | IntervalsLargest
    | StoreReply
    | VouchFor
    | Fence
)
