"""The rendezvous of a lighthouse: one machine a (job, group), started by the first node that names it."""

import asyncio
import logging
import secrets
from collections.abc import Callable, Iterable
from typing import Protocol

from everstep.config import LighthouseSettings
from everstep.core.agents import AgentLinkClosed, AgentMessage
from everstep.core.events import JobEvent
from everstep.core.exclusions import Exclusions
from everstep.core.learned import JobIntervals
from everstep.core.messages import Close, Effect, Log, Publish, Refused, SendToNodes
from everstep.core.node_messages import FromAgent, FromNode, NodeHello, ToNode, WorkersRunning
from everstep.core.rendezvous import (
    AdmitNode,
    NodeLinkClosed,
    NodeMessage,
    RendezvousConfig,
    RendezvousEvent,
    RendezvousMachine,
)
from everstep.core.types import REPLICA_ID_CHARS_MAX
from everstep.lighthouse.job import plain
from everstep.link.driver import Driver

GROUPS_MAX = 20_000  # of all jobs together

log = logging.getLogger("everstep.rendezvous")


class NodeLinks(Protocol):
    """What a rendezvous needs of LinkServer."""

    def send(self, message: ToNode, links: Iterable[int], /) -> None: ...
    def close_link(self, number: int, reason: str, /) -> None: ...


class JobsHere(Protocol):
    """What it needs of the jobs: a node's first link starts its job, as a member's does."""

    def admit(self, job_id: str, /) -> Refused | None: ...
    def is_return(self, job_id: str, /) -> bool: ...
    def publish(self, job_id: str, event: JobEvent, /) -> None: ...
    def agent(self, job_id: str, event: AgentMessage | AgentLinkClosed, /) -> None: ...


class RendezvousDesk:
    """Hands the nodes' links to the rendezvous they name (it is the server's NodeListener). On the server's loop."""

    def __init__(self, settings: LighthouseSettings, jobs: JobsHere) -> None:
        self._settings = settings
        self._jobs = jobs
        self._links: NodeLinks | None = None
        self._job_of: dict[int, str] = {}
        self._rendezvous_of: dict[int, _Rendezvous] = {}
        self._open: dict[tuple[str, str], _Rendezvous] = {}
        self._exclusions: dict[str, Exclusions] = {}  # of each job
        self._intervals: dict[str, JobIntervals] = {}  # of each job
        self._running: dict[int, WorkersRunning] = {}  # what each agent said last

    def attach(self, links: NodeLinks) -> None:
        self._links = links

    def close(self) -> None:
        """No machine hears or says anything any more."""
        for rendezvous in self._open.values():
            rendezvous.close()
        self._open.clear()
        self._rendezvous_of.clear()
        self._job_of.clear()

    def status(self, job_id: str) -> dict[str, object]:
        """Of each group."""
        return {r.config.group: r.machine.status() for (job, _), r in self._open.items() if job == job_id}

    def excluded(self, job_id: str) -> dict[str, str]:
        """Nodes that stay out, and why."""
        found = self._exclusions.get(job_id)
        return {node.machine: node.reason for node in found.nodes} if found is not None else {}

    def admit_node(self, job_id: str, node: str) -> None:
        """Raises LookupError: it is not excluded."""
        excluded = self.excluded(job_id)
        if node not in excluded:
            raise LookupError(
                f"node {node!r} of job {job_id!r} is not excluded; excluded are: {', '.join(excluded) or 'none'}"
            )
        for (job, _), rendezvous in list(self._open.items()):
            if job == job_id:
                rendezvous.receive(AdmitNode(node))
        self._exclusions[job_id].admit(node)  # where every machine has been dropped

    def forget(self, job_id: str) -> None:
        """The job was dropped."""
        self._exclusions.pop(job_id, None)
        self._intervals.pop(job_id, None)

    def has_nodes(self, job_id: str) -> bool:
        return job_id in self._job_of.values()

    def running(self, job_id: str) -> list[AgentMessage]:
        """For a job that starts anew: what its agents have said, and do not say again."""
        return [AgentMessage(link, said) for link, said in self._running.items() if self._job_of.get(link) == job_id]

    # ---- links

    def admit(self, job_id: str) -> Refused | None:
        return self._jobs.admit(job_id)

    def opened(self, link: int, job_id: str) -> None:
        self._job_of[link] = job_id

    def message(self, link: int, message: FromNode) -> None:
        rendezvous = self._rendezvous_of.get(link)
        if rendezvous is None:
            if not isinstance(message, NodeHello):
                self._end(link, f"{type(message).__name__} before NodeHello")
                return
            found = self._find(self._job_of[link], message.group)
            if isinstance(found, str):
                self._end(link, found)
                return
            rendezvous = self._rendezvous_of[link] = found
            rendezvous.links[link] = None
        elif isinstance(message, NodeHello) and message.group != rendezvous.config.group:
            self._end(link, "a link is for one group")
            return
        if isinstance(message, FromAgent):
            if isinstance(message, WorkersRunning):
                self._running[link] = message
            self._jobs.agent(self._job_of[link], AgentMessage(link, message))
            return
        rendezvous.receive(NodeMessage(link, message))

    def closed(self, link: int, detail: str) -> None:
        job_id = self._job_of.pop(link, None)
        if self._running.pop(link, None) is not None and job_id is not None:
            self._jobs.agent(job_id, AgentLinkClosed(link))
        rendezvous = self._rendezvous_of.pop(link, None)
        if rendezvous is not None:
            rendezvous.links.pop(link, None)
            rendezvous.receive(NodeLinkClosed(link, detail))

    def _end(self, link: int, reason: str) -> None:
        assert self._links is not None
        self._links.close_link(link, reason)

    # ---- machines

    def _find(self, job_id: str, group: str) -> "_Rendezvous | str":
        """The rendezvous, or why there can be none."""
        found = self._open.get((job_id, group))
        if found is not None:
            return found
        if len(group) > REPLICA_ID_CHARS_MAX or not (group.isprintable() or not group):
            return f"a group's name has at most {REPLICA_ID_CHARS_MAX} printable characters"
        if len(self._open) >= GROUPS_MAX and not self._make_room():
            return f"the lighthouse serves {GROUPS_MAX} rendezvous, its limit"
        config = RendezvousConfig(
            job_id=job_id,
            group=group,
            life=secrets.token_hex(4),
            is_return=self._jobs.is_return(job_id),
            heartbeat_interval_s=self._settings.node_timeout_s / 4,
            heartbeat_timeout_s=self._settings.node_timeout_s,
            link_grace_s=self._settings.link_grace_s,
        )
        assert self._links is not None
        exclusions = self._exclusions.setdefault(job_id, Exclusions())
        intervals = self._intervals.setdefault(job_id, JobIntervals())
        machine = RendezvousMachine(config, exclusions, intervals)
        opened = _Rendezvous(config, machine, self._links, self._jobs.publish, self._crashed)
        self._open[job_id, group] = opened
        opened.start()
        return opened

    def _make_room(self) -> bool:
        for key, rendezvous in self._open.items():
            if not rendezvous.links and rendezvous.machine.is_idle:
                rendezvous.close()
                del self._open[key]
                return True
        return False

    def _crashed(self, rendezvous: "_Rendezvous", error: Exception) -> None:
        """A bug. This rendezvous starts anew; its nodes come back and say what they are in."""
        config = rendezvous.config
        log.error("rendezvous crashed job=%r group=%r; it starts anew", config.job_id, config.group, exc_info=error)
        self._open.pop((config.job_id, config.group), None)
        for link in list(rendezvous.links):
            self._rendezvous_of.pop(link, None)
            self._end(link, "the lighthouse met a bug in this rendezvous; it starts anew")


class _Rendezvous:
    """One machine, its clock, and its effects."""

    def __init__(
        self,
        config: RendezvousConfig,
        machine: RendezvousMachine,
        links: NodeLinks,
        publish: Callable[[str, JobEvent], None],
        on_crash: Callable[["_Rendezvous", Exception], None],
    ) -> None:
        self.config = config
        self.machine = machine
        self.links: dict[int, None] = {}
        self._links = links
        self._publish = publish
        self._on_crash = on_crash
        self._driver: Driver[RendezvousEvent] = Driver(self.machine, self._perform, on_crash=self._crashed)

    def start(self) -> None:
        self._driver.run(self.machine.start)
        self._driver.attach(asyncio.get_running_loop())

    def close(self) -> None:
        self._driver.close()

    def receive(self, event: RendezvousEvent) -> None:
        try:
            self._driver.receive(event)
        except Exception as error:
            # Boundary between jobs: a bug that one of them met must not end the others.
            self._crashed(error)

    def _crashed(self, error: Exception) -> None:
        self._driver.close()
        self._on_crash(self, error)

    def _perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case SendToNodes(message, links):
                    self._links.send(message, links)
                case Close(link, reason):
                    self._links.close_link(link, reason)
                case Publish(event):
                    self._publish(self.config.job_id, event)
                case Log(event, fields):
                    words = "".join(f" {key}={plain(value)}" for key, value in fields.items())
                    extra = {"everstep": {"event": event, "job_id": self.config.job_id, **fields}}
                    log.info("%s job=%s%s", event, plain(self.config.job_id), words, extra=extra)
                case _:
                    raise AssertionError(f"a rendezvous returned {effect}")
