"""GlooProcessGroup among real processes: aborts, kills, stops, reconfigurations."""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from everstep.collectives.gloo import GlooProcessGroup
from everstep.collectives.process_group import Membership, ReduceOp
from everstep.collectives.store import host_store
from everstep.core.types import LocalProtocolError, QuorumId
from everstep.errors import ConfigError, PeerLost, StepInterrupted
from tests.collectives.members import DEADLINE_S, Member, Outcome, configure, members
from tests.support.proc import is_alive
from tests.support.waiting import wait_until

ABORT_BOUND_S = 0.5  # milliseconds on an idle machine; far below every timeout


@pytest.fixture
def store() -> Iterator[str]:
    with host_store() as hosted:
        yield hosted.address


def abort(group: list[Member], seq: int) -> float:
    """Abort on every member; the instant before the first order."""
    began_at = time.monotonic()
    orders = [m.begin("abort", seq) for m in group]
    for member, order in zip(group, orders, strict=True):
        assert member.outcome(order).took_s < ABORT_BOUND_S
    return began_at


def outcomes(group: list[Member], order: str, *args: object) -> list[Outcome]:
    numbers = [m.begin(order, *args) for m in group]
    return [m.outcome(number) for m, number in zip(group, numbers, strict=True)]


def assert_interrupted_soon(results: list[Outcome], since: float) -> None:
    for result in results:
        assert result.error in ("StepInterrupted", "PeerLost"), result
        assert result.ended_at - since < ABORT_BOUND_S, result


def wait_until_reducing(group: list[Member]) -> None:
    """Every member is within a stream of allreduces: each keeps its CPU or its peers busy."""
    for member in group:
        member.do("ping")


def test_members_sum_take_extremes_and_gather_in_rank_order(store: str) -> None:
    with members(3) as group:
        configure(group, 1, store)
        for op, expected in ((ReduceOp.SUM, [3.0, 6.0]), (ReduceOp.MIN, [1.0, 2.0]), (ReduceOp.MAX, [1.0, 2.0])):
            assert [o.value for o in outcomes(group, "allreduce", [1.0, 2.0], op)] == [expected] * 3
        orders = [m.begin("allgather", [float(rank), 7.0]) for rank, m in enumerate(group)]
        for member, order in zip(group, orders, strict=True):
            assert member.outcome(order).value == [[0.0, 7.0], [1.0, 7.0], [2.0, 7.0]]


@pytest.mark.parametrize("count", [3, 5])
def test_a_peer_killed_in_an_allreduce_raises_on_every_survivor_and_they_go_on_at_once(store: str, count: int) -> None:
    with members(count) as group:
        configure(group, 1, store)
        running = [m.begin("reduce_many", 10_000) for m in group]
        wait_until_reducing(group)
        victim, survivors = group[1], [*group[:1], *group[2:]]
        victim.kill()
        since = abort(survivors, 1)
        assert_interrupted_soon(
            [m.outcome(number) for m, number in zip(group, running, strict=True) if m is not victim], since
        )
        configure(survivors, 2, store)
        results = outcomes(survivors, "allreduce", [1.0])
        assert [o.value for o in results] == [[count - 1.0]] * (count - 1)


def test_an_allreduce_stuck_on_a_stopped_peer_raises_when_aborted(store: str) -> None:
    with members(3) as group:
        configure(group, 1, store)
        group[2].signal(signal.SIGSTOP)
        stuck = [m.begin("allreduce", [1.0]) for m in group[:2]]
        for member in group[:2]:
            member.do("ping")
        since = abort(group[:2], 1)
        assert_interrupted_soon([m.outcome(n) for m, n in zip(group[:2], stuck, strict=True)], since)
        configure(group[:2], 2, store)
        assert [o.value for o in outcomes(group[:2], "allreduce", [1.0])] == [[2.0]] * 2


def test_every_survivor_names_a_killed_peer_by_its_rank_without_any_abort(store: str) -> None:
    with members(4) as group:
        configure(group, 1, store)
        for member in group:  # its helper has ended: it knows who is at the far end of which connection
            member.do("census")
        survivors = [*group[:1], *group[2:]]
        running = [m.begin("reduce_many", 100_000) for m in survivors]
        group[1].kill()
        for member, number in zip(survivors, running, strict=True):
            result = member.outcome(number)
            assert (result.error, result.peer) == ("PeerLost", 1), result
            assert result.took_s < 2.0
        again = group[0].outcome(group[0].begin("allreduce", [1.0]))
        assert (again.error, again.peer) == ("PeerLost", 1)
        assert again.took_s < ABORT_BOUND_S


def test_a_build_waiting_for_a_member_that_never_comes_is_aborted(store: str) -> None:
    with members(2) as group:
        waiting = [m.begin("configure", 1, rank, 3, store) for rank, m in enumerate(group)]
        for member in group:
            member.do("ping")
        since = abort(group, 1)
        assert_interrupted_soon([m.outcome(n) for m, n in zip(group, waiting, strict=True)], since)
        configure(group, 2, store)


def test_a_build_waiting_for_the_connection_of_a_stopped_member_is_aborted_and_leaves_nothing(store: str) -> None:
    with members(3) as group:
        for member in group:
            configure([member], 1, store)
        before = [m.do("census") for m in group[:2]]
        # The higher address opens the connection, so that the other two wait for it.
        group[2].begin("stop_before_connecting", 2, 2, 3, store, "127.0.0.2")
        waiting = [m.begin("configure", 2, rank, 3, store) for rank, m in enumerate(group[:2])]
        wait_until(lambda: _state_of(group[2].pid) == "T", what="the third member stops")
        since = abort(group[:2], 2)
        assert_interrupted_soon([m.outcome(n) for m, n in zip(group[:2], waiting, strict=True)], since)
        wait_until(lambda: is_within(before, [m.do("census") for m in group[:2]]), what="all of the build is gone")


def _state_of(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0]


def test_a_build_waits_no_longer_than_its_timeout_and_names_who_is_missing(store: str) -> None:
    with GlooProcessGroup() as group, pytest.raises(PeerLost, match=r"ranks \[1\] did not come") as lost:
        group.configure(Membership(quorum_id=QuorumId(1, 1), rank=0, size=2, store=store, timeout_s=0.2))
    assert lost.value.peer == 1


def test_a_store_that_is_gone_is_said_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        gone = f"127.0.0.1:{server.getsockname()[1]}"
    with GlooProcessGroup() as group, pytest.raises(PeerLost, match="nothing listens at the store's address"):
        group.configure(Membership(quorum_id=QuorumId(1, 1), rank=0, size=2, store=gone))


def test_a_bind_host_of_another_machine_is_an_error_of_the_operator(store: str) -> None:
    with GlooProcessGroup(bind_host="192.0.2.1") as group, pytest.raises(ConfigError, match="bind_host"):
        group.configure(Membership(quorum_id=QuorumId(1, 1), rank=0, size=2, store=store))


def test_an_abort_forbids_the_ids_up_to_it_before_they_are_configured(store: str) -> None:
    with GlooProcessGroup() as group:
        group.abort(QuorumId(1, 5))
        for seq in (4, 5):
            with pytest.raises(StepInterrupted):
                group.configure(Membership(quorum_id=QuorumId(1, seq), rank=0, size=2, store=store))
        group.configure(Membership(quorum_id=QuorumId(1, 6), rank=0, size=1))
        group.abort(QuorumId(1, 5))
        group.allreduce(torch.ones(1)).wait()
        with pytest.raises(LocalProtocolError):
            group.configure(Membership(quorum_id=QuorumId(1, 6), rank=0, size=1))
        group.abort(QuorumId(2, 0))
        with pytest.raises(StepInterrupted):
            group.allreduce(torch.ones(1))


def test_a_group_of_one_is_the_identity() -> None:
    with GlooProcessGroup() as group:
        group.configure(Membership(quorum_id=QuorumId(1, 1), rank=0, size=1))
        tensor = torch.tensor([1.0, 2.0])
        work = group.allreduce(tensor)
        work.wait()
        assert work.is_completed()
        assert tensor.tolist() == [1.0, 2.0]
        assert group.allgather(tensor).tolist() == [[1.0, 2.0]]
        assert (group.rank, group.size, group.quorum_id) == (0, 1, QuorumId(1, 1))


def test_a_tensor_that_cannot_be_reduced_is_the_callers_error_and_the_group_lives_on(store: str) -> None:
    with members(2) as group:
        configure(group, 1, store)
        for result in outcomes(group, "allreduce_unreducible"):
            assert result.error == "RuntimeError"
        assert not any(o.error for o in outcomes(group, "allreduce", [1.0]))


def test_a_slower_peer_gets_its_result_after_the_faster_one_moved_on(store: str) -> None:
    with members(2) as group:
        fast, slow = group
        configure(group, 1, store)
        fast.do("issue", [1.0])
        slow.do("issue", [1.0])
        assert fast.do("wait") == [2.0]
        configure(group, 2, store)
        assert slow.do("wait") == [2.0]
        for member in group:
            member.do("release_previous")
        assert not any(o.error for o in outcomes(group, "allreduce", [1.0]))


def test_fifty_reconfigurations_leave_no_descriptor_and_no_thread(store: str) -> None:
    with members(2) as group:
        configure(group, 1, store)
        configure(group, 2, store)
        for member in group:
            member.do("release_previous")
        before = [m.do("census") for m in group]
        for seq in range(3, 53):
            outcomes(group, "issue", [1.0])
            if seq % 3 == 0:
                abort(group, seq - 1)  # the operations under way are given up, never waited for
                for member in group:
                    member.do("forget")
            else:
                assert not any(o.error for o in outcomes(group, "wait"))
            configure(group, seq, store)
            for member in group:
                member.do("release_previous")
        wait_until(lambda: is_within(before, [m.do("census") for m in group]), what="descriptors and threads as before")
        for member in group:
            member.do("close")


def is_within(before: list[tuple[int, int]], now: list[tuple[int, int]]) -> bool:
    """No member has more than before; then, a thread that had just ended may have been counted still."""
    return all(
        have <= had
        for then, have_now in zip(before, now, strict=True)
        for had, have in zip(then, have_now, strict=True)
    )


def test_an_aborted_operation_never_writes_to_its_tensor_again(store: str) -> None:
    with members(3) as group:
        configure(group, 1, store)
        group[2].signal(signal.SIGSTOP)
        for member in group[:2]:
            member.do("issue", [1.0] * 300_000)
        abort(group[:2], 1)
        configure(group[:2], 2, store)
        for member in group[:2]:
            member.do("overwrite", 5.0)
        group[2].signal(signal.SIGCONT)
        group[2].do("abort", 1)
        assert not any(o.error for o in outcomes(group[:2], "allreduce", [1.0] * 300_000))
        for member in group[:2]:
            assert member.do("unchanged", 5.0)


def test_other_sockets_of_the_process_survive_an_abort(store: str) -> None:
    stop = threading.Event()
    kept: list[tuple[socket.socket, socket.socket]] = []
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:

        def connect_all_the_time() -> None:
            while not stop.is_set():
                near = socket.create_connection(server.getsockname())
                far, _ = server.accept()
                kept.append((near, far))
                if len(kept) > 400:
                    for old in kept.pop(0):
                        old.close()

        other = threading.Thread(target=connect_all_the_time)
        with members(1) as peers, GlooProcessGroup() as group:
            other.start()
            try:
                for seq in range(1, 6):
                    number = peers[0].begin("configure", seq, 1, 2, store)
                    group.configure(Membership(quorum_id=QuorumId(1, seq), rank=0, size=2, store=store))
                    assert not peers[0].outcome(number).error
                    group.abort(QuorumId(1, seq))
                    peers[0].do("abort", seq)
            finally:
                stop.set()
                other.join(DEADLINE_S)
        assert len(kept) > 10
        for near, far in kept:
            near.settimeout(5.0)
            far.sendall(b"x")
            assert near.recv(1) == b"x"
            near.close()
            far.close()
        with socket.create_connection(server.getsockname()):  # the listener, too
            server.accept()[0].close()


def test_a_default_socket_timeout_of_the_users_changes_nothing(store: str) -> None:
    socket.setdefaulttimeout(0.05)
    try:
        with members(1) as peers, GlooProcessGroup() as group:
            number = peers[0].begin("configure", 1, 1, 2, store)
            group.configure(Membership(quorum_id=QuorumId(1, 1), rank=0, size=2, store=store))
            assert not peers[0].outcome(number).error
    finally:
        socket.setdefaulttimeout(None)


def test_a_signal_handler_runs_while_an_allreduce_waits(store: str) -> None:
    class Interrupt(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        with members(1) as peers, GlooProcessGroup() as group:
            number = peers[0].begin("configure", 1, 1, 2, store)
            group.configure(Membership(quorum_id=QuorumId(1, 1), rank=0, size=2, store=store))
            peers[0].outcome(number)
            tensor = torch.ones(1, dtype=torch.float64)
            work = group.allreduce(tensor)
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(Interrupt):
                work.wait()
            peers[0].do("allreduce", [1.0])
            work.wait()
            assert tensor.tolist() == [2.0]
    finally:
        signal.signal(signal.SIGALRM, previous)


def test_a_child_that_outlives_its_killed_parent_does_not_delay_the_peers(store: str) -> None:
    with members(2) as group:
        configure(group, 1, store)
        child = group[0].do("fork")
        try:
            number = group[1].begin("allreduce", [1.0])
            group[1].do("ping")
            killed_at = time.monotonic()
            group[0].kill()
            result = group[1].outcome(number)
            assert (result.error, result.peer) == ("PeerLost", 0), result
            assert result.ended_at - killed_at < 1.0
            assert is_alive(child)
        finally:
            member_children_end(child)


def test_a_child_that_outlives_the_stores_host_does_not_keep_the_store_open() -> None:
    with members(2) as group:
        host, other = group
        address = host.do("host")
        number = other.begin("configure", 1, 1, 3, address)  # waits for members that never come
        other.do("ping")
        child = host.do("fork")
        try:
            killed_at = time.monotonic()
            host.kill()
            result = other.outcome(number)
            assert result.error == "PeerLost"
            assert result.ended_at - killed_at < 1.0
        finally:
            member_children_end(child)


def member_children_end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(pid), what=f"child {pid} ends")


def test_a_data_loader_with_workers_is_at_ease_beside_a_live_group(store: str) -> None:
    with members(2) as group:
        configure(group, 1, store)
        for result in outcomes(group, "load_data"):
            assert result.value == [1.0, 5.0, 9.0, 13.0]
        assert [o.value for o in outcomes(group, "allreduce", [1.0])] == [[2.0]] * 2


def test_a_forked_child_may_drop_the_group_it_inherited(store: str) -> None:
    with members(2) as group:
        configure(group, 1, store)
        assert group[0].do("fork_and_finalize") == 7
        assert [o.value for o in outcomes(group, "allreduce", [1.0])] == [[2.0]] * 2
