"""The key-value store of one completed round, with the semantics of torch.distributed.Store.

It belongs to the round: nobody else can name it, and it ends with it. Operations that wait are kept as waiters of the
link that asked; they end when the keys are there, when they are cancelled, with the link, or with the round.
"""

import collections
import dataclasses
from collections.abc import Iterable

from everstep.core.node_messages import StoreCall, StoreOp, StoreReply, StoreStatus

KEYS_MAX = 100_000
KEY_CHARS_MAX = 1024
KEYS_IN_CALL_MAX = 20_000
VALUE_BYTES_MAX = 1 << 20
REPLY_BYTES_MAX = 3 << 20
STORE_BYTES_MAX = 64 << 20
WAITERS_OF_LINK_MAX = 64

Answers = list[tuple[int, StoreReply]]  # link, reply


@dataclasses.dataclass(kw_only=True)
class _Waiter:
    """A call that waits for its key number `at`; those before it were there."""

    link: int
    call: StoreCall
    at: int = 0


class _Wrong(Exception):
    """What is wrong with a call."""

    def __init__(self, detail: str, status: StoreStatus = StoreStatus.BAD_CALL) -> None:
        super().__init__(detail)
        self.status = status


class RoundStore:
    """Every method returns what to answer to whom; the order of calls is the order of their effects."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._queues: dict[str, collections.deque[bytes]] = {}
        self._bytes = 0
        self._waiters: dict[tuple[int, int], _Waiter] = {}  # by link and number, in order of arrival
        self._waits_of: dict[str, dict[tuple[int, int], None]] = {}  # by the missing key that each looks at next
        self._waiting_links: dict[int, dict[int, None]] = {}  # numbers of each link's waiters

    def call(self, link: int, call: StoreCall) -> Answers:
        try:
            _check(call)
            return self._perform(link, call)
        except _Wrong as wrong:
            return [(link, StoreReply(call.number, wrong.status, detail=str(wrong)))]

    def link_closed(self, link: int) -> None:
        for number in list(self._waiting_links.get(link, ())):
            self._forget((link, number))

    def end(self) -> Answers:
        """The round is over: everybody who waits is told."""
        waiters = list(self._waiters.values())
        self._waiters.clear()
        return [(w.link, StoreReply(w.call.number, StoreStatus.ROUND_OVER)) for w in waiters]

    # ---- operations

    def _perform(self, link: int, call: StoreCall) -> Answers:
        keys, values = call.keys, call.values
        match call.op:
            case StoreOp.GET | StoreOp.WAIT | StoreOp.QUEUE_POP:
                return self._answer_or_wait(link, call)
            case StoreOp.CANCEL:
                self._forget((link, call.amount))
                return []
            case StoreOp.SET:
                for key, value in zip(keys, values, strict=True):
                    self._put(key, value)
                return self._done(link, call, keys)
            case StoreOp.APPEND:
                self._put(keys[0], self._values.get(keys[0], b"") + values[0])
                return self._done(link, call, keys)
            case StoreOp.ADD:
                total = self._number(keys[0]) + call.amount
                self._put(keys[0], str(total).encode())
                return self._done(link, call, keys, amount=total)
            case StoreOp.COMPARE_SET:
                now = self._compare_set(keys[0], expected=values[0], desired=values[1])
                return self._done(link, call, keys, values=(now,))
            case StoreOp.CHECK:
                return self._done(link, call, (), amount=int(all(self._has(key) for key in keys)))
            case StoreOp.DELETE_KEY:
                return self._done(link, call, (), amount=int(self._delete(keys[0])))
            case StoreOp.NUM_KEYS:
                return self._done(link, call, (), amount=len(self._values) + len(self._queues))
            case StoreOp.LIST_KEYS:
                return self._done(link, call, (), values=tuple(k.encode() for k in (*self._values, *self._queues)))
            case StoreOp.QUEUE_PUSH:
                self._account(len(values[0]) + (0 if keys[0] in self._queues else len(keys[0])), keys[0])
                self._queues.setdefault(keys[0], collections.deque()).append(values[0])
                return self._done(link, call, keys)
            case StoreOp.QUEUE_LEN:
                return self._done(link, call, (), amount=len(self._queues.get(keys[0], ())))

    def _done(
        self, link: int, call: StoreCall, written: Iterable[str], *, values: tuple[bytes, ...] = (), amount: int = 0
    ) -> Answers:
        if sum(map(len, values)) > REPLY_BYTES_MAX:
            raise _Wrong(f"the answer has more than {REPLY_BYTES_MAX} bytes: ask for fewer keys at a time")
        return [(link, StoreReply(call.number, values=values, amount=amount)), *self._wake(written)]

    def _has(self, key: str) -> bool:
        return key in self._values or key in self._queues

    def _number(self, key: str) -> int:
        text = self._values.get(key, b"0")
        try:
            return int(text)
        except ValueError:
            raise _Wrong(f"add to {key!r}, which holds no number") from None

    def _compare_set(self, key: str, expected: bytes, desired: bytes) -> bytes:
        """As TCPStore: a key that is missing is set only if nothing was expected, and the expected value comes back."""
        current = self._values.get(key)
        if current is None:
            if expected:
                return expected
            self._put(key, desired)
            return desired
        if current != expected:
            return current
        self._put(key, desired)
        return desired

    def _put(self, key: str, value: bytes) -> None:
        if len(value) > VALUE_BYTES_MAX:
            raise _Wrong(f"{key!r} would have {len(value)} bytes; a value has at most {VALUE_BYTES_MAX}")
        old = self._values.get(key)
        self._account(len(value) + len(key) if old is None else len(value) - len(old), key)
        self._values[key] = value

    def _account(self, more: int, key: str) -> None:
        if not self._has(key) and len(self._values) + len(self._queues) >= KEYS_MAX:
            raise _Wrong(f"the store holds {KEYS_MAX} keys, its limit", StoreStatus.FULL)
        if self._bytes + more > STORE_BYTES_MAX:
            raise _Wrong(f"the store holds {self._bytes} bytes; its limit is {STORE_BYTES_MAX}", StoreStatus.FULL)
        self._bytes += more

    def _delete(self, key: str) -> bool:
        if not self._has(key):
            return False
        if key in self._values:
            self._bytes -= len(key) + len(self._values.pop(key))
        if key in self._queues:
            self._bytes -= len(key) + sum(map(len, self._queues.pop(key)))
        return True

    # ---- waiting

    def _answer_or_wait(self, link: int, call: StoreCall) -> Answers:
        waiter = _Waiter(link=link, call=call)
        if self._is_ready(waiter):
            return self._answered(link, call)
        if call.op is StoreOp.QUEUE_POP and not call.amount:
            raise _Wrong(f"queue {call.keys[0]!r} is empty")
        numbers = self._waiting_links.setdefault(link, {})
        if call.number in numbers:
            raise _Wrong(f"call {call.number} waits already")
        if len(numbers) >= WAITERS_OF_LINK_MAX:
            raise _Wrong(f"{WAITERS_OF_LINK_MAX} calls of this node wait already", StoreStatus.FULL)
        numbers[call.number] = None
        self._waiters[link, call.number] = waiter
        self._waits_of.setdefault(call.keys[waiter.at], {})[link, call.number] = None
        return []

    def _is_ready(self, waiter: _Waiter) -> bool:
        """Whether all its keys are there. Goes on where it stood: looking at all of them at each wake-up is n²."""
        keys = waiter.call.keys
        for _ in range(2):  # once to the end, and once more over all: some may have been deleted meanwhile
            start, waiter.at = waiter.at, len(keys)
            for index in range(start, len(keys)):
                if not self._is_there(waiter.call, keys[index]):
                    waiter.at = index
                    return False
            if start == 0:
                break
            waiter.at = 0
        return True

    def _is_there(self, call: StoreCall, key: str) -> bool:
        return bool(self._queues.get(key)) if call.op is StoreOp.QUEUE_POP else self._has(key)

    def _answered(self, link: int, call: StoreCall) -> Answers:
        match call.op:
            case StoreOp.GET:
                return self._done(link, call, (), values=tuple(self._values.get(key, b"") for key in call.keys))
            case StoreOp.QUEUE_POP:
                queue = self._queues[call.keys[0]]
                value = queue.popleft()
                self._bytes -= len(value)
                if not queue:
                    del self._queues[call.keys[0]]
                    self._bytes -= len(call.keys[0])
                return self._done(link, call, (), values=(value,))
            case _:
                return self._done(link, call, ())

    def _wake(self, written: Iterable[str]) -> Answers:
        out: Answers = []
        for key in written:
            for waiter_id in list(self._waits_of.pop(key, ())):
                waiter = self._waiters[waiter_id]
                if not self._is_ready(waiter):
                    self._waits_of.setdefault(waiter.call.keys[waiter.at], {})[waiter_id] = None
                    continue
                self._drop(waiter_id)
                try:
                    out += self._answered(waiter.link, waiter.call)
                except _Wrong as wrong:
                    out.append((waiter.link, StoreReply(waiter.call.number, wrong.status, detail=str(wrong))))
        return out

    def _forget(self, waiter_id: tuple[int, int]) -> None:
        waiter = self._drop(waiter_id)
        if waiter is None:
            return
        key = waiter.call.keys[waiter.at]
        waits = self._waits_of.get(key, {})
        waits.pop(waiter_id, None)
        if not waits:
            self._waits_of.pop(key, None)

    def _drop(self, waiter_id: tuple[int, int]) -> _Waiter | None:
        numbers = self._waiting_links.get(waiter_id[0], {})
        numbers.pop(waiter_id[1], None)
        if not numbers:
            self._waiting_links.pop(waiter_id[0], None)
        return self._waiters.pop(waiter_id, None)


_KEYS = {StoreOp.NUM_KEYS: 0, StoreOp.LIST_KEYS: 0, StoreOp.CANCEL: 0}
_MANY_KEYS = (StoreOp.SET, StoreOp.GET, StoreOp.WAIT, StoreOp.CHECK)
_VALUES = {StoreOp.APPEND: 1, StoreOp.COMPARE_SET: 2, StoreOp.QUEUE_PUSH: 1}


def _check(call: StoreCall) -> None:
    """The shape of a call, whoever sent it."""
    keys_wanted = _KEYS.get(call.op, 1)
    if call.op in _MANY_KEYS:
        if len(call.keys) > KEYS_IN_CALL_MAX:
            raise _Wrong(f"{len(call.keys)} keys in one call; at most {KEYS_IN_CALL_MAX}")
    elif len(call.keys) != keys_wanted:
        raise _Wrong(f"{call.op.value} takes {keys_wanted} keys, not {len(call.keys)}")
    values_wanted = len(call.keys) if call.op is StoreOp.SET else _VALUES.get(call.op, 0)
    if len(call.values) != values_wanted:
        raise _Wrong(f"{call.op.value} takes {values_wanted} values, not {len(call.values)}")
    for key in call.keys:
        if len(key) > KEY_CHARS_MAX:
            raise _Wrong(f"a key of {len(key)} characters; at most {KEY_CHARS_MAX}")
