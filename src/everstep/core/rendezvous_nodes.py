"""Who is connected to a rendezvous, who was heard lately, and who was turned out."""

import collections
import dataclasses
import math

from everstep.core.messages import Cause
from everstep.core.node_messages import NodeHealth, NodeHello, NodeSpec
from everstep.core.rank_news import Allowance
from everstep.core.ranks import RankPolicy
from everstep.core.types import REPLICA_ID_CHARS_MAX

NODES_MAX = 100_000
ROUNDS_MAX = 1 << 48
ADDRESS_CHARS_MAX = 300  # of a round's store
LIFE_CHARS_MAX = 64
EVICTED_KEPT_MAX = 4096
DURATION_MAX_S = 30 * 86400.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class RendezvousConfig:
    """`life` names this memory: another one after each start. `is_return`: the job was served before it."""

    job_id: str
    group: str
    life: str
    is_return: bool = False
    heartbeat_interval_s: float = 1.0
    heartbeat_timeout_s: float = 6.0
    link_grace_s: float = 0.02
    return_timeout_s: float = 5.0  # after a start: for nodes of a round of before to connect again
    host_timeout_s: float = 10.0  # for the first node to open the round's store
    closed_kept_s: float = 60.0  # so long after its last node left, latecomers hear that it is closed
    waiting_interval_s: float = 0.5  # at least between two news of how many nodes wait


@dataclasses.dataclass(kw_only=True)
class Node:
    """A live node. `link` is None while its connection is gone, for the grace."""

    spec: NodeSpec
    link: int | None
    arrived: int
    restarts: int = 0  # of its group's workers, as far as it knows
    health: NodeHealth = NodeHealth.HEALTHY  # in the round that it is in
    news: Allowance = dataclasses.field(default_factory=Allowance)  # of its ranks
    contender: tuple[int, NodeHello] | None = None  # another process with its id, until either of them is heard of


@dataclasses.dataclass(frozen=True)
class Lost:
    """Evidence that a node is dead."""

    node_id: str
    cause: Cause
    detail: str


class NodeRoster:
    """In the order of arrival."""

    def __init__(self, config: RendezvousConfig) -> None:
        self._config = config
        self.nodes: dict[str, Node] = {}
        self._by_link: dict[int, str] = {}
        self._silent_at: collections.OrderedDict[str, float] = collections.OrderedDict()  # earliest first
        self._gone_at: dict[str, tuple[float, str]] = {}  # earliest first: the grace is the same for all
        self._arrivals = 0
        self._numbers: dict[int, str] = {}  # nodes by their infrastructure_rank

    def register(self, spec: NodeSpec, link: int, now: float) -> Node:
        node = self.nodes.get(spec.node_id)
        if node is None:
            self._arrivals += 1
            node = self.nodes[spec.node_id] = Node(spec=spec, link=link, arrived=self._arrivals)
        else:
            self._by_link.pop(node.link or 0, None)
            node.spec, node.link = spec, link
        self._by_link[link] = spec.node_id
        if spec.infrastructure_rank is not None:
            self._numbers[spec.infrastructure_rank] = spec.node_id
        self._gone_at.pop(spec.node_id, None)
        self.heard(spec.node_id, now)
        return node

    def on(self, link: int) -> Node | None:
        node_id = self._by_link.get(link)
        return self.nodes[node_id] if node_id is not None else None

    def heard(self, node_id: str, now: float) -> None:
        self._silent_at[node_id] = now + self._config.heartbeat_timeout_s
        self._silent_at.move_to_end(node_id)

    def link_closed(self, link: int, detail: str, now: float) -> None:
        node_id = self._by_link.pop(link, None)
        if node_id is not None:
            self.nodes[node_id].link = None
            self._silent_at.pop(node_id, None)
            self._gone_at[node_id] = (now + self._config.link_grace_s, detail)

    def remove(self, node_id: str) -> Node:
        node = self.nodes.pop(node_id)
        if node.link is not None:
            self._by_link.pop(node.link, None)
        self._silent_at.pop(node_id, None)
        self._gone_at.pop(node_id, None)
        if self._numbers.get(node.spec.infrastructure_rank or 0) == node_id:
            del self._numbers[node.spec.infrastructure_rank or 0]
        return node

    def expired(self, now: float) -> list[Lost]:
        lost = []
        for node_id, (deadline, detail) in self._gone_at.items():
            if now < deadline:
                break
            lost.append(Lost(node_id, Cause.LINK_CLOSED, detail))
        for node_id, deadline in self._silent_at.items():
            if now < deadline:
                break
            detail = f"nothing heard for {self._config.heartbeat_timeout_s:g} s"
            lost.append(Lost(node_id, Cause.SILENT, detail))
        return lost

    def next_deadline(self) -> float | None:
        first = next(iter(self._silent_at.values()), math.inf)
        first = min(first, next(iter(self._gone_at.values()), (math.inf, ""))[0])
        return first if first < math.inf else None

    def links(self, node_ids: "list[str] | tuple[str, ...] | dict[str, int] | dict[str, None]") -> tuple[int, ...]:
        found = (self.nodes[node_id].link for node_id in node_ids if node_id in self.nodes)
        return tuple(link for link in found if link is not None)

    # ---- newcomers

    def flaw(self, hello: NodeHello) -> str:
        """What is wrong with a newcomer's settings, by themselves or beside those of the others; or ""."""
        spec = hello.node
        if len(self.nodes) >= NODES_MAX:
            return f"{NODES_MAX} nodes are here, the limit"
        if not 0 < len(spec.node_id) <= REPLICA_ID_CHARS_MAX or not spec.node_id.isprintable():
            return f"node_id {spec.node_id[:40]!r} must have 1 to {REPLICA_ID_CHARS_MAX} printable characters"
        if not 1 <= spec.min_nodes <= spec.max_nodes <= NODES_MAX:
            return f"nnodes {spec.min_nodes}:{spec.max_nodes}: give 1 <= min <= max <= {NODES_MAX}"
        if max(len(spec.nonce), len(spec.domain), len(spec.machine)) > REPLICA_ID_CHARS_MAX or spec.domain_size < 0:
            return f"nonce, topology, machine: at most {REPLICA_ID_CHARS_MAX} characters; topology_size: not negative"
        last = hello.last
        if last is not None and not (0 < last.round.n <= ROUNDS_MAX and 0 <= last.rank < last.size <= NODES_MAX):
            return f"a last round of number {last.round.n}, rank {last.rank} and size {last.size} cannot have been"
        if last is not None and not (len(last.store) <= ADDRESS_CHARS_MAX and len(last.round.life) <= LIFE_CHARS_MAX):
            return "a last round with a store's address, or a lighthouse, of too many characters"
        for name in ("join_timeout_s", "last_call_s"):
            value = getattr(spec, name)
            if not 0 <= value <= DURATION_MAX_S:
                return f"{name} is {value}; it must be from 0 to {DURATION_MAX_S:g}"
        if not 0 <= spec.min_healthy <= spec.max_nodes or not 0 <= hello.restarts <= ROUNDS_MAX:
            return f"min_healthy {spec.min_healthy} or {hello.restarts} restarts cannot be"
        if spec.ranks is RankPolicy.INFRASTRUCTURE:
            flaw = self._number_flaw(spec)
            if flaw:
                return flaw
        other = next((n.spec for n in self.nodes.values() if n.spec.node_id != spec.node_id), None)
        for name in ("min_nodes", "max_nodes", "ranks", "min_healthy") if other is not None else ():
            mine, theirs = getattr(spec, name), getattr(other, name)
            if mine != theirs:
                return f"{name} is {_plain(mine)} here and {_plain(theirs)} on the other nodes: start all of them alike"
        return ""

    def _number_flaw(self, spec: NodeSpec) -> str:
        number = spec.infrastructure_rank
        instead = "use ranks=previous, which lets nodes wait as spares"
        if number is None:
            return "ranks=infrastructure, but neither SLURM_PROCID nor GROUP_RANK is set: set one on every node"
        if not 0 <= number < spec.max_nodes:
            return (
                f"ranks=infrastructure refuses spares: this node has number {number} and at most {spec.max_nodes} take "
                f"part, so no rank would be left for it; {instead}"
            )
        holder = self.nodes.get(self._numbers.get(number, ""))
        if holder is not None and holder.spec.node_id != spec.node_id and holder.link is not None:
            return (
                f"ranks=infrastructure refuses spares: nodes {holder.spec.node_id} and {spec.node_id} both have "
                f"number {number} (SLURM_PROCID or GROUP_RANK); {instead}"
            )
        return ""


def _plain(value: object) -> str:
    return value.value if isinstance(value, RankPolicy) else str(value)


class Evictions:
    """Processes that were turned out of a round, and why; the newest EVICTED_KEPT_MAX."""

    def __init__(self) -> None:
        self._reasons: collections.OrderedDict[tuple[str, str], str] = collections.OrderedDict()

    def add(self, spec: NodeSpec, reason: str) -> None:
        self._reasons[spec.node_id, spec.nonce] = reason
        if len(self._reasons) > EVICTED_KEPT_MAX:
            self._reasons.popitem(last=False)

    def reason(self, spec: NodeSpec) -> str | None:
        return self._reasons.get((spec.node_id, spec.nonce))
