"""The virtual world's clock, links and collectives.

Links are FIFO with random delays, reordered only across links. A collective completes for each member by itself, some
time after the last one issued it; a member that dies or severs before that leaves the others with an error, or hanging.
"""

import dataclasses
import heapq
import random
from collections import deque
from collections.abc import Callable, Sequence

from everstep.core.types import MemberId, QuorumId


class Clock:
    """Virtual time: runs callbacks in order of their instants; ties run in the order they were asked for."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events = 0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._asked = 0

    def at(self, when: float, call: Callable[[], None]) -> None:
        self._asked += 1
        heapq.heappush(self._queue, (max(when, self.now), self._asked, call))

    def after(self, delay: float, call: Callable[[], None]) -> None:
        self.at(self.now + delay, call)

    def step(self, until: float) -> bool:
        """Run the next callback; False when there is none before `until`, which it then is."""
        if not self._queue or self._queue[0][0] > until:
            self.now = until
            return False
        self.now, _, call = heapq.heappop(self._queue)
        self.events += 1
        call()
        return True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Delays:
    """Seconds, each drawn uniformly: (lowest, highest)."""

    message: tuple[float, float] = (0.0001, 0.002)
    compute: tuple[float, float] = (0.005, 0.02)
    collective: tuple[float, float] = (0.0001, 0.003)
    transfer: tuple[float, float] = (0.001, 0.05)
    apply: tuple[float, float] = (0.0, 0.005)  # of a state that was fetched
    fsync: tuple[float, float] = (0.0002, 0.004)
    notice_of_death: tuple[float, float] = (0.001, 0.05)
    wake: tuple[float, float] = (0.0, 0.001)  # until a waiting training thread sees what the link thread changed
    no_answer: tuple[float, float] = (0.1, 0.4)  # until a peer's host counts as one that does not answer
    startup: tuple[float, float] = (0.0, 0.02)  # from the start of a process until it is ready to join


class Channel:
    """One direction of a link: FIFO, and closed for good once closed."""

    def __init__(self, clock: Clock, draw_delay: Callable[[], float]) -> None:
        self._clock = clock
        self._draw_delay = draw_delay
        self._last_at = 0.0
        self._under_way: deque[Callable[[], None]] = deque()
        self.stalled_until = 0.0
        self.is_open = True

    def send(self, deliver: Callable[[], None]) -> None:
        if not self.is_open:
            return
        when = max(self._clock.now + self._draw_delay(), self._last_at, self.stalled_until)
        self._last_at = when
        self._under_way.append(deliver)
        self._clock.at(when, self._arrive)

    def _arrive(self) -> None:
        """The oldest message arrives, whichever was due: a stall may reorder instants, never messages."""
        if not self.is_open:
            return
        if self._clock.now < self.stalled_until:
            self._clock.at(self.stalled_until, self._arrive)
        else:
            self._under_way.popleft()()


@dataclasses.dataclass(frozen=True)
class NoAnswer:
    """Instead of a collective's values: this peer's host does not answer."""

    peer: MemberId


Outcome = Sequence[object] | NoAnswer | None  # None: it failed, and names nobody


@dataclasses.dataclass
class Operation:
    """The n-th collective of a quorum: who put what in, and whom to tell."""

    quorum_id: QuorumId
    position: int
    kind: str
    values: dict[MemberId, object]
    waiting: dict[MemberId, Callable[[Outcome], None]]
    result: tuple[object, ...] | None = None
    has_failed: bool = False
    lost: dict[MemberId, None] = dataclasses.field(default_factory=dict)  # the result will not reach them
    told: dict[MemberId, None] = dataclasses.field(default_factory=dict)  # an error reaches them, or has


class Collectives:
    """All quorums' collectives. A callback gets the values in rank order, or an error."""

    def __init__(self, clock: Clock, rng: random.Random, delays: Delays) -> None:
        self._clock = clock
        self._rng = rng
        self._delays = delays
        self._operations: dict[QuorumId, dict[int, Operation]] = {}
        self._position: dict[tuple[QuorumId, MemberId], int] = {}
        self._gone: dict[QuorumId, dict[MemberId, None]] = {}
        self.mixed: str | None = None
        self._broken: dict[tuple[str, str], float] = {}  # pairs of groups without a path, and until when

    def break_path(self, a: str, b: str, until: float) -> None:
        """Nothing that needs both completes until then; who waits for the other's answer learns that none comes."""
        self._broken[a, b] = until

    def has_path(self, a: str, b: str) -> bool:
        now = self._clock.now
        return all(now >= self._broken.get(pair, 0.0) for pair in ((a, b), (b, a)))

    def mend_paths(self) -> None:
        self._broken.clear()

    def issue(
        self,
        quorum: tuple[QuorumId, tuple[MemberId, ...]],
        member: MemberId,
        kind: str,
        value: object,
        done: Callable[[Outcome], None],
    ) -> None:
        quorum_id, members = quorum
        position = self._position.get((quorum_id, member), 0) + 1
        self._position[quorum_id, member] = position
        operations = self._operations.setdefault(quorum_id, {})
        operation = operations.setdefault(position, Operation(quorum_id, position, kind, {}, {}))
        if operation.kind != kind:
            self.mixed = f"{member} issues {kind} as operation {position} of {quorum_id}, others {operation.kind}"
        operation.values[member] = value
        operation.waiting[member] = done
        gone = self._gone.get(quorum_id, {})
        if len(operation.values) == len(members):
            if not self._is_cut(operation, members):
                self._complete(operation, members)
        elif any(m in gone and m not in operation.values for m in members):
            self._fail(operation, [member])
            self._tell_a_neighbour(operation)

    def _is_cut(self, operation: Operation, members: tuple[MemberId, ...]) -> bool:
        """Whether a path that it needs is broken: its ends, or one of them, find out; everybody else hangs."""
        now = self._clock.now
        cut = False
        for (a, b), until in self._broken.items():
            ends = [m for m in members if m.replica_id in (a, b)]
            if now >= until or len(ends) < 2:
                continue
            cut = True
            finders = list(zip(ends, reversed(ends), strict=True))
            for end, other in finders if self._rng.random() < 0.7 else [self._rng.choice(finders)]:
                delay = self._rng.uniform(*self._delays.no_answer)
                self._clock.after(delay, lambda m=end, p=other: self._error(operation, m, NoAnswer(p)))  # type: ignore[misc]
        return cut

    def _complete(self, operation: Operation, members: tuple[MemberId, ...]) -> None:
        operation.result = tuple(operation.values[m] for m in members)
        for member, done in operation.waiting.items():
            delay = self._rng.uniform(*self._delays.collective)
            self._clock.after(delay, lambda m=member, d=done: self._finish(operation, m, d))  # type: ignore[misc]

    def _finish(self, operation: Operation, member: MemberId, done: Callable[[Outcome], None]) -> None:
        if member not in operation.lost and operation.waiting.pop(member, None) is not None:
            operation.told.pop(member, None)  # the error comes too late
            if not operation.waiting:
                self._operations.get(operation.quorum_id, {}).pop(operation.position, None)
            done(operation.result)

    def _fail(self, operation: Operation, members: Sequence[MemberId]) -> None:
        """Neighbours of the member that is gone get an error, the others hang until somebody severs them."""
        for member in members:
            if operation.has_failed and self._rng.random() < 0.3:
                continue
            self._tell(operation, member)

    def _tell(self, operation: Operation, member: MemberId) -> None:
        operation.has_failed = True
        operation.told[member] = None
        delay = self._rng.uniform(*self._delays.collective)
        self._clock.after(delay, lambda: self._error(operation, member))

    def _tell_a_neighbour(self, operation: Operation) -> None:
        """Whoever hangs waits for a member that is gone, or for another that hangs: one of them is the first to know.

        As that one leaves, perhaps before it has said a word, the next one is its neighbour.
        """
        gone = self._gone.get(operation.quorum_id, {})
        if any(m not in gone for m in operation.told):
            return
        hanging = operation.waiting if operation.result is None else operation.lost
        for member in hanging:
            if member in operation.waiting and member not in gone:
                self._tell(operation, member)
                return

    def _error(self, operation: Operation, member: MemberId, error: NoAnswer | None = None) -> None:
        done = operation.waiting.pop(member, None)
        if done is not None:
            done(error)

    def leave(self, quorum_id: QuorumId, member: MemberId) -> None:
        """`member` died, or severed this quorum: what it has not completed ends; the others may or may not notice."""
        self._gone.setdefault(quorum_id, {})[member] = None
        for operation in list(self._operations.get(quorum_id, {}).values()):
            # A result that is there already may still reach the thread that waits for it, after the freeze (L7).
            if operation.result is None or self._rng.random() < 0.5:
                operation.waiting.pop(member, None)
            if operation.result is None:
                self._fail(operation, list(operation.waiting))
            elif self._rng.random() < 0.5:
                # It leaves while bytes are under way: some of those who have not got the result never will.
                late = [m for m in operation.waiting if m != member and self._rng.random() < 0.5]
                for m in late:
                    operation.lost[m] = None
                self._fail(operation, late)
            self._tell_a_neighbour(operation)
