"""The snapshots that a donor offers at the moment: a small table that serving threads wait on."""

import time
from collections import OrderedDict
from threading import Condition

from everstep.recovery.snapshot import Snapshot


class Offers:
    """Any thread. Keeps the latest `count_max`; who is pushed out or withdrawn is returned, so that its readers end."""

    def __init__(self, count_max: int) -> None:
        self._count_max = count_max
        self._changed = Condition()
        self._by_key: OrderedDict[str, Snapshot] = OrderedDict()
        self._is_closed = False

    def add(self, key: str, snapshot: Snapshot) -> list[Snapshot]:
        with self._changed:
            gone = [self._by_key.pop(key)] if key in self._by_key else []
            self._by_key[key] = snapshot
            while len(self._by_key) > self._count_max:
                gone.append(self._by_key.popitem(last=False)[1])
            self._changed.notify_all()
            kept = {held.id for held in self._by_key.values()}
        return [old for old in gone if old.id not in kept]

    def remove(self, key: str) -> list[Snapshot]:
        with self._changed:
            gone = [self._by_key.pop(key)] if key in self._by_key else []
            kept = {held.id for held in self._by_key.values()}
        return [old for old in gone if old.id not in kept]

    def close(self) -> list[Snapshot]:
        with self._changed:
            gone = list(self._by_key.values())
            self._by_key.clear()
            self._is_closed = True
            self._changed.notify_all()
        return gone

    def wait_for(self, key: str, timeout_s: float) -> Snapshot | None:
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while key not in self._by_key and not self._is_closed:
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    return None
                self._changed.wait(remaining)
            return self._by_key.get(key)

    def by_id(self, snapshot_id: str) -> Snapshot | None:
        with self._changed:
            return next((held for held in self._by_key.values() if held.id == snapshot_id), None)
