"""The store of a rendezvous round as a torch.distributed.Store."""

import datetime
from collections.abc import Sequence
from typing import Any

from torch.distributed import DistStoreError, Store  # type: ignore[attr-defined]

from everstep.errors import RoundStoreError
from everstep.link.round_store import RoundStore


class LinkStore(Store):  # type: ignore[misc,unused-ignore]
    """Served over the node's link: private to the round, and gone with it.

    Every operation raises `torch.distributed.DistStoreError` when the round is over or the time is; threads may share
    it. Values may be str or bytes, and come back as bytes.
    """

    def __init__(self, store: RoundStore) -> None:
        super().__init__()
        self._store = store

    def set(self, key: str, value: str | bytes) -> None:
        self._do(self._store.set, key, _bytes(value))

    def get(self, key: str) -> bytes:
        found: bytes = self._do(self._store.get, key)
        return found

    def add(self, key: str, value: int) -> int:
        total: int = self._do(self._store.add, key, int(value))
        return total

    def compare_set(self, key: str, expected: str | bytes, desired: str | bytes) -> bytes:
        now: bytes = self._do(self._store.compare_set, key, _bytes(expected), _bytes(desired))
        return now

    def wait(self, keys: Sequence[str], timeout: datetime.timedelta | None = None) -> None:
        self._do(self._store.wait, list(keys), None if timeout is None else timeout.total_seconds())

    def check(self, keys: Sequence[str]) -> bool:
        return bool(self._do(self._store.check, list(keys)))

    def delete_key(self, key: str) -> bool:
        return bool(self._do(self._store.delete_key, key))

    def num_keys(self) -> int:
        count: int = self._do(self._store.num_keys)
        return count

    def list_keys(self) -> list[str]:
        keys: list[str] = self._do(self._store.list_keys)
        return keys

    def append(self, key: str, value: str | bytes) -> None:
        self._do(self._store.append, key, _bytes(value))

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        values: list[bytes] = self._do(self._store.multi_get, list(keys))
        return values

    def multi_set(self, keys: Sequence[str], values: Sequence[str | bytes]) -> None:
        self._do(self._store.multi_set, list(keys), [_bytes(value) for value in values])

    def queue_push(self, key: str, value: str | bytes) -> None:
        self._do(self._store.queue_push, key, _bytes(value))

    def queue_pop(self, key: str, block: bool = True) -> bytes:
        value: bytes = self._do(self._store.queue_pop, key, block)
        return value

    def queue_len(self, key: str) -> int:
        count: int = self._do(self._store.queue_len, key)
        return count

    def has_extended_api(self) -> bool:
        return True

    def clone(self) -> "LinkStore":
        return type(self)(self._store)

    def _do(self, operation: Any, *arguments: Any) -> Any:
        self._store.timeout_s = self.timeout.total_seconds()  # type: ignore[attr-defined,unused-ignore]
        try:
            return operation(*arguments)
        except RoundStoreError as error:
            raise DistStoreError(str(error)) from error


def _bytes(value: str | bytes | Sequence[int]) -> bytes:
    """torch's own callers in C++ hand over lists of small integers."""
    return value.encode() if isinstance(value, str) else bytes(value)
