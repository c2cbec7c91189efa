"""One rendezvous: the nodes of one (job, group) agree on who takes part, with which rank, and where the store is.

This file says who is here: who came, who is dead, who came back. core/rounds.py says what they agree on. Nothing is
journalled: after a restart of the lighthouse the nodes say what they are in (NodeHello), and the round is put together
again from what they say. Until `return_timeout_s` have passed no new round begins then.
"""

import dataclasses

from everstep.core.events import EventKind, JobEvent
from everstep.core.exclusions import Exclusions
from everstep.core.learned import JobIntervals, Teller
from everstep.core.messages import Cause, Close, Effect, Log, Publish, SendToNodes
from everstep.core.node_messages import (
    CloseRendezvous,
    CloseScope,
    ExcludeNode,
    FromNode,
    IntervalsSeen,
    JoinRound,
    LeaveRendezvous,
    NodeHealth,
    NodeHeartbeat,
    NodeHello,
    NodeRefusal,
    NodeRefused,
    NodesExcluded,
    NodeStands,
    NodeWelcome,
    RankReport,
    RendezvousClosed,
    StoreCall,
    StoreHosted,
)
from everstep.core.rank_news import event_of
from everstep.core.rendezvous_nodes import ROUNDS_MAX, Evictions, Lost, Node, NodeRoster, RendezvousConfig
from everstep.core.rounds import Rounds, Stage
from everstep.core.types import RendezvousRound

__all__ = ["NodeLinkClosed", "NodeMessage", "RendezvousConfig", "RendezvousEvent", "RendezvousMachine", "Stage"]

FINISHED = "every node has finished"  # why a rendezvous was closed by itself
REASON_CHARS_MAX = 200


@dataclasses.dataclass(frozen=True)
class NodeMessage:
    link: int
    message: FromNode


@dataclasses.dataclass(frozen=True)
class NodeLinkClosed:
    link: int
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class AdmitNode:
    """The operator lets an excluded node in again. To every machine of the job."""

    node: str


RendezvousEvent = NodeMessage | NodeLinkClosed | AdmitNode


class RendezvousMachine:
    """Links are numbered by the shell; a closed link's number never comes back."""

    def __init__(
        self, config: RendezvousConfig, exclusions: Exclusions | None = None, intervals: JobIntervals | None = None
    ) -> None:
        self._config = config
        self._intervals = intervals if intervals is not None else JobIntervals()
        self._teller = Teller(self._intervals)
        self._exclusions = exclusions if exclusions is not None else Exclusions()
        self._exclusions_told = self._exclusions.version
        self._roster = NodeRoster(config)
        self._rounds = Rounds(config, self._roster)
        self._evictions = Evictions()
        self._contending: dict[int, str] = {}  # links of second processes with one node_id
        self._settled_at = 0.0
        self._return_until: float | None = None  # until then, nodes of a round of before may come back
        self._closed: str | None = None  # why
        self._closed_until: float | None = None
        self._ended: dict[str, None] = {}  # nodes that knew of it, and have gone

    # ---- the machine contract

    def start(self, now: float) -> list[Effect]:
        self._settled_at = now + self._config.return_timeout_s
        if self._config.is_return:
            self._return_until = self._settled_at
        return []

    def receive(self, event: RendezvousEvent, now: float) -> list[Effect]:
        if isinstance(event, NodeMessage):
            out = self._message(event.link, event.message, now)
        elif isinstance(event, AdmitNode):
            out = self._admit(event.node)
        else:
            out = self._link_closed(event.link, event.detail, now)
        return out + self._tell_excluded() + self.tick(now)

    def tick(self, now: float) -> list[Effect]:
        out: list[Effect] = []
        for lost in self._roster.expired(now):
            out += self._lose(lost, now)
        if self._rounds.host_until is not None and now >= self._rounds.host_until and self._rounds.host is not None:
            detail = f"it opened no store for the round within {self._config.host_timeout_s:g} s"
            out += self._lose(Lost(self._rounds.host, Cause.NO_READY, detail), now)
        if self._return_until is not None and now >= self._return_until:
            self._return_until = None
            if self._rounds.is_short:
                missing = self._rounds.size - len(self._rounds.ranks)
                out += self._rounds.dissolve(f"{missing} nodes did not come back after a restart of the lighthouse")
            out += self._judge("its nodes are back")
        if self._closed_until is not None and now >= self._closed_until:
            self._reopen()
        if self._return_until is None and self._closed is None:
            out += self._rounds.form(now)
        return out + self._rounds.tell_waiting(now) + self._teller.tell(self._every_link, now)

    def next_deadline(self) -> float | None:
        deadlines = [
            self._roster.next_deadline(),
            self._rounds.host_until,
            self._rounds.next_telling(),
            self._return_until,
            self._closed_until,
            self._teller.next_deadline(),
        ]
        if self._return_until is None and self._closed is None:
            deadlines.append(self._rounds.next_forming_deadline())
        return min((d for d in deadlines if d is not None), default=None)

    @property
    def is_idle(self) -> bool:
        """Nobody is here, and nothing is remembered that somebody could ask for."""
        return not self._roster.nodes and self._closed is None and self._return_until is None

    def status(self) -> dict[str, object]:
        """Plain JSON values, for people."""
        return {**self._rounds.status(), "nodes": len(self._roster.nodes), "closed": self._closed}

    # ---- messages

    def _message(self, link: int, message: FromNode, now: float) -> list[Effect]:
        if isinstance(message, NodeHello):
            return self._hello(link, message, now)
        node = self._roster.on(link)
        if node is None:
            return []  # of one that was refused, and has not read it yet
        self._roster.heard(node.spec.node_id, now)
        out = self._refuse_contender(node)
        match message:
            case NodeHeartbeat():
                pass
            case JoinRound(known, restarts):
                node.restarts = max(node.restarts, min(restarts, ROUNDS_MAX))
                out += self._turn_away(node, link, now) or self._join(node, known)
            case ExcludeNode(reason):
                out += self._exclude(node.spec.excluded_as, reason)
            case NodeStands(round_, health):
                out += self._stands(node, round_, health)
            case StoreHosted(round_, address):
                out += self._rounds.hosted(node, round_, address)
            case LeaveRendezvous(reason):
                out += self._remove(node, f"it left: {reason[:REASON_CHARS_MAX]}" if reason else "it left", now)
            case CloseRendezvous(scope, reason):
                out += self._close(scope, f"node {node.spec.node_id}: {reason[:REASON_CHARS_MAX]}")
            case IntervalsSeen(intervals):
                self._intervals.hear((self._config.group, node.spec.node_id), intervals, now)
            case RankReport() if node.news.take(now):
                out.append(event_of(message, node.spec.node_id, self._config.group))
            case StoreCall():
                out += self._rounds.call_store(node, link, message)
        return out

    def _hello(self, link: int, hello: NodeHello, now: float) -> list[Effect]:
        spec = hello.node
        out: list[Effect] = []
        reason = self._evictions.reason(spec)
        if reason is not None:
            return [
                _refusal(
                    link, hello.node.nonce, NodeRefusal.EVICTED, f"this node was turned out of its round: {reason}"
                )
            ]
        if hello.lighthouse not in ("", self._config.life):
            self._exclusions.recall(hello.excluded)
        if hello.is_joining and (why := self._why_excluded(spec.excluded_as)):
            return [_refusal(link, spec.nonce, NodeRefusal.EXCLUDED, why)]
        old = self._roster.nodes.get(spec.node_id)
        if old is not None and old.spec.nonce != spec.nonce:
            if old.link is not None and old.link != link:
                return self._contend(old, link, hello)
            out += self._lose(Lost(spec.node_id, Cause.SUPERSEDED, "a new process has its node_id"), now)
            return out + self._hello(link, hello, now)  # one that waited for the id has it now, and comes first
        flaw = self._roster.flaw(hello)
        if flaw:
            return [*out, _refusal(link, hello.node.nonce, NodeRefusal.BAD_CONFIG, flaw)]
        if spec.node_id not in self._roster.nodes:
            out.append(Log("node came", {"group": self._config.group, "node": spec.node_id}))
        node = self._roster.register(spec, link, now)
        node.restarts = max(node.restarts, hello.restarts)
        config = self._config
        out.append(
            SendToNodes(NodeWelcome(config.life, config.heartbeat_interval_s, config.heartbeat_timeout_s), (link,)),
        )
        if self._exclusions.nodes:
            out.append(SendToNodes(NodesExcluded(self._exclusions.nodes), (link,)))
        return out + self._teller.greet(link) + self._go_on(node, hello, now)

    def _go_on(self, node: Node, hello: NodeHello, now: float) -> list[Effect]:
        """Where this node stood when its link, or the lighthouse, went."""
        out: list[Effect] = []
        if hello.is_joining and node.spec.node_id in self._ended and len(self._roster.nodes) == 1:
            self._reopen()  # a node that saw the end is started again, and nobody is left of before: a new run
        if hello.lighthouse not in ("", self._config.life) and now < self._settled_at:
            self._return_until = self._settled_at  # this lighthouse has lost its memory: others will come back too
        if hello.is_closed:
            out += self._close(CloseScope.JOB, "closed before the lighthouse was started again")
        elif self._closed is not None and not hello.is_joining:
            out.append(SendToNodes(RendezvousClosed(CloseScope.JOB, self._closed), self._links(node)))
        last = hello.last
        if last is not None:
            self._rounds.heard_of(last.round)
            if hello.is_member and self._rounds.is_in(node.spec.node_id, last.round):
                out += self._rounds.tell(node)
            elif hello.is_member:
                out += self._rounds.take_up(node, last, self._return_until is not None)
            elif self._return_until is not None:
                self._rounds.remember(node, last)
        if hello.is_joining:
            out += self._join(node, last.round, last.rank) if last is not None else self._join(node, None)
        if self._return_until is not None and self._rounds.are_all_back:
            self._settle(now)
        return out + self._judge("its nodes are back")

    def _settle(self, now: float) -> None:
        """Everybody is back."""
        self._return_until, self._settled_at = None, now

    # ---- excluded by their own scripts

    def _why_excluded(self, name: str) -> str:
        reason = self._exclusions.reason(name)
        if reason is None:
            return ""
        return f"node {name} is excluded: {reason}. Mend it, then `everstep nodes admit {name}`"

    def _exclude(self, name: str, reason: str) -> list[Effect]:
        if not self._exclusions.add(name, reason):
            return [Log("node not excluded", {"node": name, "why": "it is already, or too many are"})]
        event = JobEvent(
            kind=EventKind.NODE_EXCLUDED, group=self._config.group, node=name, evidence=reason[:REASON_CHARS_MAX]
        )
        return [Log("node excluded", {"node": name, "why": reason[:REASON_CHARS_MAX]}), Publish(event)]

    def _turn_away(self, node: Node, link: int, now: float) -> list[Effect]:
        """Nothing, if it may join."""
        why = self._why_excluded(node.spec.excluded_as)
        if not why:
            return []
        return [_refusal(link, node.spec.nonce, NodeRefusal.EXCLUDED, why), *self._remove(node, "it is excluded", now)]

    def _admit(self, name: str) -> list[Effect]:
        if not self._exclusions.admit(name):
            return []  # another group's machine has done it
        return [Log("node admitted", {"node": name}), Publish(JobEvent(kind=EventKind.NODE_ADMITTED, node=name))]

    def _tell_excluded(self) -> list[Effect]:
        if self._exclusions_told == self._exclusions.version:
            return []
        self._exclusions_told = self._exclusions.version
        links = self._every_link()
        return [SendToNodes(NodesExcluded(self._exclusions.nodes), links)] if links else []

    # ---- coming and going

    def _join(self, node: Node, known: RendezvousRound | None, rank: int | None = None) -> list[Effect]:
        if self._closed is not None:
            return [SendToNodes(RendezvousClosed(CloseScope.JOB, self._closed), self._links(node))]
        return self._rounds.join(node, known, rank)

    def _close(self, scope: CloseScope, why: str) -> list[Effect]:
        if self._closed is not None:
            return []
        if scope is CloseScope.JOB:
            self._closed, self._rounds.is_closed = why, True
        return self._rounds.close(scope, why)

    def _stands(self, node: Node, round_: RendezvousRound, health: NodeHealth) -> list[Effect]:
        if not self._rounds.is_in(node.spec.node_id, round_):
            return []
        node.health = health
        return self._judge(f"node {node.spec.node_id} is {health.value}")

    def _judge(self, why: str) -> list[Effect]:
        """Whether the round can go on, or has come to its end; only while everybody is back."""
        if self._return_until is not None or self._closed is not None:
            return []
        out = self._rounds.judge(why)
        return out + (self._close(CloseScope.JOB, FINISHED) if self._rounds.is_finished else [])

    def _reopen(self) -> None:
        self._closed, self._closed_until, self._rounds.is_closed = None, None, False
        self._ended.clear()

    def _contend(self, old: Node, link: int, hello: NodeHello) -> list[Effect]:
        """Another process has this id. Whoever holds it keeps it if it is heard of again; if not, it is dead."""
        if old.contender is not None and old.contender[0] != link:
            return [_refusal(link, hello.node.nonce, NodeRefusal.NODE_ID_TAKEN, _taken(hello))]
        old.contender = (link, hello)
        self._contending[link] = hello.node.node_id
        return []

    def _refuse_contender(self, node: Node) -> list[Effect]:
        if node.contender is None:
            return []
        (link, hello), node.contender = node.contender, None
        self._contending.pop(link, None)
        return [_refusal(link, hello.node.nonce, NodeRefusal.NODE_ID_TAKEN, _taken(hello))]

    def _link_closed(self, link: int, detail: str, now: float) -> list[Effect]:
        contended = self._contending.pop(link, None)
        holder = self._roster.nodes.get(contended) if contended is not None else None
        if holder is not None and holder.contender is not None and holder.contender[0] == link:
            holder.contender = None
        self._rounds.store_link_closed(link)
        self._roster.link_closed(link, detail or "its link closed", now)
        return []

    def _lose(self, lost: Lost, now: float) -> list[Effect]:
        """A node is dead, as far as can be told. One that was silent in its round hears of that when it comes back."""
        node = self._roster.nodes.get(lost.node_id)
        if node is None:
            return []
        out: list[Effect] = []
        is_in_round = self._rounds.stage is Stage.COMPLETE and lost.node_id in self._rounds.ranks
        if is_in_round and lost.cause is not Cause.LINK_CLOSED:
            self._evictions.add(node.spec, lost.detail)
            event = JobEvent(
                kind=EventKind.NODE_EVICTED,
                group=self._config.group,
                node=lost.node_id,
                cause=lost.cause,
                evidence=lost.detail,
            )
            out.append(Publish(event))
        if node.link is not None:
            out.append(Close(node.link, lost.detail))
        return out + self._remove(node, f"{lost.cause.value}, {lost.detail}", now)

    def _remove(self, node: Node, why: str, now: float) -> list[Effect]:
        node_id = node.spec.node_id
        if node.link is not None:
            self._rounds.store_link_closed(node.link)
        self._roster.remove(node_id)
        self._intervals.forget((self._config.group, node_id), now)
        out: list[Effect] = [Log("node gone", {"group": self._config.group, "node": node_id, "why": why})]
        out += self._rounds.gone(node_id, why, now)
        out += self._judge(f"node {node_id} is gone: {why}")
        if self._closed is not None:
            self._ended[node_id] = None
        if self._closed is not None and not self._roster.nodes and self._closed_until is None:
            self._closed_until = now + self._config.closed_kept_s
        if node.contender is not None:
            self._contending.pop(node.contender[0], None)
            out += self._hello(*node.contender, now)
        return out

    def _every_link(self) -> tuple[int, ...]:
        return tuple(node.link for node in self._roster.nodes.values() if node.link is not None)

    def _links(self, node: Node) -> tuple[int, ...]:
        return (node.link,) if node.link is not None else ()


def _refusal(link: int, nonce: str, code: NodeRefusal, detail: str) -> SendToNodes:
    return SendToNodes(NodeRefused(code, detail, nonce), (link,))


def _taken(hello: NodeHello) -> str:
    return (
        f"node id {hello.node.node_id} belongs to another live process of group {hello.group!r}: give each node an id "
        "of its own"
    )
