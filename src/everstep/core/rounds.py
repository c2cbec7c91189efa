"""The rounds of one rendezvous, one after the other.

    FORMING    nodes come; core/barrier.py says when they are enough
    HOSTING    the round's nodes and ranks are fixed; rank 0 opens the store. Whoever dies now sends it back to FORMING
    COMPLETE   every node of the round knows it. One that dies, leaves or asks for the next round dissolves it

At most one round is HOSTING or COMPLETE; who comes later waits in the barrier of the next.
"""

import enum
import itertools

from everstep.core.barrier import Barrier, BarrierPolicy, Verdict
from everstep.core.events import NAMES_MAX, EventKind, JobEvent
from everstep.core.messages import Close, Effect, Log, Publish, SendToNodes
from everstep.core.node_messages import (
    CloseScope,
    HostStore,
    NodeHealth,
    NodeRefusal,
    NodeRefused,
    NodesWaiting,
    RendezvousClosed,
    RoundComplete,
    RoundDissolved,
    RoundInfo,
    StoreCall,
    StoreReply,
    StoreStatus,
    ToNode,
)
from everstep.core.ranks import Candidate, assign
from everstep.core.rendezvous_nodes import ADDRESS_CHARS_MAX, Node, NodeRoster, RendezvousConfig
from everstep.core.round_store import Answers, RoundStore
from everstep.core.types import RendezvousRound


class Stage(enum.Enum):
    """How far the next round is, or that it stands."""

    FORMING = "forming"
    HOSTING = "hosting"
    COMPLETE = "complete"


class Rounds:
    """Knows rounds and not links; the roster turns nodes into links."""

    def __init__(self, config: RendezvousConfig, roster: NodeRoster) -> None:
        self._config = config
        self._roster = roster
        self._barrier = Barrier()
        self._store = RoundStore()
        self.stage = Stage.FORMING
        self.round: RendezvousRound | None = None  # that is HOSTING or COMPLETE
        self.ranks: dict[str, int] = {}  # of its nodes; while it is put together again, of those that came back
        self.size = 0
        self.host_until: float | None = None
        self.is_closed = False  # for good
        self._address = ""
        self._restarts = 0
        self._numbered = 0  # the highest number of a round that was ever heard of
        self._over = 0  # rounds up to this number are over for certain
        self._remembered = (0, 0)  # number and size of the round before a restart of the lighthouse
        self._taken: set[int] = set()  # ranks of a round that is put together again
        self._told_waiting = 0
        self._tell_waiting_at = 0.0

    # ---- time

    def form(self, now: float) -> list[Effect]:
        """FORMING: see whether those who are here are enough."""
        if self.stage is not Stage.FORMING:
            return []
        if not self._roster.nodes:
            self._barrier.clear()
            return []
        policy = self._policy()
        match self._barrier.verdict(policy, now):
            case Verdict.COMPLETE:
                return self._choose(policy, now)
            case Verdict.FAIL:
                return self._fail(policy)
            case Verdict.WAIT:
                return []

    def next_forming_deadline(self) -> float | None:
        return self._barrier.next_deadline() if self.stage is Stage.FORMING else None

    def tell_waiting(self, now: float) -> list[Effect]:
        """The round's nodes hear how many wait; not more often than the interval, however many come."""
        count = self._waiting()
        if count == self._told_waiting or now < self._tell_waiting_at:
            return []
        self._told_waiting = count
        self._tell_waiting_at = now + self._config.waiting_interval_s
        return [SendToNodes(NodesWaiting(count), self._roster.links(self.ranks))]

    def next_telling(self) -> float | None:
        return self._tell_waiting_at if self._waiting() != self._told_waiting else None

    def _waiting(self) -> int:
        """Of those who wait, how many would find room in the next round; the rest are spares."""
        if self.stage is not Stage.COMPLETE:
            return self._told_waiting
        return max(0, min(len(self._barrier.here), self._policy().max_nodes - self.size))

    # ---- nodes

    def is_in(self, node_id: str, round_: RendezvousRound) -> bool:
        return self.stage is Stage.COMPLETE and round_ == self.round and node_id in self.ranks

    @property
    def host(self) -> str | None:
        """Who opens the store."""
        return next((node_id for node_id, rank in self.ranks.items() if rank == 0), None)

    def join(self, node: Node, known: RendezvousRound | None, rank: int | None = None) -> list[Effect]:
        """It wants into the next round; `known` is the last that it was in, `rank` its rank there as it says."""
        node_id = node.spec.node_id
        if known is not None:
            self._over = max(self._over, known.n)
            if self.stage is Stage.COMPLETE and known == self.round:
                self._barrier.come(node_id)
                if rank is not None and rank not in self._taken:
                    self.ranks.setdefault(node_id, rank)
                return self.dissolve(f"node {node_id} asks for the next round", knows=node_id)
        if node_id not in self.ranks:
            self._barrier.come(node_id)
        elif self.stage is Stage.COMPLETE:
            return self._to(node, self._complete_for(node_id))  # the first one was lost with its link
        elif self.ranks[node_id] == 0:
            return self._ask_for_store()
        return []

    def gone(self, node_id: str, why: str, now: float) -> list[Effect]:
        """It is dead, or has left."""
        self._barrier.go(node_id)
        if self.ranks.pop(node_id, None) is None:
            return []
        if self.stage is Stage.COMPLETE:
            if self.is_closed:  # there is no next round: the others end as they like
                if not self.ranks:
                    self._end()
                return []
            if self._min_healthy():
                return []  # that depends on how many are left: `judge`
            return self.dissolve(f"node {node_id} is gone: {why}")
        self._end()
        self._barrier.last_call_at = now  # those who are left had come in time
        return [Log("round not completed", {"group": self._config.group, "why": f"node {node_id} is gone: {why}"})]

    def judge(self, why: str) -> list[Effect]:
        """`why` changed how its nodes are: where they ask for it (`min_healthy`), see whether enough are healthy."""
        if self.stage is not Stage.COMPLETE or self.is_closed or not self.ranks or not self.is_short:
            return []
        return self.dissolve(why)

    @property
    def is_finished(self) -> bool:
        """Every node that can has come to the end of its work."""
        healths = self._healths() if self.stage is Stage.COMPLETE and not self.is_short else []
        return NodeHealth.FINISHED in healths and NodeHealth.HEALTHY not in healths

    def _healths(self) -> list[NodeHealth]:
        return [self._roster.nodes[node_id].health for node_id in self.ranks]

    def _min_healthy(self) -> int:
        return next(iter(self._roster.nodes.values())).spec.min_healthy if self._roster.nodes else 0

    def tell(self, node: Node) -> list[Effect]:
        """It is in the round, and its link is new."""
        return self._to(node, NodesWaiting(self._told_waiting)) if self._told_waiting else []

    # ---- one round

    def _choose(self, policy: BarrierPolicy, now: float) -> list[Effect]:
        first = next(iter(self._roster.nodes.values())).spec
        chosen = assign(first.ranks, self._candidates(), policy.max_nodes, first.domain_size)
        self._numbered += 1
        self.stage, self.round = Stage.HOSTING, RendezvousRound(self._numbered, self._config.life)
        self.ranks = {node_id: rank for rank, node_id in enumerate(chosen)}
        self.size = len(chosen)
        self.host_until = now + self._config.host_timeout_s
        return self._ask_for_store()

    def _candidates(self) -> list[Candidate]:
        found = []
        for order, node_id in enumerate(self._barrier.here):
            spec = self._roster.nodes[node_id].spec
            found.append(
                Candidate(
                    node_id=node_id,
                    arrived=order,
                    previous=self._barrier.previous.get(node_id),
                    infrastructure=spec.infrastructure_rank,
                    domain=spec.domain,
                )
            )
        return found

    def _ask_for_store(self) -> list[Effect]:
        assert self.round is not None
        assert self.host is not None
        return self._to(self._roster.nodes[self.host], HostStore(self.round, self.size))

    def hosted(self, node: Node, round_: RendezvousRound, address: str) -> list[Effect]:
        if self.stage is not Stage.HOSTING or round_ != self.round or self.host != node.spec.node_id:
            return []  # of a round that came to nothing
        if not 0 < len(address) <= ADDRESS_CHARS_MAX or not address.isprintable():
            return [Close(node.link or 0, f"an address of {len(address)} characters for its store")]
        self.stage, self._address, self.host_until = Stage.COMPLETE, address, None
        self._store = RoundStore()
        self._restarts = max(self._roster.nodes[node_id].restarts for node_id in self.ranks)
        for node_id in self.ranks:
            self._roster.nodes[node_id].health = NodeHealth.HEALTHY
            self._barrier.here.pop(node_id)
        self._barrier.rest()
        self._told_waiting = 0
        fields: dict[str, object] = {"round": str(round_), "nodes": self.size, "store": address}
        out: list[Effect] = [Log("round complete", {"group": self._config.group, **fields})]
        out += self._publish(EventKind.RENDEZVOUS_COMPLETED, f"store at {address}")
        for node_id in self.ranks:
            out += self._to(self._roster.nodes[node_id], self._complete_for(node_id))
        return out

    def _complete_for(self, node_id: str) -> RoundComplete:
        assert self.round is not None
        return RoundComplete(RoundInfo(self.round, self.ranks[node_id], self.size, self._address, self._restarts))

    def dissolve(self, why: str, knows: str = "") -> list[Effect]:
        """The round is over; its living nodes are told, but for the one that `knows`."""
        assert self.round is not None
        told = RoundDissolved(self.round, why)
        previous = self.ranks
        out: list[Effect] = [
            Log("round dissolved", {"group": self._config.group, "round": str(self.round), "why": why}),
            *self._publish(EventKind.RENDEZVOUS_DISSOLVED, why),
            SendToNodes(told, self._roster.links([node_id for node_id in previous if node_id != knows])),
            *self._answers(self._store.end()),
        ]
        self._end()
        self._barrier.reopen(previous)
        return out

    def _end(self) -> None:
        assert self.round is not None
        self._over = max(self._over, self.round.n)
        self.stage, self.round, self.host_until = Stage.FORMING, None, None
        self.ranks = {}
        self._store = RoundStore()

    def _fail(self, policy: BarrierPolicy) -> list[Effect]:
        here = self._barrier.clear()
        why = (
            f"{len(here)} of at least {policy.min_nodes} nodes came within {policy.join_timeout_s:g} s: check that the "
            "other nodes run, with the same rendezvous id and endpoint"
        )
        refused = NodeRefused(NodeRefusal.TIMEOUT, why)
        out: list[Effect] = [Log("rendezvous failed", {"group": self._config.group, "why": why})]
        return [*out, *self._publish(EventKind.RENDEZVOUS_FAILED, why), SendToNodes(refused, self._roster.links(here))]

    def close(self, scope: CloseScope, why: str) -> list[Effect]:
        """Those who wait or are joining go with empty hands; for the nodes of a complete round see CloseScope."""
        is_full = self.stage is Stage.COMPLETE and self.size >= self._policy().max_nodes
        here = self._barrier.here
        beside = [node_id for node_id in self._roster.nodes if node_id not in here]
        out: list[Effect] = [Log("closed", {"group": self._config.group, "scope": scope.value, "why": why})]
        out += self._publish(EventKind.RENDEZVOUS_CLOSED, f"{scope.value}: {why}")
        out.append(SendToNodes(RendezvousClosed(scope, why), self._roster.links(beside)))
        if scope is CloseScope.ROUND and self.stage is Stage.COMPLETE:
            return out + self.dissolve(f"closed: {why}")  # who waits goes on to the next round
        if self.stage is Stage.HOSTING:
            self._end()
        out.append(SendToNodes(RendezvousClosed(scope, why, was_spare=is_full), self._roster.links(here)))
        self._barrier.clear()
        return out

    # ---- after a restart of the lighthouse

    def take_up(self, node: Node, last: RoundInfo, is_returning: bool) -> list[Effect]:
        """A node says that it is in a complete round: put that together again, unless it is over for certain."""
        out: list[Effect] = []
        if last.round.life != self._config.life and last.round.n > self._over and is_returning:
            if self.stage is Stage.COMPLETE and self.round is not None and self.round.n < last.round.n:
                out += self.dissolve("a later round stands")
            if self.stage is Stage.FORMING:
                self.stage, self.round, self.ranks = Stage.COMPLETE, last.round, {}
                self._taken.clear()
                self._remembered = (last.round.n, last.size)
                self.size, self._address, self._restarts = last.size, last.store, last.restarts
                self._told_waiting = 0
        self.heard_of(last.round)
        is_free = is_returning and last.rank not in self._taken and 0 <= last.rank < self.size
        if self.stage is not Stage.COMPLETE or self.round != last.round or self.size != last.size or not is_free:
            if is_returning:
                self.remember(node, last)
            ended = RoundDissolved(last.round, "it ended while this node was not connected")
            return out + self._to(node, ended)
        self.ranks[node.spec.node_id] = last.rank
        self._taken.add(last.rank)
        if not self.is_short:
            fields: dict[str, object] = {"group": self._config.group, "round": str(self.round), "nodes": self.size}
            out.append(Log("round goes on after a restart", fields))
        return out

    def heard_of(self, round_: RendezvousRound) -> None:
        """Numbers grow, also over a restart."""
        self._numbered = max(self._numbered, round_.n)

    def remember(self, node: Node, last: RoundInfo) -> None:
        """After a restart: a node was in a round that is over. It keeps its rank in the next."""
        if self.stage is not Stage.FORMING or last.round.life == self._config.life:
            return
        if last.round.n > self._remembered[0]:
            self._barrier.reopen({})
            self._remembered = (last.round.n, last.size)
        if last.round.n == self._remembered[0]:
            self._barrier.previous[node.spec.node_id] = last.rank
            if node.spec.node_id not in self._barrier.here:
                self._barrier.absent[node.spec.node_id] = None

    @property
    def are_all_back(self) -> bool:
        """Every node of the round before the restart is here, whether the round goes on or not."""
        known = len(self.ranks) if self.stage is Stage.COMPLETE else len(self._barrier.previous)
        return known == self._remembered[1] > 0

    @property
    def is_short(self) -> bool:
        """Complete, but some of its nodes are not there, or too few of them are healthy."""
        if self.stage is not Stage.COMPLETE:
            return False
        wanted = self._min_healthy()
        healthy = sum(health is not NodeHealth.UNHEALTHY for health in self._healths())
        return healthy < wanted if wanted else len(self.ranks) < self.size

    def status(self) -> dict[str, object]:
        ranks = itertools.islice(self.ranks, NAMES_MAX)
        return {
            "stage": self.stage.value,
            "round": str(self.round) if self.round is not None else None,
            "size": self.size if self.round is not None else 0,
            "here": len(self._barrier.here),
            "ranks": {node_id: self.ranks[node_id] for node_id in ranks},
            "store": self._address if self.stage is Stage.COMPLETE else "",
        }

    # ---- the store

    def call_store(self, node: Node, link: int, call: StoreCall) -> list[Effect]:
        if not self.is_in(node.spec.node_id, call.round):
            return self._to(node, StoreReply(call.number, StoreStatus.ROUND_OVER))
        return self._answers(self._store.call(link, call))

    def store_link_closed(self, link: int) -> None:
        self._store.link_closed(link)

    # ---- effects

    def _policy(self) -> BarrierPolicy:
        """Of the node that came first; what later ones may not differ in, NodeRoster.flaw says."""
        spec = next(iter(self._roster.nodes.values())).spec
        return BarrierPolicy(
            min_nodes=spec.min_nodes,
            max_nodes=spec.max_nodes,
            join_timeout_s=spec.join_timeout_s,
            last_call_s=spec.last_call_s,
        )

    def _to(self, node: Node, message: ToNode) -> list[Effect]:
        return [SendToNodes(message, (node.link,))] if node.link is not None else []

    def _answers(self, answers: Answers) -> list[Effect]:
        return [SendToNodes(reply, (link,)) for link, reply in answers]

    def _publish(self, kind: EventKind, evidence: str) -> list[Effect]:
        names = tuple(itertools.islice(self.ranks, NAMES_MAX))
        return [
            Publish(
                JobEvent(
                    kind=kind,
                    group=self._config.group,
                    round=str(self.round or ""),
                    evidence=evidence,
                    member_count=len(self.ranks),
                    members=names,
                )
            )
        ]
