"""A training job of real processes for a test: starts them, follows what they report, and leaves none behind."""

import contextlib
import dataclasses
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import everstep as es
from everstep.config import LighthouseSettings
from everstep.core.events import EventKind, JobEvent
from everstep.lighthouse.app import Lighthouse
from everstep.link.auth import Credentials
from everstep.link.dial import LinkTarget
from everstep.link.operate import job_status
from tests.checkers.history import Failure, History, violations
from tests.train.namespaces import Hosts, inside
from tests.train.scripts import Plan, train

DEADLINE_S = 60.0
BACKLOG_MAX = 10_000

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.train.preloaded"])


@dataclasses.dataclass(frozen=True)
class Network:
    """Hosts called "lighthouse" and by the groups' numbers, and the token without which nothing leaves loopback."""

    hosts: Hosts
    token_file: Path


@dataclasses.dataclass
class Running:
    """One start of one replica group, and everything that it reported."""

    plan: Plan
    process: ForkServerProcess
    pipe: Connection
    records: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    steps: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    logs: list[str] = dataclasses.field(default_factory=list)
    logged_at: list[float] = dataclasses.field(default_factory=list)  # each of the logs, on everybody's monotonic clock
    is_holding: bool = False
    is_done: bool = False
    has_ended: bool = False
    error: str = ""

    @property
    def step(self) -> int:
        return int(self.steps[-1]["step"]) if self.steps else 0

    @property
    def participants(self) -> int:
        return int(self.steps[-1]["participants"]) if self.steps else 0

    @property
    def history(self) -> History:
        return History(self.plan.name or str(self.plan.group), self.plan.number, self.records)

    def granted(self) -> list[str]:
        """Actions of the grants it took, in order."""
        return [
            line.partition("action=")[2].partition(" member=")[0] for line in self.logs if line.startswith("granted")
        ]


class Job:
    """`with Job(groups) as job`: a lighthouse in this process, workers in their own."""

    def __init__(self, groups: int, *, network: Network | None = None, **lighthouse: Any) -> None:
        """With a `network` the lighthouse and each group live on hosts of their own."""
        self.groups = groups
        self._network = network
        if network is not None:
            lighthouse.update(bind=network.hosts.address("lighthouse"), token=network.token_file.read_bytes())
        self._settings = LighthouseSettings(port=0, **lighthouse)
        self._stack = contextlib.ExitStack()
        self.running: dict[int, Running] = {}
        self.all: list[Running] = []
        self.address = ""

    def __enter__(self) -> "Job":
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # for the children: torch's own warnings
        self.address = self.open_lighthouse()
        return self

    def __exit__(self, *_: object) -> None:
        for running in self.all:
            if running.process.is_alive():
                running.process.kill()
            running.process.join(10)
            running.pipe.close()
        self._stack.close()

    def open_lighthouse(self) -> str:
        with self._at_the_lighthouse():
            return self._stack.enter_context(Lighthouse.in_thread(self._settings)).address

    def start(self, group: int, **plan: Any) -> Running:
        ours, theirs = _context.Pipe()
        if self._network is not None:
            plan["namespace"] = self._network.hosts.file(str(group))
            plan["options"] = {"token_file": str(self._network.token_file), **plan.get("options", {})}
        place: dict[str, Any] = {
            "group": group,
            "groups": self.groups,
            "lighthouse": self.address,
            "number": len(self.all),
        }
        made = Plan(**(place | plan))
        process = _context.Process(target=train, args=(made, theirs))
        process.start()
        theirs.close()
        running = self.running[group] = Running(made, process, ours)
        self.all.append(running)
        return running

    def start_all(self, plans: dict[int, dict[str, Any]] | None = None) -> None:
        for group in range(self.groups):
            self.start(group, **(plans or {}).get(group, {}))

    def until(self, is_reached: Callable[[], bool], what: str, deadline_s: float = DEADLINE_S) -> None:
        deadline = time.monotonic() + deadline_s
        while not is_reached():
            left = deadline - time.monotonic()
            if left <= 0 or all(r.has_ended for r in self.all):
                raise AssertionError(f"{what}: not within {deadline_s:g} s\n{self.describe()}")
            self.hear(left)

    def hear(self, timeout_s: float) -> None:
        """Take what has been reported; wait for the first of it."""
        open_pipes = {r.pipe: r for r in self.all if not r.has_ended}
        for pipe in wait(list(open_pipes), timeout_s):
            self._take(open_pipes[pipe])  # type: ignore[index]

    def _take(self, running: Running) -> None:
        try:
            report = running.pipe.recv()
        except (EOFError, ConnectionResetError):
            running.has_ended = True
            return
        if not running.plan.history:
            running.records.append(report)
        match report["event"]:
            case "step":
                running.steps.append(report)
            case "log":
                running.logs.append(report["text"])
                running.logged_at.append(report["at"])
            case "holding":
                running.is_holding = True
            case "error":
                running.error = f"{report['kind']}: {report['text']}"
            case "done":
                running.is_done = True

    def until_steps(self, members: list[Running], step: int) -> None:
        self.until(lambda: all(m.step >= step for m in members), f"all of {len(members)} reach step {step}")

    def until_gone(self, running: Running) -> None:
        self.until(lambda: running.has_ended, f"group {running.plan.group} dies")

    def stop(self, members: list[Running] | None = None) -> None:
        """Let these (all that live) end after the same step, some steps from here."""
        members = members if members is not None else [r for r in self.running.values() if not r.has_ended]
        for _ in range(BACKLOG_MAX):  # on a busy machine they are further by now than what was heard of them
            if not any(member.pipe.poll() for member in members if not member.has_ended):
                break
            self.hear(0.0)
        step = max(member.step for member in members) + 20
        for member in members:
            member.pipe.send(step)
        self.until(lambda: all(member.has_ended for member in members), "all end")
        for member in members:
            member.process.join(10)
            assert member.is_done, self.describe()
            assert member.process.exitcode == 0

    def events(self) -> list[JobEvent]:
        """Everything that the lighthouse published so far."""
        token_file = self._network.token_file if self._network is not None else None
        with (
            self._at_the_lighthouse(),
            es.subscribe_events(lighthouse=self.address, token_file=token_file, after="oldest", follow=False) as events,
        ):
            return list(events)

    def ledger(self) -> dict[str, dict[str, float]]:
        """Where each group's time went, as `everstep status` has it."""
        found: dict[str, dict[str, float]] = self.status()["ledger"]
        return found

    def status(self) -> dict[str, Any]:
        token = self._network.token_file.read_bytes() if self._network is not None else None
        where = LinkTarget(url=f"http://{self.address}", credentials=Credentials(job_id="default", token=token))
        with self._at_the_lighthouse():
            return job_status(where)

    def _at_the_lighthouse(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._network is None else inside(self._network.hosts.file("lighthouse"))

    def failures(self) -> list[Failure]:
        """What the lighthouse told of failures so far."""
        failed = [event for event in self.events() if event.kind is EventKind.MEMBER_FAILED]
        return [Failure(member=e.member, cause=e.cause.value if e.cause else "", evidence=e.evidence) for e in failed]

    def violations(self) -> list[str]:
        """Of the invariants, by everything that was reported."""
        return violations([running.history for running in self.all], self.failures())

    def describe(self) -> str:
        lines = []
        for r in self.all:
            state = f"exit {r.process.exitcode}" if r.has_ended else "runs"
            lines.append(f"group {r.plan.group} {state} step {r.step} " + " | ".join(r.logs[-6:]))
        return "\n".join(lines)


def digests(members: list[Running]) -> Iterator[tuple[str, set[str]]]:
    """For each lineage that more than one of them reported: the digests of their parameters."""
    found: dict[str, set[str]] = {}
    for member in members:
        for report in member.steps:
            if report["committed"]:
                found.setdefault(report["lineage"], set()).add(report["digest"])
    yield from found.items()


def assert_same_bits(members: list[Running]) -> None:
    for lineage, found in digests(members):
        assert len(found) == 1, f"{len(found)} different states at {lineage}"


def assert_nothing_lost(survivors: list[Running]) -> None:
    """No computed step lost, none repeated, no state moved between survivors."""
    for survivor in survivors:
        lost = [report for report in survivor.steps if not report["committed"]]
        assert not lost, lost
        steps = [report["step"] for report in survivor.steps]
        assert steps == list(range(steps[0], steps[0] + len(steps)))
