"""What members of a group tell each other: the store's protocol, the lane's frames, the step header."""

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from everstep.collectives.lane import Lane
from everstep.collectives.process_group import Membership, ReduceOp
from everstep.collectives.sockets import host_and_port
from everstep.collectives.store import LENGTH, AskMissing, Bring, HostedStore, Reply, Request, frame, host_store
from everstep.collectives.store_client import StoreClient, connect_store
from everstep.core.types import LocalProtocolError, Member, MemberId, Quorum, QuorumId, RemoteProtocolError
from everstep.errors import PeerLost, StepInterrupted
from everstep.train.header import ROW_NUMBERS, Contribution, StepHeader
from tests.fuzz.damage import packed, spoiled
from tests.fuzz.rounds import Fuzz, rounds

DEADLINE_S = 10.0
SEEDS = (frame(Bring("k", 0, 2, b"v" * 40)), frame(AskMissing("k")))


@pytest.fixture
def hosted() -> Iterator[HostedStore]:
    with host_store() as store:
        yield store


def client_of(store: HostedStore) -> StoreClient:
    return connect_store(host_and_port(store.address), lambda: False)


@rounds(120)
@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_whatever_a_member_says_to_the_store_the_others_meet(fuzz: Fuzz, hosted: HostedStore) -> None:
    sizes = st.integers(-2, 5) | st.sampled_from((1 << 40, -(1 << 40), 4096, 4097))
    brings = st.builds(Bring, key=st.sampled_from("kl"), rank=sizes, size=sizes, value=st.binary(max_size=9))
    valid = packed(brings | st.from_type(Request)).map(lambda payload: LENGTH.pack(len(payload)) + payload)  # type: ignore[arg-type]
    meetings = iter(range(1 << 62))

    @given(st.lists(spoiled(valid, SEEDS), min_size=1, max_size=3), st.booleans())
    def holds(frames: list[bytes], is_framed: bool) -> None:
        with socket.create_connection(host_and_port(hosted.address), DEADLINE_S) as hostile:
            with contextlib.suppress(ConnectionError):
                for data in frames:
                    hostile.sendall(LENGTH.pack(len(data) - 4) + data[4:] if is_framed and len(data) > 4 else data)
            # One that meets itself: the store answers at once, or not at all.
            client = client_of(hosted)
            try:
                assert client.gather(f"healthy {next(meetings)}", 0, 1, b"here", DEADLINE_S) == [b"here"]
            finally:
                client.close()

    fuzz(holds)


@rounds(80)
def test_whatever_the_store_says_is_a_gathering_or_a_lost_peer(fuzz: Fuzz) -> None:
    valid = packed(st.from_type(Reply)).map(lambda payload: LENGTH.pack(len(payload)) + payload)  # type: ignore[arg-type]

    @given(spoiled(valid, SEEDS), st.booleans())
    def holds(said: bytes, is_framed: bool) -> None:
        near, far = socket.socketpair()
        with far, contextlib.closing(StoreClient(near)) as client:
            far.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                far.send(LENGTH.pack(len(said) - 4) + said[4:] if is_framed and len(said) > 4 else said)
            far.shutdown(socket.SHUT_WR)
            with contextlib.suppress(PeerLost):
                assert len(client.gather("k", 0, 1, b"v", DEADLINE_S)) == 1

    fuzz(holds)


class Vote(threading.Thread):
    """A member that connects its lane and votes once."""

    def __init__(self, lane: Lane, membership: Membership, addresses: list[bytes]) -> None:
        super().__init__(name="a member of a lane under test")
        self._lane, self._membership, self._addresses = lane, membership, addresses
        self.error: Exception | None = None
        self.result: list[int] = []
        self.start()

    def run(self) -> None:
        try:
            self._lane.connect(self._membership, self._addresses)
            self._lane.reduce([self._membership.rank + 5], ReduceOp.MIN, self.result.extend).wait()
        except Exception as error:  # boundary of a thread: the test looks at it
            self.error = error

    def end(self) -> "Vote":
        self.join(2 * DEADLINE_S)
        assert not self.is_alive()
        return self


def membership(rank: int, seq: int, size: int = 2) -> Membership:
    return Membership(quorum_id=QuorumId(1, seq), rank=rank, size=size, timeout_s=DEADLINE_S)


@rounds(40)
def test_whatever_strangers_say_to_a_lane_its_members_vote(fuzz: Fuzz) -> None:
    sequence = iter(range(1, 1 << 30))
    hellos = st.binary(min_size=40, max_size=40)

    with contextlib.closing(Lane("127.0.0.1")) as one, contextlib.closing(Lane("127.0.0.1")) as two:
        addresses = [one.address(), two.address()]
        genuine = addresses[0][:16]

        @given(st.lists(spoiled(hellos | hellos.map(lambda rest: genuine + rest[16:])), max_size=4))
        def holds(said: list[bytes]) -> None:
            seq = next(sequence)
            with contextlib.ExitStack() as strangers:
                for data in said:
                    port = int.from_bytes(addresses[0][16:18], "little")
                    stranger = strangers.enter_context(socket.create_connection(("127.0.0.1", port), DEADLINE_S))
                    stranger.sendall(data[:1000])
                    stranger.shutdown(socket.SHUT_WR)
                votes = [Vote(lane, membership(rank, seq), addresses) for rank, lane in enumerate((one, two))]
                for vote in votes:
                    assert vote.end().error is None
                    assert vote.result == [5]
            for lane in (one, two):
                lane.release_previous()

        fuzz(holds)


@rounds(60)
def test_any_address_of_a_lane_is_connected_or_a_lost_peer(fuzz: Fuzz) -> None:
    with contextlib.closing(Lane("127.0.0.1")) as lane:
        sequence = iter(range(1, 1 << 30))
        own = lane.address()
        hosts = st.sampled_from((b"127.0.0.1", b"::1", b"127.0.0.1\0x", b"\xff\xfe", b"..", b"a" * 46, b"127.0.0.1."))
        addresses = st.tuples(hosts, st.integers(0, 9)).map(
            lambda pair: (own[:16] + pair[1].to_bytes(2, "little") + pair[0]).ljust(64, b"\0")
        )

        @given(addresses)
        def holds(address: bytes) -> None:
            with pytest.raises(StepInterrupted):
                lane.connect(membership(0, next(sequence)), [own, address])

        fuzz(holds)


@rounds(80)
def test_a_vote_of_any_bytes_is_a_vote_a_lost_peer_or_called_out_of_turn(fuzz: Fuzz) -> None:
    sequence = iter(range(1, 1 << 30))

    with contextlib.closing(Lane("127.0.0.1")) as lane, socket.create_server(("127.0.0.1", 0)) as peer:
        own = lane.address()
        theirs = (b"s" * 16 + peer.getsockname()[1].to_bytes(2, "little") + b"127.0.0.1").ljust(64, b"\0")

        @given(spoiled(st.just((1).to_bytes(8, "little") + (3).to_bytes(8, "little"))))
        def holds(said: bytes) -> None:
            seq = next(sequence)
            hello = (
                own[:16] + (1).to_bytes(8, "little") + seq.to_bytes(8, "little") + (1).to_bytes(4, "little") + bytes(4)
            )
            port = int.from_bytes(own[16:18], "little")
            with socket.create_connection(("127.0.0.1", port), DEADLINE_S) as ahead:
                ahead.sendall(hello + said[:1000])
                ahead.shutdown(socket.SHUT_WR)
                lane.connect(membership(0, seq), [own, theirs])
                with peer.accept()[0], contextlib.suppress(StepInterrupted, LocalProtocolError):
                    lane.reduce([7], ReduceOp.MIN, lambda _: None).wait()
            lane.release_previous()

        fuzz(holds)


QUORUM = Quorum(QuorumId(1, 1), tuple(Member(MemberId(name, 1)) for name in "ab"))


@rounds(80)
def test_header_rows_of_any_numbers_are_contributions_or_a_remote_protocol_error(fuzz: Fuzz) -> None:
    limbs = st.integers(0, (1 << 21) - 1)
    whole = st.lists(limbs | st.integers(-(1 << 63), (1 << 63) - 1), min_size=2 * ROW_NUMBERS, max_size=2 * ROW_NUMBERS)
    floats = st.lists(limbs.map(float) | st.floats(width=32), min_size=2 * ROW_NUMBERS, max_size=2 * ROW_NUMBERS)

    @given(whole.map(lambda row: torch.tensor(row)) | floats.map(lambda row: torch.tensor(row, dtype=torch.float32)))
    def holds(rows: torch.Tensor) -> None:
        header = StepHeader(Contribution(samples=3))
        header.write(torch.empty(2 * ROW_NUMBERS), QUORUM, 0)
        with contextlib.suppress(RemoteProtocolError):
            header.read(rows)
            assert len(header.digest(1)) == 16

    fuzz(holds)
