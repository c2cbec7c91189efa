"""Where a group's time goes: training, detecting, reconfiguring, recovering, waiting. What it adds up to is wall time.

A member's training thread books its time as it makes its moves; heartbeats carry the totals; the lighthouse adds the
processes of one group up, and what is left of its wall time was spent with no process of it: absent.
"""

import dataclasses
import enum

import msgspec

GROUPS_MAX = 10_000  # that the lighthouse keeps books of; the one not heard of for longest goes first


class Account(enum.IntEnum):
    """What a training thread's time goes to."""

    TRAINING = 0  # it computes, or waits in a collective that nothing is wrong with
    DETECTING = 1  # the wait that a failure struck, until this member was told or saw the error
    RECONFIGURING = 2  # from then until its step is decided: the round, the new group, reducing and voting again
    RECOVERING = 3  # without state: it enters a quorum and fetches live state
    WAITING = 4  # for the lighthouse, for enough groups, for others that recover


class Spent(msgspec.Struct, frozen=True, array_like=True):
    """Milliseconds on each account, in the order of Account, since the process made its Manager."""

    training_ms: int = 0
    detecting_ms: int = 0
    reconfiguring_ms: int = 0
    recovering_ms: int = 0
    waiting_ms: int = 0

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(*(mine + theirs for mine, theirs in zip(self.fields, other.fields, strict=True)))

    @property
    def fields(self) -> tuple[int, ...]:
        return msgspec.structs.astuple(self)

    @property
    def total_ms(self) -> int:
        return sum(self.fields)


@dataclasses.dataclass
class Ledger:
    """One process's. The training thread books; any thread may read: what is booked is replaced in one store."""

    _booked: tuple[tuple[float, ...], Account, float] = ((0.0,) * len(Account), Account.WAITING, 0.0)

    def begin(self, now: float) -> None:
        self._booked = (self._booked[0], Account.WAITING, now)

    def enter(self, account: Account, now: float) -> None:
        """From now on time goes to `account`. Free of cost when it does already."""
        if self._booked[1] is not account:
            self._booked = (self._at(now), account, now)

    def rebook(self, account: Account, since: float, now: float) -> None:
        """The time from `since` (no earlier than the last change) until now went to `account` after all."""
        totals, current, began_at = self._booked
        since = min(max(since, began_at), now)
        changed = list(totals)
        changed[current] += since - began_at
        changed[account] += now - since
        self._booked = (tuple(changed), current, now)

    def spent(self, now: float) -> Spent:
        return Spent(*(round(seconds * 1e3) for seconds in self._at(now)))

    def _at(self, now: float) -> tuple[float, ...]:
        totals, current, began_at = self._booked
        if now <= began_at:
            return totals
        return (*totals[:current], totals[current] + now - began_at, *totals[current + 1 :])


@dataclasses.dataclass
class _Group:
    first_heard_at: float
    nonce: str
    ended: Spent = dataclasses.field(default_factory=Spent)  # processes before this one
    current: Spent = dataclasses.field(default_factory=Spent)
    heard_at: float = 0.0


class Books:
    """The lighthouse's side: each group's totals over all its processes that this lighthouse has heard of."""

    def __init__(self) -> None:
        self._groups: dict[str, _Group] = {}

    def heard(self, replica_id: str, nonce: str, spent: Spent, now: float) -> None:
        group = self._groups.get(replica_id)
        if group is None:
            if len(self._groups) >= GROUPS_MAX:
                del self._groups[min(self._groups, key=lambda name: self._groups[name].heard_at)]
            # Its process began to book before it was heard of here.
            group = self._groups[replica_id] = _Group(now - spent.total_ms / 1e3, nonce)
        if group.nonce != nonce:
            group.ended, group.nonce = group.ended + group.current, nonce
        group.current, group.heard_at = spent, now

    def statement(self, replica_id: str) -> dict[str, float] | None:
        """Seconds, up to when it was last heard of. Adds up: `wall_s` is the sum of the others."""
        group = self._groups.get(replica_id)
        if group is None:
            return None
        spent = group.ended + group.current
        absent_ms = max(0, round((group.heard_at - group.first_heard_at) * 1e3) - spent.total_ms)
        seconds = {f"{a.name.lower()}_s": ms / 1e3 for a, ms in zip(Account, spent.fields, strict=True)}
        return {**seconds, "absent_s": absent_ms / 1e3, "wall_s": (spent.total_ms + absent_ms) / 1e3}

    @property
    def groups(self) -> list[str]:
        return list(self._groups)
