"""Who is connected to the lighthouse on which link, and which member lists each of them already has."""

import dataclasses
from collections.abc import Iterable

from everstep.core.messages import Heartbeat, Hello, MembersChange, Send, ToMember, changed, whole
from everstep.core.types import Member, MemberId, Quorum, QuorumId

LISTS_KNOWN_MAX = 8


@dataclasses.dataclass
class Peer:
    """One process that said Hello. `link` is None while it is disconnected."""

    member: MemberId
    hello: Hello
    link: int | None
    known: dict[QuorumId, None] = dataclasses.field(default_factory=dict)
    heartbeat: Heartbeat = dataclasses.field(default_factory=Heartbeat)
    heard_at: float = 0.0
    leaving: bool = False  # said Goodbye
    unvouched: dict[str, None] = dataclasses.field(default_factory=dict)  # workers whose agents were asked

    def learn(self, quorum_id: QuorumId) -> None:
        """It has (or is being sent) the member list of this quorum. It keeps more lists than we count on."""
        self.known[quorum_id] = None
        if len(self.known) > LISTS_KNOWN_MAX:
            del self.known[next(iter(self.known))]

    @property
    def address(self) -> Member:
        return Member(self.member, self.hello.store, self.hello.recovery)


class Roster:
    """Peers by member and by link. A link is FIFO: what was sent on it is known to the peer before what follows."""

    def __init__(self) -> None:
        self._by_member: dict[MemberId, Peer] = {}
        self._by_link: dict[int, Peer] = {}
        self._connected: dict[str, Peer] = {}  # by replica_id
        self._by_worker: dict[str, Peer] = {}

    def add(self, peer: Peer) -> None:
        self._by_member[peer.member] = peer
        self._by_worker.update(dict.fromkeys(filter(None, peer.hello.workers), peer))
        if peer.link is not None:
            self._by_link[peer.link] = peer
            self._connected[peer.member.replica_id] = peer

    def rename(self, peer: Peer, member: MemberId) -> None:
        self._by_member.pop(peer.member, None)
        peer.member = member
        self._by_member[member] = peer

    def disconnect(self, link: int) -> Peer | None:
        peer = self._by_link.pop(link, None)
        if peer is not None:
            peer.link = None
            peer.known.clear()
            if self._connected.get(peer.member.replica_id) is peer:
                del self._connected[peer.member.replica_id]
        return peer

    def forget(self, member: MemberId) -> None:
        peer = self._by_member.pop(member, None)
        if peer is None:
            return
        for worker in peer.hello.workers:
            if self._by_worker.get(worker) is peer:
                del self._by_worker[worker]
        if peer.link is not None:
            self.disconnect(peer.link)

    def of(self, member: MemberId) -> Peer | None:
        return self._by_member.get(member)

    def on(self, link: int) -> Peer | None:
        return self._by_link.get(link)

    def peers(self) -> Iterable[Peer]:
        return self._by_member.values()

    def running_as(self, worker: str) -> Peer | None:
        """The newest that named this worker as one of its processes."""
        return self._by_worker.get(worker)

    def connected_as(self, replica_id: str) -> Peer | None:
        return self._connected.get(replica_id)

    def is_replaced(self, member: MemberId) -> bool:
        """A newer process of its replica group is connected."""
        peer = self._connected.get(member.replica_id)
        return peer is not None and peer.member.incarnation > member.incarnation

    @property
    def connected_count(self) -> int:
        return len(self._by_link)

    def is_connected(self, member: MemberId) -> bool:
        peer = self._by_member.get(member)
        return peer is not None and peer.link is not None

    def links_of(self, members: Iterable[MemberId]) -> tuple[int, ...]:
        links = []
        for member in members:
            peer = self._by_member.get(member)
            if peer is not None and peer.link is not None:
                links.append(peer.link)
        return tuple(links)

    def send(self, message: ToMember, members: Iterable[MemberId]) -> list[Send]:
        """One message, encoded once, to those of `members` that are connected."""
        links = self.links_of(members)
        return [Send(message, links)] if links else []

    def split_by_known(
        self, new: Quorum, base: Quorum | None, members: Iterable[MemberId]
    ) -> list[tuple[MembersChange, tuple[int, ...]]]:
        """The list of `new` for each of `members`: its difference from `base` for those who have that, else whole.

        At most two groups of links; marks `new` as known on them.
        """
        having: list[int] = []
        lacking: list[int] = []
        for member in members:
            peer = self._by_member.get(member)
            if peer is None or peer.link is None:
                continue
            (having if base is not None and base.id in peer.known else lacking).append(peer.link)
            peer.learn(new.id)
        groups: list[tuple[MembersChange, tuple[int, ...]]] = []
        if having and base is not None:
            groups.append((changed(new, base), tuple(having)))
        if lacking:
            groups.append((whole(new), tuple(lacking)))
        return groups
