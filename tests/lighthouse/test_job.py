"""A job performs its machine's effects in order: nothing that rests on a record is sent before it is on disk."""

import asyncio
import concurrent.futures
import logging
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from everstep.core.lighthouse import Event, LinkMessage
from everstep.core.messages import Close, Drain, Effect, Goodbye, JournalRecord, Log, Persist, Send, ToMember, Waiting
from everstep.core.node_messages import ToNode
from everstep.lighthouse.job import Job
from everstep.lighthouse.journal import Journal
from tests.support.waiting import wait_until_async


class Script:
    """A machine that answers its n-th event with the n-th list of effects."""

    def __init__(self, *answers: list[Effect]) -> None:
        self._answers = list(answers)

    def start(self, now: float) -> list[Effect]:
        return []

    def receive(self, event: Event, now: float) -> list[Effect]:
        if not self._answers:
            raise AssertionError("a bug")
        return self._answers.pop(0)

    def tick(self, now: float) -> list[Effect]:
        return []

    def next_deadline(self) -> float | None:
        return None

    def status(self, now: float) -> dict[str, object]:
        return {}

    def members(self) -> list[str]:
        return []

    def held(self, now: float) -> dict[str, dict[str, object]]:
        return {}


class Outbox:
    """Stands where the job has its links."""

    def __init__(self, journal: "SlowJournal | None" = None) -> None:
        self.sent: list[str] = []
        self.sent_over: list[int] = []  # the newest durable epoch when it was sent
        self._journal = journal

    def send(self, message: ToMember | ToNode, links: object) -> None:
        assert isinstance(message, Waiting)
        self.sent.append(message.reason)
        self.sent_over.append(self._journal.durable if self._journal else 0)

    def close_link(self, number: int, reason: str) -> None:
        self.sent.append(f"close {number}")


class SlowJournal(Journal):
    """Each write waits to be let through; `failures` of them fail first."""

    def __init__(self, path: Path, failures: int = 0) -> None:
        super().__init__(path, "job")
        self.gate = threading.Semaphore(0)
        self.writes: list[int] = []
        self.durable = 0
        self._failures = failures

    def append(self, record: JournalRecord) -> None:
        self.writes.append(record.epoch)
        assert self.gate.acquire(timeout=10.0)
        if self._failures:
            self._failures -= 1
            raise OSError(28, "No space left on device")
        super().append(record)
        self.durable = record.epoch


def persist(epoch: int) -> Persist:
    return Persist(JournalRecord(job_id="job", lighthouse="lh", epoch=epoch, incarnation_limit=0))


def say(text: str) -> Send:
    return Send(Waiting(text), (1,))


EVENT = LinkMessage(1, Drain())


def with_job(
    machine: Script, outbox: Outbox, journal: Journal | None, test: Callable[[Job, list[Exception]], Awaitable[None]]
) -> None:
    crashes: list[Exception] = []

    async def main() -> None:
        with concurrent.futures.ThreadPoolExecutor(1) as executor:
            job = Job("job", machine, outbox, journal, executor, lambda _, e: crashes.append(e), print)
            job.start()
            try:
                await test(job, crashes)
            finally:
                if isinstance(journal, SlowJournal):
                    journal.gate.release(100)
                await job.close()

    asyncio.run(main())


def test_what_stands_after_a_persist_waits_for_the_disk_and_what_stands_before_does_not(tmp_path: Path) -> None:
    journal = SlowJournal(tmp_path / "j")
    outbox = Outbox(journal)

    async def test(job: Job, _: list[Exception]) -> None:
        job.receive(EVENT)
        job.receive(EVENT)
        assert outbox.sent == ["before"]
        journal.gate.release()
        await wait_until_async(lambda: len(outbox.sent) == 3)
        assert outbox.sent == ["before", "after", "later batch"]
        assert outbox.sent_over == [0, 1, 1]

    with_job(Script([say("before"), persist(1), say("after")], [say("later batch")]), outbox, journal, test)


def test_records_that_pile_up_share_one_write_and_no_send_overtakes_its_record(tmp_path: Path) -> None:
    journal = SlowJournal(tmp_path / "j")
    outbox = Outbox(journal)
    batches: list[list[Effect]] = [[persist(n), say(str(n))] for n in range(1, 6)]

    async def test(job: Job, _: list[Exception]) -> None:
        job.receive(EVENT)
        await wait_until_async(lambda: journal.writes == [1])
        for _batch in batches[1:]:
            job.receive(EVENT)
        journal.gate.release()
        await wait_until_async(lambda: outbox.sent == ["1"])
        journal.gate.release()
        await wait_until_async(lambda: len(outbox.sent) == 5)
        assert journal.writes == [1, 5]
        assert outbox.sent == ["1", "2", "3", "4", "5"]
        assert outbox.sent_over == [1, 5, 5, 5, 5]

    with_job(Script(*batches), outbox, journal, test)


def test_a_full_disk_holds_the_job_back_until_there_is_room_and_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = SlowJournal(tmp_path / "j", failures=1)
    outbox = Outbox(journal)

    async def test(job: Job, _: list[Exception]) -> None:
        job.receive(EVENT)
        journal.gate.release()
        await wait_until_async(lambda: "No space left" in caplog.text)
        (told,) = outbox.sent
        assert told == "the lighthouse cannot write its journal (No space left on device): free the disk"
        journal.gate.release()
        await wait_until_async(lambda: outbox.sent == [told, "after"])
        assert await job.wait_durable(10.0)

    with_job(Script([persist(1), say("after")]), outbox, journal, test)


def test_an_operators_request_is_not_confirmed_before_it_is_on_disk(tmp_path: Path) -> None:
    journal = SlowJournal(tmp_path / "j")
    outbox = Outbox(journal)

    async def test(job: Job, _: list[Exception]) -> None:
        job.receive(EVENT)
        assert not await job.wait_durable(0.05)
        journal.gate.release()
        assert await job.wait_durable(10.0)
        assert outbox.sent == ["after"]

    with_job(Script([persist(1), say("after")]), outbox, journal, test)


def test_without_a_journal_nothing_waits() -> None:
    outbox = Outbox()

    async def test(job: Job, _: list[Exception]) -> None:
        job.receive(EVENT)
        assert outbox.sent == ["1", "2", "close 7"]
        assert job.record == persist(2).record

    with_job(Script([persist(1), say("1"), persist(2), say("2"), Close(7, "bye")]), outbox, None, test)


def test_a_bug_is_told_once_and_ends_the_job_only() -> None:
    async def test(job: Job, crashes: list[Exception]) -> None:
        job.receive(EVENT)
        job.receive(LinkMessage(1, Goodbye("x")))
        assert [str(error) for error in crashes] == ["a bug"]

    with_job(Script(), Outbox(), None, test)


def test_a_log_effect_is_one_line_and_a_repeated_one_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    waiting = Log("waiting", {"why": "1 of 2 groups\njoined"})
    other = Log("waiting", {"why": "nobody"})

    async def test(job: Job, _: list[Exception]) -> None:
        job.receive(EVENT)

    with_job(Script([waiting, waiting, other, other, waiting]), Outbox(), None, test)
    assert [r.getMessage() for r in caplog.records if r.name == "everstep.lighthouse"] == [
        r"waiting job=job why='1 of 2 groups\njoined'",
        "waiting job=job why=nobody",
        r"waiting job=job why='1 of 2 groups\njoined'",
    ]
