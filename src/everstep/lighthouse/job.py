"""One job of a lighthouse: its machine, its clock, its journal, and the order of its effects.

What the machine returned after a Persist waits until that record is on disk. Writes run in an executor, one at a time;
records that pile up meanwhile share the next one, since each replaces those before it. Other jobs do not wait.
"""

import asyncio
import collections
import concurrent.futures
import errno
import logging
import secrets
import time
from collections.abc import Callable, Iterable
from typing import Protocol

from everstep.config import LighthouseSettings
from everstep.core.events import JobEvent
from everstep.core.lighthouse import Event, JobConfig, LighthouseMachine
from everstep.core.messages import (
    Close,
    Effect,
    JournalRecord,
    Log,
    Persist,
    Publish,
    Send,
    SendToNodes,
    ToMember,
    Waiting,
)
from everstep.core.node_messages import ToNode
from everstep.lighthouse.journal import Journal
from everstep.link.driver import Driver

WRITE_RETRY_S = 0.5
_REMEDIES = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free the disk")
LOG_REPEAT_S = 60.0  # an unchanged line of the same event is said again after this time

log = logging.getLogger("everstep.lighthouse")


class JobMachine(Protocol):
    """What a job needs of LighthouseMachine."""

    def start(self, now: float, /) -> list[Effect]: ...
    def receive(self, event: Event, now: float, /) -> list[Effect]: ...
    def tick(self, now: float, /) -> list[Effect]: ...
    def next_deadline(self) -> float | None: ...
    def status(self, now: float, /) -> dict[str, object]: ...
    def members(self) -> list[str]: ...
    def held(self, now: float, /) -> dict[str, dict[str, object]]: ...


class JobLinks(Protocol):
    """What a job needs of LinkServer."""

    def send(self, message: ToMember | ToNode, links: Iterable[int], /) -> None: ...
    def close_link(self, number: int, reason: str, /) -> None: ...


def make_machine(job_id: str, settings: LighthouseSettings, record: JournalRecord | None) -> LighthouseMachine:
    config = JobConfig(
        job_id=job_id,
        lighthouse=secrets.token_hex(8),
        history=secrets.token_hex(8),
        min_replicas=settings.min_replicas,
        join_timeout_s=settings.join_timeout_s,
        heartbeat_interval_s=settings.heartbeat_interval_s,
        heartbeat_timeout_s=settings.heartbeat_timeout_s,
        link_grace_s=settings.link_grace_s,
        crash_loop_limit=settings.crash_loop_limit,
        stuck_timeout_s=settings.stuck_timeout_s,
        stuck_floor_s=settings.stuck_floor_s,
        stuck_initial_s=settings.stuck_initial_s,
    )
    return LighthouseMachine(config, record)


class Job:
    """All of it runs on the server's loop, but for the journal's writes. `journal` None: memory only.

    `on_crash` hears of a bug in the machine, at most once; the job does nothing more then but to be closed. `on_event`
    gets what belongs into the job's event log.
    """

    def __init__(
        self,
        job_id: str,
        machine: JobMachine,
        links: JobLinks,
        journal: Journal | None,
        executor: concurrent.futures.Executor,
        on_crash: Callable[["Job", Exception], None],
        on_event: Callable[[JobEvent], None],
    ) -> None:
        self.job_id = job_id
        self.open_links: dict[int, None] = {}
        self.record: JournalRecord | None = None  # the last one that is durable, or would be on a disk
        self._machine = machine
        self._links = links
        self._journal = journal
        self._executor = executor
        self._on_crash = on_crash
        self._on_event = on_event
        self._driver: Driver[Event] = Driver(machine, self._perform, on_crash=self._crashed)
        # A number: wait for that Persist. A future: somebody waits until all before it is done.
        self._queue: collections.deque[Effect | int | asyncio.Future[None]] = collections.deque()
        self._persists = 0
        self._durable = 0
        self._newest: JournalRecord | None = None
        self._writing: asyncio.Task[None] | None = None
        self._is_closed = False
        self._said: dict[str, tuple[dict[str, object], float]] = {}

    def start(self) -> None:
        if self._journal is not None and self._journal.torn_bytes:
            log.warning("journal tail ignored job=%s bytes=%d", self.job_id, self._journal.torn_bytes)
        self._driver.run(self._machine.start)
        self._driver.attach(asyncio.get_running_loop())

    def receive(self, event: Event) -> None:
        try:
            self._driver.receive(event)
        except Exception as error:
            # Boundary between jobs: a bug that one of them met must not end the others.
            self._crashed(error)

    async def wait_durable(self, timeout_s: float) -> bool:
        """Whether all that the machine has said so far is on disk, and sent, within the time."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append(done)
        self._advance()
        await asyncio.wait({done}, timeout=timeout_s)
        return done.done() and not done.cancelled()

    def status(self) -> dict[str, object]:
        return self._machine.status(time.monotonic())

    def members(self) -> list[str]:
        """Names of the groups in the quorum."""
        return self._machine.members()

    def held(self) -> list[str]:
        """Names of the groups that are held or left out for dying again and again."""
        return list(self._machine.held(time.monotonic()))

    @property
    def is_over(self) -> bool:
        """Nobody is connected, and its memory holds nothing that a member could ask for."""
        return not self.open_links and (self.record is None or self.record.ended or self.record.current is None)

    @property
    def is_forgettable(self) -> bool:
        """It may be dropped: whoever connects next finds it in the journal as it is."""
        return self.is_over or (self._journal is not None and not self.open_links and not self._queue)

    async def close(self) -> None:
        """Nothing more is said or written; a write under way is waited for."""
        self._is_closed = True
        self._driver.close()
        for waiting in self._queue:
            if isinstance(waiting, asyncio.Future):
                waiting.cancel()
        self._queue.clear()
        if self._writing is not None:
            await asyncio.wait({self._writing})
        if self._journal is not None:
            self._journal.close()

    # ---- effects, in order

    def _perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Persist):
                self._persists += 1
                self._newest = effect.record
                self._queue.append(self._persists)
            else:
                self._queue.append(effect)
        self._advance()

    def _advance(self) -> None:
        while self._queue and not self._is_closed:
            head = self._queue[0]
            if isinstance(head, int) and head > self._durable:
                self._begin_write()
                if head > self._durable:
                    return
            self._queue.popleft()
            if isinstance(head, asyncio.Future):
                head.set_result(None)
            elif not isinstance(head, int):
                self._do(head)

    def _do(self, effect: Effect) -> None:
        match effect:
            case Send(message, links):
                self._links.send(message, links)  # type: ignore[arg-type]
            case SendToNodes(to_agents, links):
                self._links.send(to_agents, links)
            case Close(link, reason):
                self._links.close_link(link, reason)
            case Publish(published):
                self._on_event(published)
            case Log(event, fields):
                self._say(event, fields)
            case _:
                raise AssertionError(f"a lighthouse's machine returned {effect}")

    def _begin_write(self) -> None:
        if self._journal is None:
            self.record, self._durable = self._newest, self._persists
        elif self._writing is None:
            self._writing = asyncio.get_running_loop().create_task(self._write(self._journal))

    async def _write(self, journal: Journal) -> None:
        """Until what was newest at the start of the write is durable."""
        loop = asyncio.get_running_loop()
        while not self._is_closed:
            number, record = self._persists, self._newest
            assert record is not None
            try:
                await loop.run_in_executor(self._executor, journal.append, record)
            except OSError as error:
                self._say_not_written(journal, error)
                await asyncio.sleep(WRITE_RETRY_S)
                continue
            self.record, self._durable = record, number
            break
        self._writing = None
        try:
            self._advance()
        except Exception as error:
            # The same boundary: a task's error has no caller.
            self._crashed(error)

    def _say_not_written(self, journal: Journal, error: OSError) -> None:
        """Without memory it must not decide anything: say so, also to who waits, and try until it can be written."""
        remedy = _REMEDIES.get(error.errno or 0, "make it writable")
        fields: dict[str, object] = {"journal": str(journal.path), "error": str(error)}
        if self._say("journal not written", fields | {"remedy": f"{remedy}; the job waits meanwhile"}, logging.ERROR):
            why = error.strerror or str(error)
            self._links.send(Waiting(f"the lighthouse cannot write its journal ({why}): {remedy}"), self.open_links)

    def _crashed(self, error: Exception) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._driver.close()
            self._on_crash(self, error)

    # ---- for people

    def _say(self, event: str, fields: dict[str, object], level: int = logging.INFO) -> bool:
        """One line a change: what was said of the same event just before is not said again (False)."""
        now = time.monotonic()
        fields_before, said_at = self._said.get(event, (None, 0.0))
        if fields == fields_before and now < said_at + LOG_REPEAT_S:
            return False
        self._said[event] = (fields, now)
        words = "".join(f" {key}={plain(value)}" for key, value in fields.items())
        extra = {"everstep": {"event": event, "job_id": self.job_id, **fields}}
        log.log(level, "%s job=%s%s", event, plain(self.job_id), words, extra=extra)
        return True


def plain(value: object) -> str:
    """One word, or quoted: what a client sent must not look like another line."""
    text = str(value)
    return text if text.isprintable() and text and not set(text) & set(' "=') else repr(text)
