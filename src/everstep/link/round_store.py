"""The shared key-value store of a rendezvous round, with the operations of torch.distributed.Store. No torch here.

Calls are answered by the lighthouse in the order in which it hears them. One that is under way when the link is lost
is asked again on the next link, but for those whose repetition would change what they mean: these raise. A lighthouse
that was started again has an empty store; every node puts back what it had set and added itself.
"""

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence

from everstep.core.node_messages import FromNode, StoreCall, StoreOp, StoreReply, StoreStatus
from everstep.core.types import RendezvousRound
from everstep.errors import RoundStoreError, RoundStoreTimeout

TIMEOUT_S = 300.0
LINK_PATIENCE_S = 10.0  # an operation waits so long for a link that is down
REMEMBERED_BYTES_MAX = 4 << 20  # of a node's own writes in a round; beyond that nothing is put back
_NOT_REPEATABLE = (StoreOp.ADD, StoreOp.COMPARE_SET, StoreOp.APPEND, StoreOp.QUEUE_PUSH, StoreOp.QUEUE_POP)


@dataclasses.dataclass(kw_only=True)
class _Pending:
    call: StoreCall
    reply: StoreReply | None = None
    unsent_at: float | None = None  # since then it waits for a link


class StoreCalls:
    """The calls of one node, whatever their round. All of it under the node's condition."""

    def __init__(self, changed: threading.Condition, send: Callable[[FromNode], bool]) -> None:
        self._changed = changed
        self._send = send
        self._pending: dict[int, _Pending] = {}
        self._last = 0
        self._why_ended = ""
        self._mine = _Writes()

    def call(self, call: StoreCall, timeout_s: float) -> StoreReply:
        """Any thread but the link's. Raises RoundStoreTimeout, or RoundStoreError."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            if self._why_ended:
                raise RoundStoreError(self._why_ended)
            self._last += 1
            numbered = StoreCall(self._last, call.round, call.op, call.keys, call.values, call.amount)
            pending = self._pending[self._last] = _Pending(call=numbered)
            try:
                if not self._send(numbered):
                    pending.unsent_at = time.monotonic()
                reply = self._wait(pending, deadline)
            finally:
                del self._pending[numbered.number]
        if reply.status is not StoreStatus.OK:
            over = "the round is over, and its store with it"
            raise RoundStoreError(reply.detail or over, is_over=reply.status is StoreStatus.ROUND_OVER)
        with self._changed:
            self._mine.remember(numbered)
        return reply

    def _wait(self, pending: _Pending, deadline: float) -> StoreReply:
        call = pending.call
        while pending.reply is None:
            until = deadline if pending.unsent_at is None else min(deadline, pending.unsent_at + LINK_PATIENCE_S)
            left = until - time.monotonic()
            if left > 0:
                self._changed.wait(left)
            elif pending.unsent_at is not None:
                raise RoundStoreError(f"{call.op.value}: the lighthouse cannot be reached")
            else:
                self._send(StoreCall(0, call.round, StoreOp.CANCEL, amount=call.number))
                keys = ", ".join(call.keys[:4])
                raise RoundStoreTimeout(f"{call.op.value} of {keys or 'the store'}: not within the time")
        return pending.reply

    def answer(self, reply: StoreReply) -> None:
        pending = self._pending.get(reply.number)
        if pending is not None:
            pending.reply = reply
            self._changed.notify_all()

    def link_up(self) -> None:
        for pending in self._pending.values():
            if pending.reply is None and self._send(pending.call):
                pending.unsent_at = None

    def put_back(self, round_: RendezvousRound) -> None:
        """The lighthouse was started again, and this node is still in `round_`."""
        for call in self._mine.calls(round_):
            self._send(call)

    def link_down(self) -> None:
        now = time.monotonic()
        for pending in self._pending.values():
            if pending.unsent_at is None and pending.call.op in _NOT_REPEATABLE:
                detail = f"{pending.call.op.value}: the link was lost; whether it took effect is not known"
                pending.reply = StoreReply(pending.call.number, StoreStatus.BAD_CALL, detail=detail)
            elif pending.unsent_at is None:
                pending.unsent_at = now

    def end(self, why: str) -> None:
        self._why_ended = why
        for pending in self._pending.values():
            pending.reply = StoreReply(pending.call.number, StoreStatus.BAD_CALL, detail=why)


class _Writes:
    """What this node wrote into the store of its round."""

    def __init__(self) -> None:
        self._round: RendezvousRound | None = None
        self._values: dict[str, bytes] = {}
        self._sums: dict[str, int] = {}
        self._bytes = 0

    def remember(self, call: StoreCall) -> None:
        if call.round != self._round:
            self._round, self._bytes = call.round, 0
            self._values.clear()
            self._sums.clear()
        if call.op is StoreOp.SET:
            self._bytes += sum(map(len, (*call.keys, *call.values)))
            self._values.update(zip(call.keys, call.values, strict=True))
        elif call.op is StoreOp.ADD:
            self._bytes += len(call.keys[0])
            self._sums[call.keys[0]] = self._sums.get(call.keys[0], 0) + call.amount
        elif call.op is StoreOp.DELETE_KEY:
            self._values.pop(call.keys[0], None)
            self._sums.pop(call.keys[0], None)

    def calls(self, round_: RendezvousRound) -> list[StoreCall]:
        if round_ != self._round or self._bytes > REMEMBERED_BYTES_MAX:
            return []
        sums = [StoreCall(0, round_, StoreOp.ADD, (key,), amount=amount) for key, amount in self._sums.items()]
        return [StoreCall(0, round_, StoreOp.SET, tuple(self._values), tuple(self._values.values())), *sums]


class RoundStore:
    """Methods, names and meanings as torch.distributed.Store has them; values are bytes. Any thread."""

    def __init__(self, calls: StoreCalls, round_: RendezvousRound, timeout_s: float = TIMEOUT_S) -> None:
        self._calls = calls
        self.round = round_
        self.timeout_s = timeout_s

    def set(self, key: str, value: bytes) -> None:
        self.multi_set([key], [value])

    def multi_set(self, keys: Sequence[str], values: Sequence[bytes]) -> None:
        self._call(StoreOp.SET, tuple(keys), tuple(values))

    def get(self, key: str) -> bytes:
        """Waits for the key."""
        return self.multi_get([key])[0]

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        """Waits for all the keys."""
        return list(self._call(StoreOp.GET, tuple(keys)).values)

    def add(self, key: str, amount: int) -> int:
        return self._call(StoreOp.ADD, (key,), amount=amount).amount

    def compare_set(self, key: str, expected: bytes, desired: bytes) -> bytes:
        return self._call(StoreOp.COMPARE_SET, (key,), (expected, desired)).values[0]

    def wait(self, keys: Sequence[str], timeout_s: float | None = None) -> None:
        self._call(StoreOp.WAIT, tuple(keys), timeout_s=timeout_s)

    def check(self, keys: Sequence[str]) -> bool:
        return bool(self._call(StoreOp.CHECK, tuple(keys)).amount)

    def delete_key(self, key: str) -> bool:
        return bool(self._call(StoreOp.DELETE_KEY, (key,)).amount)

    def num_keys(self) -> int:
        return self._call(StoreOp.NUM_KEYS).amount

    def list_keys(self) -> list[str]:
        return [key.decode() for key in self._call(StoreOp.LIST_KEYS).values]

    def append(self, key: str, value: bytes) -> None:
        self._call(StoreOp.APPEND, (key,), (value,))

    def queue_push(self, key: str, value: bytes) -> None:
        self._call(StoreOp.QUEUE_PUSH, (key,), (value,))

    def queue_pop(self, key: str, block: bool = True) -> bytes:
        return self._call(StoreOp.QUEUE_POP, (key,), amount=int(block)).values[0]

    def queue_len(self, key: str) -> int:
        return self._call(StoreOp.QUEUE_LEN, (key,)).amount

    def _call(
        self,
        op: StoreOp,
        keys: tuple[str, ...] = (),
        values: tuple[bytes, ...] = (),
        *,
        amount: int = 0,
        timeout_s: float | None = None,
    ) -> StoreReply:
        call = StoreCall(0, self.round, op, keys, values, amount)
        return self._calls.call(call, self.timeout_s if timeout_s is None else timeout_s)
