"""Live state over a process group: members in threads of one process, each with a transport, and real Gloo between."""

import contextlib
import struct
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import xxhash

from everstep.collectives.store import host_store
from everstep.core.types import QuorumId
from everstep.errors import ConfigError, RecoveryFailed, RemoteProtocolError, StateMismatch, StepInterrupted
from everstep.recovery import (
    Arrival,
    InPlace,
    Landing,
    Meeting,
    Peer,
    Place,
    RecoveryTransport,
    Snapshot,
    Transfer,
    TransferAuth,
)
from everstep.recovery.conversation import FRAME_BYTES, Offered, Said, WantChunk, pack, unpack
from everstep.recovery.peers import BULK, TALK
from everstep.train.transports import transport_for
from tests.recovery.trees import assert_same
from tests.recovery.wire_faults import Strike, StruckTransport
from tests.recovery.wires import AUTH, DEADLINE_S, Running, state_of
from tests.support.waiting import wait_until

CHUNK_BYTES = 1 << 16
KEY = "1.2/3/abc"
MIB = 2.0
ENDS_WITHIN_S = 5.0


class Party:
    """A joiner (rank 0) and donors, each with a transport of its own."""

    def __init__(self, store: str, donors: int, tokens: list[TransferAuth | None]) -> None:
        self.transports = [opened(transport_for("process_group"), auth) for auth in tokens]
        self._donors = tuple(Peer(rank=rank, name=f"{rank}#1") for rank in range(1, donors + 1))
        self._store = store

    def transfer(self, rank: int) -> Transfer:
        meeting = Meeting(quorum_id=QuorumId(1, 2), store=self._store, prefix="recovery0")
        return Transfer(key=KEY, rank=rank, joiner=Peer(rank=0, name="0#1"), donors=self._donors, meeting=meeting)

    def offer(self, rank: int, snapshot: Snapshot) -> None:
        self.transports[rank].offer(snapshot, [self.transfer(rank)])

    def fetch(self, own: dict[str, Any], landing: Landing | None = None, **more: Any) -> Any:
        return self.transports[0].fetch(self.transfer(0), Arrival(own, landing or Landing(), **more))


def opened(transport: RecoveryTransport, auth: TransferAuth | None = None) -> RecoveryTransport:
    assert transport.open(Place(host="127.0.0.1", auth=auth, timeout_s=20.0)) == ""
    return transport


@contextlib.contextmanager
def party(*states: dict[str, Any] | None, tokens: list[TransferAuth | None] | None = None) -> Iterator[Party]:
    """A donor for each state, which it lends; None: it has not offered."""
    with host_store() as store:
        made = Party(store.address, len(states), tokens or [None] * (1 + len(states)))
        for rank, state in enumerate(states, 1):
            if state is not None:
                made.offer(rank, Snapshot.lend(state, CHUNK_BYTES))
        try:
            yield made
        finally:
            for transport in made.transports:
                transport.close()
                transport.close()
            wait_until(lambda: not _threads(), ENDS_WITHIN_S, what=f"the end of {_threads()}")


def _threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(("everstep-peers", "everstep-recovery"))]


@pytest.mark.parametrize("token", [None, AUTH], ids=["open", "token"])
def test_a_state_arrives_whole_in_the_joiners_own_tensors(token: Any) -> None:
    state, own, progress = state_of(MIB), state_of(MIB), []
    own["model"]["w"].zero_()
    where = own["model"]["w"].data_ptr()
    with party(state, tokens=[token, token]) as them:
        fetch = them.fetch(own, InPlace(own), on_progress=lambda done, total: progress.append((done, total)))
        there = fetch.run()
    assert_same(there, state)
    assert there["model"]["w"].data_ptr() == where
    assert progress[-1] == (MIB * (1 << 20), MIB * (1 << 20))
    assert fetch.report.transport == {"1#1": "process_group"}
    assert not fetch.report.retries
    assert not fetch.report.digest_errors


def test_all_donors_send_stripes_and_where_they_differ_the_state_is_that_of_one() -> None:
    states = [{"rng": torch.full((5000,), n), "name": n, "model": state_of(MIB)["model"]} for n in range(3)]
    sends: set[int] = set()

    def together(donor: int, number: int, lane: int, tensor: torch.Tensor) -> torch.Tensor:
        """Nobody sends a chunk before all are asked for one; the first message on the lane is the manifest."""
        if lane == BULK and number > 1:
            sends.add(donor)
            wait_until(lambda: len(sends) == len(states), DEADLINE_S)
        return tensor

    with party(*[None] * len(states)) as them:
        for rank, state in enumerate(states, 1):
            them.transports[rank] = opened(StruckTransport(partial(together, rank)))
            them.offer(rank, Snapshot.lend(state, CHUNK_BYTES))
        fetch = them.fetch(states[0])
        there = fetch.run()
    assert_same(there, states[there["name"]])
    assert len(fetch.report.bytes_from) == 3
    assert not fetch.report.lost


def test_many_tiny_tensors_and_a_state_without_payload_arrive() -> None:
    tiny = {"model": {str(i): torch.full((i % 7,), i) for i in range(3000)}, "big": torch.arange(100_000)}
    for state in (tiny, {"step": 3}):
        with party(state) as them:
            assert_same(them.fetch(state).run(), state)


def test_a_state_that_does_not_fit_is_refused() -> None:
    with party(state_of()) as them, pytest.raises(StateMismatch, match=r"model\.w is"):
        them.fetch({"model": {"w": torch.ones(5)}, "step": 1, "lr": 1.0}).run()


def test_a_joiner_without_the_token_gets_nothing() -> None:
    with party(state_of(), tokens=[TransferAuth(b"another one"), AUTH]) as them:
        with pytest.raises(ConfigError, match="does not accept this member's job token"):
            them.fetch(state_of()).run()


def test_a_donor_without_the_token_is_not_believed() -> None:
    with party(state_of(), tokens=[AUTH, None]) as them:
        with pytest.raises((ConfigError, RemoteProtocolError)):
            them.fetch(state_of()).run()


def test_a_fetch_is_aborted_while_it_waits_for_a_donor() -> None:
    with party(None) as them, Running(them.fetch(state_of())) as running:
        running.fetch.abort()
        running.wait()
        assert isinstance(running.error, StepInterrupted)


def test_a_fetch_is_aborted_in_the_middle_and_nothing_is_written_any_more() -> None:
    state, own = state_of(64), state_of(64)
    has_begun = threading.Event()
    with party(state, state) as them:
        fetch = them.fetch(own, InPlace(own), on_progress=lambda *_: has_begun.set())
        with Running(fetch) as running:
            assert has_begun.wait(ENDS_WITHIN_S)
            fetch.abort()
            running.wait()
        assert isinstance(running.error, StepInterrupted)
        own["model"]["w"].fill_(-1)
        for transport in them.transports[1:]:
            transport.withdraw(KEY)
    assert own["model"]["w"].eq(-1).all()


def test_a_donor_that_withdraws_in_the_middle_fails_the_fetch_and_is_free_at_once() -> None:
    state, own = state_of(64), state_of(64)
    snapshot = Snapshot.lend(state, CHUNK_BYTES)
    with party(None) as them:
        them.offer(1, snapshot)

        def withdraw(done: int, _total: int) -> None:
            if done > 1 << 22 and not snapshot.is_revoked:
                snapshot.revoke()
                them.transports[1].withdraw(KEY)
                state["model"]["w"].fill_(-1)

        with pytest.raises(RecoveryFailed, match="1#1"):
            them.fetch(own, InPlace(own), on_progress=withdraw).run()


# ---- damage and liars


def striking(them: Party, strike: Strike) -> None:
    """The first donor's messages pass through `strike` from here on."""
    them.transports[1] = opened(StruckTransport(strike))


def _flipped(tensor: torch.Tensor) -> torch.Tensor:
    damaged = tensor.clone()
    damaged[len(damaged) // 2] ^= 1
    return damaged


@pytest.mark.parametrize("lane", [TALK, BULK], ids=["digest", "chunk"])
def test_a_flipped_bit_is_counted_and_the_chunk_sent_again(lane: int) -> None:
    state, first_chunk = state_of(1), {TALK: 4, BULK: 2}[lane]
    with party(None) as them:
        striking(them, lambda n, of, tensor: _flipped(tensor) if (n, of) == (first_chunk, lane) else tensor)
        them.offer(1, Snapshot.lend(state, CHUNK_BYTES))
        fetch = them.fetch(state_of(1))
        assert_same(fetch.run(), state)
    assert fetch.report.digest_errors == 1


def test_a_donor_that_sends_damage_alone_is_given_up_and_nothing_is_loaded() -> None:
    with party(None) as them:
        striking(them, lambda n, lane, tensor: _flipped(tensor) if lane == BULK and n > 1 else tensor)
        them.offer(1, Snapshot.lend(state_of(1), CHUNK_BYTES))
        fetch = them.fetch(state_of(1))
        with pytest.raises(RecoveryFailed, match="and so did those before it"):
            fetch.run()
    assert fetch.report.digest_errors == 3


def test_a_damaged_manifest_fails_the_fetch() -> None:
    with party(None) as them:
        striking(them, lambda n, lane, tensor: _flipped(tensor) if (n, lane) == (1, BULK) else tensor)
        them.offer(1, Snapshot.lend(state_of(1), CHUNK_BYTES))
        with pytest.raises(RecoveryFailed, match="arrived damaged"):
            them.fetch(state_of(1)).run()


LIES: dict[str, Said] = {
    "too large": Offered("0" * 16, 1 << 40, b"", b""),
    "negative": Offered("0" * 16, -1, b"", b""),
    "without a name": Offered("", 10, b"", b""),
    "something else": WantChunk(0),
}


@pytest.mark.parametrize("lie", LIES)
def test_an_offer_that_no_donor_makes_is_refused_before_memory_is_taken_for_it(lie: str) -> None:
    with party(None) as them:
        striking(them, lambda n, lane, tensor: pack(LIES[lie]) if (n, lane) == (2, TALK) else tensor)
        them.offer(1, Snapshot.lend(state_of(1), CHUNK_BYTES))
        with pytest.raises(RemoteProtocolError):
            them.fetch(state_of(1)).run()


def test_a_damaged_or_illegible_frame_is_refused() -> None:
    for position in range(FRAME_BYTES):
        frame = pack(WantChunk(1))
        frame[position] ^= 1
        with contextlib.suppress(RemoteProtocolError):
            assert unpack(frame) == WantChunk(1)  # the damage is beyond its end
    content = b"\xc1 is no MessagePack"
    frame = torch.zeros(FRAME_BYTES, dtype=torch.uint8)
    head = struct.pack("<H8s", len(content), xxhash.xxh3_64_digest(content))
    frame[: len(head) + len(content)] = torch.frombuffer(bytearray(head + content), dtype=torch.uint8)
    with pytest.raises(RemoteProtocolError, match="illegible"):
        unpack(frame)


def test_without_a_token_groups_open_on_this_host_alone() -> None:
    with pytest.raises(ConfigError, match="job token"):
        transport_for("process_group").open(Place(host="10.0.0.1"))
