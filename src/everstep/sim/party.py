"""A process of the virtual world: its machine and its link; its training thread is its subclasses' affair."""

import abc
from collections import deque
from typing import TYPE_CHECKING, Any

from everstep.core.messages import Effect, Exit, Log, Send, Sever, Tell, ToMember
from everstep.core.moves import (
    AskToLeave,
    CollectiveFailed,
    Leave,
    LinkDown,
    LinkUp,
    ReadyToJoin,
    ReplicaEvent,
)
from everstep.core.types import QuorumId
from everstep.sim.checkers import Violation, Weights
from everstep.sim.network import Channel

if TYPE_CHECKING:
    from everstep.sim.world import World


class Party(abc.ABC):
    """One start of a process; its training thread is what a subclass makes of `_advance`."""

    replica: Any  # its machine: a Replica, or in a group of several ranks its Leader or a Follower
    rank = 0  # in its replica group

    def __init__(self, world: "World", name: str, replica_id: str, initial: Weights) -> None:
        self._world = world
        self.name = name
        self.replica_id = replica_id
        self.is_alive = True
        self.weights = initial
        self.born_at = world.now
        self._link: int | None = None
        self._up: Channel | None = None
        self._down: Channel | None = None
        self._tick_at: float | None = None
        self._busy: tuple[str, ...] | None = None  # what the training thread waits for
        self.frozen_until = 0.0  # stopped: neither thread runs
        self.held_until = 0.0  # and for so long that is because a C call holds the GIL
        self._applied_step = -1
        self._history = ""  # that the weights belong to
        self._unread: deque[tuple[int, ToMember]] = deque()  # came while it was stopped
        self._is_leaving = False
        self._is_ready = False
        self._hangs_next = self._is_hung = False

    # ---- link

    def start(self) -> None:
        self._world.agents.started(self)
        self.connect()

        def ready() -> None:
            self._is_ready = True
            self.feed(ReadyToJoin())

        self._world.after_delay("startup", ready)

    def connect(self) -> None:
        lighthouse = self._world.lighthouse
        if not self.is_alive or self._link is not None:
            return
        if not lighthouse.is_up or self._world.now < self.frozen_until:
            self._world.after(0.02, self.connect)
            return
        self._link = self._world.new_link()
        self._up, self._down = self._world.new_channel(), self._world.new_channel()
        link = self._link
        lighthouse.opened(link, self)
        self.feed(LinkUp())

    def link_lost(self, detail: str, reconnect_after: float | None = None, is_noticed: bool = True) -> None:
        """Both directions drop what is under way; the lighthouse notices a little later, or never."""
        link, self._link = self._link, None
        if link is None:
            return
        assert self._up is not None
        assert self._down is not None
        self._up.is_open = self._down.is_open = False
        if is_noticed:
            self._world.after_delay("notice_of_death", lambda: self._world.lighthouse.closed(link, detail))
        if self.is_alive:
            self.feed(LinkDown())
            delay = reconnect_after if reconnect_after is not None else self._world.rng.uniform(0.005, 0.1)
            self._world.after(delay, self.connect)

    def link_ends(self, link: int, detail: str) -> None:
        """The other side is gone; what it had sent arrives first."""
        if link == self._link and self._up is not None and self._down is not None:
            self._up.is_open = False
            self._down.send(lambda: self.link_lost(detail, is_noticed=False) if link == self._link else None)

    def stall_link(self, seconds: float, *, up: bool = True, down: bool = True) -> None:
        for channel, is_stalled in ((self._up, up), (self._down, down)):
            if channel is not None and is_stalled:
                channel.stalled_until = self._world.now + seconds

    def from_lighthouse(self, link: int, message: ToMember) -> None:
        assert self._down is not None
        if link == self._link:
            self._down.send(lambda: self._arrived(link, message))

    def _arrived(self, link: int, message: ToMember) -> None:
        if self._unread or self._world.now < self.frozen_until:
            self._unread.append((link, message))
            self._world.at(self.frozen_until, self._read_next)
        elif self.is_alive and link == self._link:
            self.feed(message)

    def _read_next(self) -> None:
        """One for each that could not be read when it came: in order, also if it was stopped again meanwhile."""
        if self._world.now < self.frozen_until:
            self._world.at(self.frozen_until, self._read_next)
            return
        link, message = self._unread.popleft()
        if self.is_alive and link == self._link:
            self.feed(message)

    # ---- both threads

    def feed(self, event: "ToMember | ReplicaEvent") -> None:
        """From the link thread: the training thread sees the outcome a little later."""
        if self.is_alive:
            self._perform(self.replica.receive(event, self._world.now))
            self._world.after_delay("wake", self._advance)
            self._world.faults.reached(type(event).__name__, self)

    def _report(self, event: "ReplicaEvent") -> None:
        """From the training thread, which goes on at once."""
        if self.is_alive:
            self._perform(self.replica.receive(event, self._world.now))
            self._world.faults.reached(type(event).__name__, self)
            self._advance()

    def _perform(self, effects: list[Effect]) -> None:
        self._world.checkers.observe(self.name, self.replica)
        for effect in effects:
            match effect:
                case Send(message, _):
                    self._world.count_message()
                    link, up = self._link, self._up
                    if link is not None and up is not None:
                        up.send(lambda m=message, k=link: self._world.lighthouse.message(k, m))  # type: ignore[misc]
                case Sever(up_to):
                    self._sever(up_to)
                case Exit():
                    self._world.exited(self)
                case Log():
                    self._world.log(self.name, effect)
                case Tell(message):
                    self._tell(message)
                case _:
                    raise Violation(f"a member's machine returned {effect}")
        self._arm()

    def _tell(self, message: object) -> None:
        """To the other ranks of the group."""
        raise Violation(f"{self.name} has nobody to tell {message}")

    def _arm(self) -> None:
        deadline = self.replica.next_deadline()
        if deadline is None or (self._tick_at is not None and self._world.now < self._tick_at <= deadline):
            return
        at = self._tick_at = max(deadline, self._world.now)

        def tick() -> None:
            if not self.is_alive or self._tick_at != at:
                return  # one that was armed since takes its place
            if self._world.now < self.frozen_until:
                self._world.at(self.frozen_until, tick)
                return
            self._tick_at = None
            due = self.replica.next_deadline()
            if due is not None and self._world.now >= due:
                self._perform(self.replica.tick(self._world.now))
            else:
                self._arm()

        self._world.at(at, tick)

    def kill(self, *, is_noticed: bool = True) -> None:
        if not self.is_alive:
            return
        self.is_alive = False
        self._busy = None
        self._world.leave_quorums(self, None)
        self.link_lost("killed", is_noticed=is_noticed)
        self._world.agents.ended(self)

    def stop(self, seconds: float) -> None:
        self.frozen_until = max(self.frozen_until, self._world.now + seconds)

    def hold(self, seconds: float) -> None:
        """A C call holds the GIL."""
        if self._world.now >= self.frozen_until:
            self.held_until = self._world.now + seconds
        self.stop(seconds)

    def hang(self) -> None:
        """The training thread stands still from its next computation on; the link thread lives."""
        self._hangs_next = True

    def wake_up(self) -> None:
        self._hangs_next = self._is_hung = False
        self._advance()

    def drain(self) -> None:
        self.feed(AskToLeave())

    def leave(self) -> None:
        self.feed(Leave("done"))

    def report_spurious_error(self, peer: int | None) -> None:
        quorum = self.replica.quorum
        if quorum is not None:
            self._busy = None
            self.feed(CollectiveFailed(quorum.id, peer, "spurious"))

    # ---- the training thread

    @abc.abstractmethod
    def _advance(self) -> None:
        """Go on as far as the machine lets it."""

    @abc.abstractmethod
    def _sever(self, up_to: QuorumId) -> None:
        """Every collective of these quorums, and a transfer in one, ends for this process."""
