"""What a fetch took memory for is free when it has ended and its result is gone, without a garbage collection."""

import contextlib
import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from everstep.errors import RecoveryFailed
from everstep.recovery import Fetch, Landing, Limits, Snapshot
from everstep.recovery.manifest import decode
from everstep.recovery.readers import Readers
from tests.recovery.test_donors import donors
from tests.recovery.test_over_group import party
from tests.recovery.wires import Proxy, Tamper, request_to, serving, state_of

CHUNK_BYTES = 1 << 16
MIB = 4.0


class Watched(Landing):
    """Knows which of the buffers that it gave away are still there."""

    def __init__(self) -> None:
        super().__init__()
        self._given: list[weakref.ref[Any]] = []

    def take(self, size: int) -> torch.Tensor:
        buffer = super().take(size)
        self._given.append(weakref.ref(buffer))
        return buffer

    def give_back(self, buffer: torch.Tensor) -> None:
        """Keeps none for another attempt."""

    @property
    def taken(self) -> int:
        return len(self._given)

    @property
    def held(self) -> int:
        return sum(given() is not None for given in self._given)


@pytest.fixture(autouse=True)
def no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def dying_at(size: int) -> Tamper:
    """A source that is gone for good when it has sent so much."""
    dead = threading.Event()

    def tamper(offset: int, data: bytes) -> bytes | None:
        if offset > size:
            dead.set()
        return None if dead.is_set() else data

    return tamper


def test_of_a_fetch_that_failed() -> None:
    landing = Watched()
    with serving(Snapshot.lend(state_of(MIB), CHUNK_BYTES)) as (_, url), Proxy(url, dying_at(1 << 20)) as proxy:
        fetch = Fetch(request_to(proxy.url), landing=landing)
        with contextlib.suppress(RecoveryFailed):
            fetch.run()
    assert fetch.report.lost
    assert landing.taken
    assert not landing.held


def test_of_a_fetch_that_lost_a_donor() -> None:
    landing, state = Watched(), state_of(MIB)
    with donors(state, state) as ((_, url), (_, other)), Proxy(url, dying_at(1 << 18)) as proxy:
        fetch = Fetch(request_to(proxy.url, other_urls=(other,)), landing=landing)
        there: dict[str, Any] | None = fetch.run()
        assert there is not None
        there = None
    assert landing.taken
    assert not landing.held


def test_of_a_fetch_over_a_process_group() -> None:
    landing, own = Watched(), state_of(MIB)
    with party(state_of(MIB)) as them:
        fetch = them.fetch(own, landing)
        there: dict[str, Any] | None = fetch.run()
        assert there is not None
        there = None
        del fetch
    assert landing.taken
    assert not landing.held


def test_of_readers_whose_donor_is_gone() -> None:
    snapshot = Snapshot.lend(state_of(MIB), CHUNK_BYTES)
    memory = weakref.ref(_read_in_vain(snapshot))
    assert memory() is None


class Gone:
    """A donor's memory that cannot be read any more."""

    def read(self, begin: int, end: int, pieces: list[memoryview]) -> None:
        raise ProcessLookupError("no such process")


def _read_in_vain(snapshot: Snapshot) -> Gone:
    memory: Any = Gone()
    manifest = decode(bytearray(snapshot.manifest_bytes), Limits())
    with Readers(memory, manifest, lambda _: [memoryview(bytearray(CHUNK_BYTES))]) as readers:
        readers.start(range(4), 2)
        with pytest.raises(ProcessLookupError):
            readers.digest_of(0)
    return memory  # type: ignore[no-any-return]
