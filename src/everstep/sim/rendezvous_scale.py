"""What a rendezvous of very many nodes costs each of them: messages and bytes, by the real machines."""

import collections
import functools
from collections.abc import Callable, Iterator

import msgspec

from everstep.core.messages import Effect, SendToNodes
from everstep.core.node import NodeMachine, NodeStage
from everstep.core.node_messages import FromNode, NodeSpec, StoreCall, StoreOp, StoreReply, ToNode
from everstep.core.rendezvous import NodeLinkClosed, NodeMessage, RendezvousConfig, RendezvousMachine

_encoder = msgspec.msgpack.Encoder()


class ScaleRounds:
    """`nodes` machines and one lighthouse, whose messages arrive at once. Counts what each costs on the wire."""

    def __init__(self, nodes: int) -> None:
        self.count = nodes
        self.messages = self.bytes = 0
        self.now = 0.0
        config = RendezvousConfig(job_id="scale", group="", life="life")
        self.machine = RendezvousMachine(config)
        self.machine.start(0.0)
        self.nodes = [
            NodeMachine("", NodeSpec(node_id=f"node{i}", nonce=f"{i:016x}", min_nodes=nodes - 1, max_nodes=nodes))
            for i in range(nodes)
        ]
        self._queue: collections.deque[tuple[int, ToNode]] = collections.deque()
        self._encoded: tuple[ToNode | None, int] = (None, 0)

    def join(self) -> None:
        """Every node connects and joins; the round is complete."""
        for index, node in enumerate(self.nodes):
            self._from_node(index, node.join())
            self._deliver()
        self._check(len(self.nodes))

    def lose_one(self) -> None:
        """The last node dies; the others hear it, come back, and have a round without it."""
        self._perform(self.machine.receive(NodeLinkClosed(len(self.nodes)), self.now))
        del self.nodes[-1]
        deadline = self.machine.next_deadline()
        assert deadline is not None
        self.now = deadline
        self._perform(self.machine.tick(self.now))
        self._deliver()
        for index, node in enumerate(self.nodes):
            assert node.needs_new_round
            self._from_node(index, node.join())
            self._deliver()
        self._check(len(self.nodes))

    def number_workers(self) -> None:
        """As torch's agents: each sets its role, rank 0 gets all and sets each one's ranks, each gets its own."""
        last = [node.last for node in self.nodes]
        rank0 = next(i for i, info in enumerate(last) if info is not None and info.rank == 0)
        keys = tuple(f"torchelastic/role_info/{rank}" for rank in range(len(last)))
        for index, info in enumerate(last):
            assert info is not None
            self._call(index, 1, StoreOp.SET, (keys[info.rank],), (b"x" * 60,))
        self._call(rank0, 2, StoreOp.GET, keys)
        ranks = tuple(f"torchelastic/assigned_ranks/{rank}" for rank in range(len(last)))
        self._call(rank0, 3, StoreOp.SET, ranks, (b"[0, 10000, 0, 10000]",) * len(last))
        for index, info in enumerate(last):
            assert info is not None
            self._call(index, 4, StoreOp.GET, (ranks[info.rank],))
        self._deliver()

    def _call(
        self, index: int, number: int, op: StoreOp, keys: tuple[str, ...], values: tuple[bytes, ...] = ()
    ) -> None:
        info = self.nodes[index].last
        assert info is not None
        self._from_node(index, [StoreCall(number, info.round, op, keys, values)])

    def _from_node(self, index: int, messages: list[FromNode]) -> None:
        for message in messages:
            self._count(message)
            self._perform(self.machine.receive(NodeMessage(index + 1, message), self.now))

    def _perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, SendToNodes):
                size = len(_encoder.encode(effect.message))
                self.messages += len(effect.links)
                self.bytes += size * len(effect.links)
                self._queue.extend((link, effect.message) for link in effect.links)

    def _count(self, message: FromNode) -> None:
        self.messages += 1
        self.bytes += len(_encoder.encode(message))

    def _deliver(self) -> None:
        while self._queue:
            link, message = self._queue.popleft()
            if isinstance(message, StoreReply) or link > len(self.nodes):
                continue
            node = self.nodes[link - 1]
            self._from_node(link - 1, node.receive(message))
            if node.host is not None:
                self._from_node(link - 1, node.hosted(node.host, "10.0.0.1:29500"))

    def describe(self, name: str) -> str:
        messages, size = self.messages / self.count, self.bytes / self.count
        return f"{self.count} nodes, {name}: {messages:.2f} messages and {size:.0f} bytes a node"

    def _check(self, size: int) -> None:
        ranks = {node.last.rank for node in self.nodes if node.last is not None and node.stage is NodeStage.MEMBER}
        assert ranks == set(range(size)), "not every node is in the round"


def scale_rounds(nodes: int) -> Iterator[tuple[Callable[[], object], Callable[[], str]]]:
    """What to do (join, the loss of a node, the workers' ranks), and then what to say of it."""
    world = ScaleRounds(nodes)
    for name, call in (("join", world.join), ("one lost", world.lose_one), ("workers numbered", world.number_workers)):
        world.messages = world.bytes = 0
        yield call, functools.partial(world.describe, name)
