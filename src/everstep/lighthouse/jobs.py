"""The jobs of a lighthouse: each is started by its first link, and starts anew when it meets a bug."""

import asyncio
import concurrent.futures
import logging
from collections.abc import Callable

from everstep.config import LighthouseSettings
from everstep.core.events import JobEvent
from everstep.core.lighthouse import (
    AdmitGroup,
    AgentLinkClosed,
    AgentMessage,
    DrainGroup,
    LinkClosed,
    LinkMessage,
    LinkOpened,
    StartNewHistory,
)
from everstep.core.messages import JournalRecord, Refused, ToLighthouse
from everstep.core.types import RefusalCode
from everstep.errors import ConfigError
from everstep.lighthouse.event_stream import EventStreams
from everstep.lighthouse.job import Job, JobMachine, make_machine
from everstep.lighthouse.journal import StateDir
from everstep.lighthouse.rendezvous import RendezvousDesk
from everstep.link.server import LinkServer

DURABLE_S = 5.0  # that an operator's request waits for the disk
WRITERS = 4  # journals that are written at the same time

NewMachine = Callable[[str, LighthouseSettings, JournalRecord | None], JobMachine]

log = logging.getLogger("everstep.lighthouse")


class NotDurable(Exception):
    """The job knows of the request; its journal does not yet."""


class Jobs:
    """Hands the links' events to their jobs (it is the server's LinkListener). `state_dir` None: memory only."""

    def __init__(
        self, settings: LighthouseSettings, state_dir: StateDir | None, new_machine: NewMachine = make_machine
    ) -> None:
        self._settings = settings
        self._new_machine = new_machine
        self._state_dir = state_dir
        self._server: LinkServer | None = None
        self._jobs: dict[str, Job] = {}
        self._job_of: dict[int, Job] = {}
        self._memory: dict[str, JournalRecord] = {}  # without a state directory: the last records of crashed jobs
        self._publish: dict[str, Callable[[JobEvent], None]] = {}
        self._returned: set[str] = set()  # jobs that were served before this lighthouse, or before they crashed
        self.rendezvous = RendezvousDesk(settings, self)
        self._burials: dict[str, asyncio.Task[None]] = {}
        self.streams = EventStreams(self._status_of, settings.events_kept_max)
        self._executor = concurrent.futures.ThreadPoolExecutor(WRITERS, "everstep-journal")

    def attach(self, server: LinkServer) -> None:
        self._server = server
        self.rendezvous.attach(server)

    async def close(self) -> None:
        """No machine hears or says anything any more."""
        self.streams.close()
        self.rendezvous.close()
        jobs = list(self._jobs.values())
        self._jobs.clear()
        self._job_of.clear()
        for job in jobs:
            await job.close()
        if self._burials:
            await asyncio.wait(self._burials.values())
        self._executor.shutdown()

    def status(self) -> dict[str, dict[str, object]]:
        return {
            job_id: {
                **job.status(),
                "links": len(job.open_links),
                "rendezvous": self.rendezvous.status(job_id),
                "excluded_nodes": self.rendezvous.excluded(job_id),
            }
            for job_id, job in self._jobs.items()
        }

    def _status_of(self, job_id: str) -> dict[str, object] | None:
        job = self._jobs.get(job_id)
        return job.status() if job is not None else None

    def is_return(self, job_id: str) -> bool:
        """Whether the job was known before its machine was started: its nodes may be about to come back."""
        return job_id in self._returned

    def publish(self, job_id: str, event: JobEvent) -> None:
        """Append to the job's event log."""
        publish = self._publish.get(job_id)
        if publish is not None:
            publish(event)

    async def drain(self, job_id: str, replica_id: str) -> None:
        """Let this group leave its job at a step boundary. Raises LookupError, or NotDurable: asked all the same."""
        job = self._job(job_id)
        members = job.members()
        if replica_id not in members:
            raise LookupError(
                f"no group {replica_id!r} in the quorum of job {job_id!r}; its groups: {', '.join(members) or 'none'}"
            )
        job.receive(DrainGroup(replica_id))
        await _must_be_durable(job)

    async def start_new_history(self, job_id: str) -> None:
        """Give up the state that the members of the job hold. Raises as `drain` does."""
        job = self._job(job_id)
        job.receive(StartNewHistory())
        await _must_be_durable(job)

    def _job(self, job_id: str) -> Job:
        job = self._jobs.get(job_id)
        if job is None:
            raise LookupError(f"no job {job_id!r} here; jobs: {', '.join(self._jobs) or 'none'}")
        return job

    async def pardon(self, job_id: str, replica_id: str) -> None:
        """Let in a group that is held or left out for dying again and again. Raises LookupError."""
        job = self._job(job_id)
        held = job.held()
        if replica_id not in held:
            raise LookupError(
                f"group {replica_id!r} of job {job_id!r} is not held; held are: {', '.join(held) or 'none'}"
            )
        job.receive(AdmitGroup(replica_id))

    # ---- links

    def admit(self, job_id: str) -> Refused | None:
        if self._settings.jobs and job_id not in self._settings.jobs:
            served = ", ".join(self._settings.jobs)
            detail = f"job {job_id!r} is not served here, only {served}: check EVERSTEP_JOB_ID"
            return Refused(RefusalCode.WRONG_JOB, detail)
        if job_id in self._jobs:
            return None
        if job_id in self._burials:
            return Refused(RefusalCode.BUSY, f"job {job_id!r} is just starting anew; try again")
        if len(self._jobs) >= self._settings.jobs_max and not self._make_room():
            detail = f"the lighthouse serves {len(self._jobs)} jobs, its limit; start another one for job {job_id!r}"
            return Refused(RefusalCode.BUSY, detail)
        try:
            self._start(job_id)
        except ConfigError as error:
            log.error("job not started job=%r reason=%s", job_id, error)
            return Refused(RefusalCode.BAD_CONFIG, str(error))
        return None

    def opened(self, link: int, job_id: str) -> None:
        job = self._jobs.get(job_id)
        if job is None:
            assert self._server is not None
            self._server.close_link(link, "the job starts anew")
            return
        self._job_of[link] = job
        job.open_links[link] = None
        job.receive(LinkOpened(link))

    def message(self, link: int, message: ToLighthouse) -> None:
        job = self._job_of.get(link)
        if job is not None:
            job.receive(LinkMessage(link, message))

    def closed(self, link: int, detail: str) -> None:
        job = self._job_of.pop(link, None)
        if job is not None:
            job.open_links.pop(link, None)
            job.receive(LinkClosed(link, detail))

    def agent(self, job_id: str, event: AgentMessage | AgentLinkClosed) -> None:
        """What a node's agent says of its workers."""
        job = self._jobs.get(job_id)
        if job is not None:
            job.receive(event)

    # ---- a job's life

    def _start(self, job_id: str) -> None:
        assert self._server is not None
        journal = self._state_dir.journal(job_id) if self._state_dir is not None else None
        record = journal.load() if journal is not None else self._memory.get(job_id)
        machine = self._new_machine(job_id, self._settings, record)
        publish = self._publish[job_id] = self.streams.begin(job_id)
        if record is not None:
            self._returned.add(job_id)
        job = Job(job_id, machine, self._server, journal, self._executor, self._crashed, publish)
        self._jobs[job_id] = job
        job.start()
        for message in self.rendezvous.running(job_id):  # agents that were here before this machine
            job.receive(message)

    def _make_room(self) -> bool:
        """Drop a job that nobody is connected to; one that is over rather than one that may come back."""
        idle = [j for j in self._jobs.values() if j.is_forgettable and not self.rendezvous.has_nodes(j.job_id)]
        if not idle:
            return False
        job = next((job for job in idle if job.is_over), idle[0])
        del self._jobs[job.job_id]
        self._publish.pop(job.job_id, None)
        self._returned.discard(job.job_id)
        self.streams.forget(job.job_id)
        self.rendezvous.forget(job.job_id)
        self._bury(job)
        return True

    def _bury(self, job: Job) -> None:
        burial = asyncio.get_running_loop().create_task(job.close())
        self._burials[job.job_id] = burial
        burial.add_done_callback(lambda _: self._burials.pop(job.job_id, None))

    def _crashed(self, job: Job, error: Exception) -> None:
        """A bug. The job starts anew from its last record, as after a crash of the whole lighthouse."""
        log.error("job crashed job=%r; it starts anew from its last record", job.job_id, exc_info=error)
        assert self._server is not None
        if self._jobs.get(job.job_id) is job:
            del self._jobs[job.job_id]
        if job.record is not None and self._state_dir is None:
            self._memory[job.job_id] = job.record
        for link in list(job.open_links):
            self._job_of.pop(link, None)
            self._server.close_link(link, "the lighthouse met a bug in this job; it starts anew")
        self._bury(job)


async def _must_be_durable(job: Job) -> None:
    if not await job.wait_durable(DURABLE_S):
        raise NotDurable("asked, but the lighthouse cannot write its journal; its log says why. Ask again then")
