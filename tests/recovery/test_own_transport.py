"""The transport that docs/recovery.md shows works, and an Arrival gives away no state that is not whole."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from everstep.core.types import QuorumId
from everstep.errors import ConfigError, RecoveryFailed, RemoteProtocolError, StateMismatch, StepInterrupted
from everstep.recovery import (
    Arrival,
    HttpTransport,
    InPlace,
    Landing,
    Meeting,
    Peer,
    Place,
    RecoveryTransport,
    Snapshot,
    Transfer,
)
from everstep.train.transports import check_address, transport_for
from tests.recovery.trees import assert_same
from tests.recovery.wires import KEY, state_of

ROOT = Path(__file__).parents[2]
CHUNK_BYTES = 1 << 14
DONORS = (Peer(rank=0, name="0#1"), Peer(rank=1, name="1#1"))


def transfer(rank: int) -> Transfer:
    meeting = Meeting(quorum_id=QuorumId(1, 2), store="", prefix="")
    return Transfer(key=KEY, rank=rank, joiner=Peer(rank=2, name="2#1"), donors=DONORS, meeting=meeting)


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Any]:
    _, _, after = (ROOT / "docs/recovery.md").read_text().partition("```python\n")
    shown: dict[str, Any] = {}
    exec(after.partition("```")[0], shown)
    transport = shown["SharedDirectory"](tmp_path)
    yield transport
    transport.close()


def test_a_state_arrives_by_the_transport_that_the_document_shows(own: Any) -> None:
    assert isinstance(own, RecoveryTransport)
    assert transport_for(own) is own
    assert own.open(Place(host="127.0.0.1")) == ""
    state, mine = state_of(), state_of()
    mine["model"]["w"].zero_()
    fetching = own.fetch(transfer(2), Arrival(mine, InPlace(mine)))
    for rank in (0, 1):
        own.offer(Snapshot.lend(state, CHUNK_BYTES), [transfer(rank)])
    there: Any = fetching.run()
    own.withdraw(KEY)
    assert_same(there, state)
    assert there["model"]["w"].data_ptr() == mine["model"]["w"].data_ptr()
    assert fetching.report.done_bytes == state["model"]["w"].nbytes
    fetching.abort()
    with pytest.raises(StepInterrupted):
        fetching.run()


def test_what_a_revoked_snapshot_held_is_never_published(own: Any, tmp_path: Path) -> None:
    snapshot = Snapshot.lend(state_of(), CHUNK_BYTES)
    snapshot.revoke()
    own.offer(snapshot, [transfer(0)])
    own.close()
    assert not list(tmp_path.glob("*.digests"))


def test_an_arrival_is_whole_or_no_state() -> None:
    state, told = state_of(), []
    snapshot = Snapshot.take(state, CHUNK_BYTES)
    landing = Landing()
    landing.prepare(state)  # zeroes: fresh memory may still hold what the snapshot holds
    arrival = Arrival(state, landing, lambda done, total: told.append((done, total)))
    with pytest.raises(RecoveryFailed):
        arrival.state()
    with pytest.raises(RemoteProtocolError):
        arrival.begin(b"no manifest")
    arrival.begin(snapshot.manifest_bytes)
    assert arrival.chunk_count == snapshot.chunk_count > 3
    for index in range(snapshot.chunk_count):
        with pytest.raises(RecoveryFailed, match="have not landed"):
            arrival.state()
        assert not arrival.landed(index, snapshot.digest(index))  # nothing has come
        for piece, source in zip(arrival.chunk(index), snapshot.chunk(index), strict=True):
            piece[:] = source
        for _ in range(2):
            assert arrival.landed(index, snapshot.digest(index))
    assert arrival.report.digest_errors == snapshot.chunk_count
    assert told[-1] == (snapshot.total_bytes, snapshot.total_bytes)
    assert_same(arrival.state(), state)
    arrival.discard()
    with pytest.raises(RecoveryFailed):
        arrival.state()


def test_an_arrival_that_does_not_fit_takes_no_memory() -> None:
    arrival = Arrival({"model": {"w": torch.ones(5)}, "step": 1, "lr": 1.0}, Landing())
    with pytest.raises(StateMismatch):
        arrival.begin(Snapshot.take(state_of()).manifest_bytes)
    assert arrival.chunk_count == 0


class _Nameless(HttpTransport):
    name = ""


@pytest.mark.parametrize("choice", ["ftp", 3, threading, _Nameless()], ids=repr)
def test_what_is_no_transport_is_refused(choice: object) -> None:
    with pytest.raises(ConfigError, match=r"recovery_transport=|transport's name"):
        transport_for(choice)


def test_an_address_that_is_too_long_to_be_told_is_refused() -> None:
    with pytest.raises(ConfigError, match="at most 200"):
        check_address(transport_for("http"), "x" * 201)
