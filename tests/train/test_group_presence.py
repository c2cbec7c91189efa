"""Presences of one replica group: a wish to leave is kept from the start on, and a script that goes on is ended."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess

import pytest

import everstep as es
from everstep.config import GroupSettings, ManagerSettings
from everstep.core.moves import ReplicaConfig
from everstep.train.group_presence import EXIT_GRACE_S, FollowerPresence, make_presence
from everstep.train.presence import Presence
from tests.support.waiting import wait_until
from tests.train import job
from tests.train.ranks import reserved_port

DEADLINE_S = 20.0
LATE_S = 3.0  # of a process on a busy machine
RANKS = 3

_context = multiprocessing.get_context("forkserver")
assert job._context is not None, "it has told the forkserver what to import"


@contextlib.contextmanager
def presences() -> Iterator[list[Presence]]:
    """Of the ranks of one group without a lighthouse, none of them started."""
    with reserved_port() as port:
        places = [GroupSettings(rank=rank, size=RANKS, leader=("127.0.0.1", port)) for rank in range(RANKS)]
        config = ReplicaConfig(replica_id="0", nonce="n")
        yield [make_presence(ManagerSettings(group=place), config, "127.0.0.1") for place in places]


@pytest.mark.parametrize("rank", range(RANKS))
def test_a_rank_that_is_to_leave_before_its_leader_has_begun_takes_its_group_along(rank: int) -> None:
    with presences() as team, ThreadPoolExecutor(RANKS) as threads:
        asked = team[rank]
        asked.ask_to_leave(20.0)
        first = [p for p in team if p is team[0] or p is asked]
        starts = [threads.submit(p.__enter__) for p in first]
        if isinstance(asked, FollowerPresence):  # one rank is still missing: the leader's machine is not made
            wait_until(lambda: asked._asked_grace_s is None, DEADLINE_S)
        starts += [threads.submit(p.__enter__) for p in team if p not in first]
        for start in starts:
            start.result(DEADLINE_S)
        for presence in team:
            with presence.changed:
                assert presence.changed.wait_for(lambda p=presence: p.replica.has_left, DEADLINE_S)  # type: ignore[misc]
        for end in [threads.submit(p.__exit__, None, None, None) for p in team]:
            end.result(DEADLINE_S)


def obstinate(rank: int, port: int, pipe: Connection) -> None:
    """A script that takes no notice: rank 1 never comes back to Everstep, the others go on whatever is raised."""
    os.environ["EVERSTEP_GROUP_LEADER"] = f"127.0.0.1:{port}"
    with es.Manager(lighthouse=None, group_rank=rank, group_size=RANKS) as manager:
        manager.start_step()
        pipe.send("in")
        if rank == 1:
            pipe.recv()  # a C call, and nobody ever sends
        while True:
            with contextlib.suppress(BaseException):
                manager.start_step()
                threading.Event().wait(0.01)


@pytest.mark.parametrize("victim", [2, pytest.param(0, marks=pytest.mark.soak)])
def test_a_script_that_does_not_react_to_the_failure_of_its_group_is_ended(victim: int) -> None:
    started: list[tuple[ForkServerProcess, Connection]] = []
    try:
        with reserved_port() as port:
            for rank in range(RANKS):
                ours, theirs = _context.Pipe()
                process = _context.Process(target=obstinate, args=(rank, port, theirs))
                process.start()
                theirs.close()
                started.append((process, ours))
            for _, pipe in started:
                assert pipe.poll(DEADLINE_S)
                assert pipe.recv() == "in"
        pid = started[victim][0].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        killed_at = time.monotonic()
        for rank, (process, _) in enumerate(started):
            process.join(killed_at + EXIT_GRACE_S + LATE_S - time.monotonic())
            assert process.exitcode == (-signal.SIGKILL if rank == victim else 1), f"rank {rank}: {process.exitcode}"
        assert time.monotonic() - killed_at > EXIT_GRACE_S / 2, "the scripts had time to end by themselves"
    finally:
        for process, pipe in started:
            if process.is_alive():
                process.kill()
            process.join(10)
            pipe.close()
