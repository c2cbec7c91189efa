"""The jobs of a lighthouse: one that meets a bug starts anew by itself, and one that is over makes room."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from everstep.config import LighthouseSettings
from everstep.core.lighthouse import Event, LighthouseMachine
from everstep.core.messages import Effect, Goodbye, JournalRecord, Refused
from everstep.core.types import RefusalCode
from everstep.lighthouse.job import make_machine
from everstep.lighthouse.jobs import Jobs
from everstep.lighthouse.journal import StateDir
from everstep.link.server import LinkServer
from tests.link.parties import beat, hello
from tests.support.waiting import wait_until_async


class Fragile:
    """The real machine, but for a bug: a Goodbye breaks it."""

    def __init__(self, inner: LighthouseMachine) -> None:
        self._inner = inner
        self.start = inner.start
        self.tick = inner.tick
        self.next_deadline = inner.next_deadline
        self.status = inner.status
        self.members = inner.members
        self.held = inner.held

    def receive(self, event: Event, now: float) -> list[Effect]:
        if isinstance(getattr(event, "message", None), Goodbye):
            raise AssertionError("a bug")
        return self._inner.receive(event, now)


def fragile(job_id: str, settings: LighthouseSettings, record: JournalRecord | None) -> Fragile:
    return Fragile(make_machine(job_id, settings, record))


@contextlib.asynccontextmanager
async def running(settings: LighthouseSettings, path: Path | None = None) -> AsyncIterator[Jobs]:
    state_dir = StateDir(path) if path is not None else None
    if state_dir is not None:
        state_dir.open()
    jobs = Jobs(settings, state_dir, fragile)
    server = LinkServer(jobs, None)
    jobs.attach(server)
    try:
        yield jobs
    finally:
        await jobs.close()
        server.close()
        if state_dir is not None:
            state_dir.close()


def epoch_of(jobs: Jobs, job_id: str) -> object:
    return jobs.status()[job_id]["epoch"]


def test_a_job_that_meets_a_bug_starts_anew_from_its_last_record_and_the_others_go_on(tmp_path: Path) -> None:
    async def test(path: Path | None) -> None:
        async with running(LighthouseSettings(), path) as jobs:
            for link, job_id in enumerate(["broken", "sound"], 1):
                assert jobs.admit(job_id) is None
                jobs.opened(link, job_id)
                jobs.message(link, hello("a"))
            await wait_until_async(lambda: jobs.status()["broken"]["members"])
            if path is not None:  # until then nothing rests on the record, and the epoch may be taken again
                await wait_until_async((path / "job-broken.journal").exists)
            jobs.message(1, Goodbye("x"))
            assert list(jobs.status()) == ["sound"]
            busy = jobs.admit("broken")
            assert busy is not None
            assert busy.code is RefusalCode.BUSY
            await wait_until_async(lambda: jobs.admit("broken") is None)
            jobs.message(1, beat(1))  # a straggler on a link of the broken one
            assert epoch_of(jobs, "broken") == 2
            assert epoch_of(jobs, "sound") == 1

    asyncio.run(test(None))
    asyncio.run(test(tmp_path))


def test_a_job_that_is_over_makes_room_for_a_new_one_and_a_connected_one_does_not(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(LighthouseSettings(jobs_max=2)) as jobs:
            for link, job_id in enumerate(["stays", "goes"], 1):
                assert jobs.admit(job_id) is None
                jobs.opened(link, job_id)
            assert isinstance(jobs.admit("new"), Refused)
            jobs.closed(2, "gone")
            assert jobs.admit("new") is None
            assert list(jobs.status()) == ["stays", "new"]

    asyncio.run(test())
