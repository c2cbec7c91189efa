"""Peers' hosts are called at while a collective takes long: an answer is an answer, and silence is told."""

import asyncio
import contextlib
import socket
import time
from collections.abc import Iterator, Mapping

from everstep.core.types import QuorumId
from everstep.link.path_watch import LongWait, PathWatch

QUORUM = QuorumId(1, 1)
DEADLINE_S = 15.0


@contextlib.contextmanager
def listening(backlog: int = 16) -> Iterator[tuple[str, int]]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(backlog)
        yield listener.getsockname()


@contextlib.contextmanager
def silent() -> Iterator[tuple[str, int]]:
    """With its queue full, Linux drops whatever else calls, as a path that loses packets does."""
    with listening(0) as address, contextlib.ExitStack() as stack:
        for _ in range(4):
            caller = stack.enter_context(socket.socket())
            caller.setblocking(False)
            caller.connect_ex(address)
        yield address


@contextlib.contextmanager
def closed() -> Iterator[tuple[str, int]]:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        yield unused.getsockname()


def watched(addresses: list[tuple[str, int]], waited_s: float, until_s: float) -> list[Mapping[int, str]]:
    """What is reported of these within `until_s`, by rank 0, whose own address is the first."""
    began_at = time.monotonic()
    reports: list[Mapping[int, str]] = []

    async def run() -> None:
        told = asyncio.Event()

        def wait() -> LongWait | None:
            return LongWait(
                quorum_id=QUORUM,
                since=0.0,
                waited_s=waited_s + time.monotonic() - began_at,
                patience_s=0.5,
                rank=0,
                addresses=tuple(addresses),
            )

        def report(quorum_id: QuorumId, details: Mapping[int, str]) -> None:
            assert quorum_id == QUORUM
            reports.append(details)
            told.set()

        watch = PathWatch(wait, report)
        watch.attach(asyncio.get_running_loop())
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(told.wait(), until_s)
        watch.close()

    asyncio.run(run())
    return reports


def test_only_a_host_that_does_not_answer_is_reported() -> None:
    with listening() as answering, closed() as refusing, silent() as lost:
        (details,) = watched([answering, answering, refusing, lost, ("a-name", 1)], 1.0, DEADLINE_S)
    assert list(details) == [3]
    assert "no answer from 127.0.0.1" in details[3]


def test_peers_that_answer_are_called_again_only_after_twice_the_time() -> None:
    with listening() as own, socket.socket() as peer:
        peer.bind(("127.0.0.1", 0))
        peer.listen(16)
        peer.setblocking(False)
        assert watched([own, peer.getsockname()], 1.0, 1.6) == []
        calls = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                peer.accept()[0].close()
                calls += 1
    assert calls == 1
