"""The demo's conductor: `everstep run` with three groups, one SIGKILL, one return, and what came of it."""

import dataclasses
import enum
import os
import random
import signal
import socket
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from everstep.core.events import EventKind, JobEvent
from everstep.demo.display import Display
from everstep.demo.job import Job, Report
from everstep.errors import EverstepError
from everstep.link.auth import Credentials
from everstep.link.dial import LinkTarget
from everstep.link.events import Subscription
from everstep.link.operate import job_status

GROUPS = 3
STEPS_BEFORE_KILL = 40
STEPS_TOGETHER = 40
DEADLINE_S = 180.0


class DemoFailed(EverstepError):
    """A worker or the agent ended, or the time was up; the message says which and quotes the log."""


class Act(enum.Enum):
    TOGETHER = "all groups train"
    APART = "one group was killed; the others go on"
    RETURN = "the agent has started the killed group again"
    FINISH = "all groups train together again"


@dataclasses.dataclass
class Group:
    """What the display shows and the summary needs."""

    number: int
    connection: socket.socket | None = None  # of the process that runs
    pid: int = 0
    step: int = 0
    loss: float = float("nan")
    state: str = "starting"
    first_loss: float | None = None
    next_commit_at: float | None = None  # the first one after the kill
    aborted_after_kill: int = 0
    digest: str = ""
    has_left: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """`restart_s`: from the SIGKILL until its script ran again; `rejoin_s`: from then to its first commit.

    `recovery_s` is the part of that in which it fetched `recovered_bytes` from `recovery_donors`.
    """

    groups: int
    steps: int
    survivor_pause_s: float
    steps_lost: int
    restart_s: float
    rejoin_s: float
    recovered_bytes: int
    recovery_s: float
    recovery_donors: tuple[str, ...]
    recovery_transport: str
    replicas_identical: bool
    loss_first: float
    loss_last: float
    ledger: dict[str, dict[str, float]]  # seconds of each group, by account; see core/ledger.py


class Demo:
    """`run` returns the summary; everything it started has ended then."""

    def __init__(self, display: Display, environ: Mapping[str, str], rng: random.Random) -> None:
        self._display = display
        self._environ = environ
        self._rng = rng
        self._groups = [Group(number) for number in range(GROUPS)]
        self._act = Act.TOGETHER
        self._victim = GROUPS - 1
        self._lighthouse: LinkTarget | None = None
        self._killed_at = 0.0
        self._restarted_at = 0.0
        self._rejoined_at = 0.0
        self._step_at_kill = 0
        self._stop_step = 0
        self._ledger: dict[str, dict[str, float]] = {}
        self._recovery: JobEvent | None = None

    def run(self) -> Summary:
        with tempfile.TemporaryDirectory(prefix="everstep-demo-", ignore_cleanup_errors=True) as name:
            with Job(GROUPS, self._environ, Path(name)) as job:
                self._display.say(f"$ {job.command}")
                self._conduct(job)
                assert self._lighthouse is not None
                self._ledger = job_status(self._lighthouse)["ledger"]
                self._look_for_recovery()
                code = job.finish()
                if code != 0:
                    raise DemoFailed(f"the agent ended with {code}; the end of its log:\n{job.last_lines()}")
        return self._summary()

    # ---- the play

    def _conduct(self, job: Job) -> None:
        deadline = time.monotonic() + DEADLINE_S
        # The instant is random, so that the kill falls into any phase of a step.
        kill_at_step = STEPS_BEFORE_KILL + self._rng.randrange(5)
        kill_delay_s = self._rng.uniform(0.0, 0.1)
        kill_at: float | None = None
        while not all(group.has_left for group in self._groups):
            now = time.monotonic()
            if now >= deadline:
                raise DemoFailed(
                    f"the demo did not end within {DEADLINE_S:g} s ({self._act.value}); the end of the job's log:\n"
                    + job.last_lines()
                )
            if job.exit_code is not None:
                raise DemoFailed(f"the agent ended with {job.exit_code}; the end of its log:\n{job.last_lines()}")
            if kill_at is None and self._act is Act.TOGETHER and self._lowest() >= kill_at_step:
                kill_at = now + kill_delay_s
            if self._act is Act.TOGETHER and kill_at is not None and now >= kill_at:
                self._kill()
            wait_s = 0.2 if kill_at is None or self._act is not Act.TOGETHER else max(0.0, kill_at - now)
            for report in job.reports(min(0.2, wait_s)):
                self._take(report, job)
            if self._act is Act.FINISH and self._recovery is None:
                self._look_for_recovery()
            self._display.show(self._groups, self._act.value)

    def _look_for_recovery(self) -> None:
        """How the killed group got its state back; by the time that it trains again the lighthouse knows, or soon."""
        assert self._lighthouse is not None
        if self._recovery is not None:
            return
        kinds = {EventKind.RECOVERY_ENDED}
        with Subscription(self._lighthouse, after="oldest", follow=False, kinds=kinds) as events:
            ends = [event for event in events if event.replica_id == str(self._victim) and event.outcome == "done"]
        if ends and ends[-1].step:  # not that of the first weights, when the job began
            self._recovery = ends[-1]
            self._display.say(f"group {self._victim} has taken its peers' live state over: {transfer(self._recovery)}")

    def _kill(self) -> None:
        self._act = Act.APART
        victim = self._groups[self._victim]
        self._step_at_kill = max(group.step for group in self._groups)
        self._killed_at = time.monotonic()
        os.kill(victim.pid, signal.SIGKILL)
        victim.connection, victim.state = None, "killed"
        self._display.say(f"SIGKILL to group {self._victim} after step {self._step_at_kill}")

    def _take(self, report: Report, job: Job) -> None:
        fields = report.fields
        if fields is not None and fields["event"] == "started":
            self._started(self._groups[int(fields["group"])], report.connection, fields)
            return
        group = next((group for group in self._groups if group.connection is report.connection), None)
        if group is None:
            return  # of the killed one's last moments
        if fields is None:
            raise DemoFailed(f"group {group.number} ended; the end of the job's log:\n{job.last_lines()}")
        if fields["event"] == "step":
            self._step(group, fields, job)
        elif fields["event"] == "done":
            group.digest, group.state = fields["digest"], "done"
        elif fields["event"] == "left":
            group.has_left = True

    def _started(self, group: Group, connection: socket.socket, fields: dict[str, Any]) -> None:
        group.connection, group.pid = connection, fields["pid"]
        self._lighthouse = LinkTarget(url=fields["lighthouse"], credentials=Credentials(job_id=fields["job"]))
        if self._act is Act.APART:
            self._act = Act.RETURN
            self._restarted_at = fields["at"]
            group.state = "starting again"
            after_ms = (self._restarted_at - self._killed_at) * 1e3
            self._display.say(f"group {group.number} runs again {after_ms:.0f} ms after the kill: its agent saw it die")

    def _step(self, group: Group, fields: dict[str, Any], job: Job) -> None:
        group.step, group.loss = fields["step"], fields["loss"]
        if group.first_loss is None:
            group.first_loss = group.loss
        is_survivor = self._act is not Act.TOGETHER and group.number != self._victim
        if not fields["committed"]:
            group.aborted_after_kill += is_survivor and fields["at"] > self._killed_at
            return
        group.state = f"training, {fields['participants']} groups"
        if is_survivor and group.next_commit_at is None and fields["at"] > self._killed_at:
            group.next_commit_at = fields["at"]
            pause_ms = (fields["at"] - self._killed_at) * 1e3
            self._display.say(f"group {group.number} commits step {group.step} {pause_ms:.0f} ms after the kill")
        if self._act is Act.RETURN and group.number == self._victim:
            self._act = Act.FINISH
            self._rejoined_at = fields["at"]
            self._stop_step = max(g.step for g in self._groups) + STEPS_TOGETHER
            after_s = self._rejoined_at - self._killed_at
            self._display.say(f"group {group.number} is back {after_s:.2f} s after the kill, at step {group.step}")
            job.tell_stop(self._stop_step)

    def _lowest(self) -> int:
        return min(group.step for group in self._groups)

    def _summary(self) -> Summary:
        survivors = [group for group in self._groups if group.number != self._victim]
        recovery = self._recovery or JobEvent(kind=EventKind.RECOVERY_ENDED)
        pauses = [g.next_commit_at - self._killed_at for g in survivors if g.next_commit_at is not None]
        return Summary(
            groups=GROUPS,
            steps=self._stop_step,
            survivor_pause_s=round(max(pauses), 4),
            steps_lost=sum(group.aborted_after_kill for group in survivors),
            restart_s=round(self._restarted_at - self._killed_at, 3),
            rejoin_s=round(self._rejoined_at - self._restarted_at, 3),
            recovered_bytes=recovery.done_bytes,
            recovery_s=recovery.seconds,
            recovery_donors=recovery.donors,
            recovery_transport=recovery.transport,
            replicas_identical=len({group.digest for group in self._groups}) == 1,
            loss_first=round(self._groups[0].first_loss or float("nan"), 4),
            loss_last=round(self._groups[0].loss, 4),
            ledger=self._ledger,
        )


def transfer(recovery: JobEvent) -> str:
    """What moved, how fast, and from where."""
    rate = recovery.done_bytes / 1e6 / recovery.seconds if recovery.seconds > 0 else 0.0
    donors = " and ".join(donor.partition("#")[0] for donor in recovery.donors)
    mb, ms = recovery.done_bytes / 1e6, recovery.seconds * 1e3
    return f"{mb:.1f} MB in {ms:.0f} ms ({rate:.0f} MB/s) from groups {donors}, by {recovery.transport}"


def describe(summary: Summary) -> str:
    mb, ms = summary.recovered_bytes / 1e6, summary.recovery_s * 1e3
    moved = f" ({mb:.1f} MB from {len(summary.recovery_donors)} groups in {ms:.0f} ms)" if mb else ""
    same = "hold the same bits" if summary.replicas_identical else "DIFFER: this is a bug, please report it"
    return (
        f"\nThe survivors committed their next step {summary.survivor_pause_s * 1e3:.0f} ms after the SIGKILL.\n"
        f"Computed steps lost: {summary.steps_lost}.\n"
        f"The killed group ran again {summary.restart_s * 1e3:.0f} ms after it; "
        f"{summary.rejoin_s:.2f} s later it was back, with its peers' live state{moved}.\n"
        f"After step {summary.steps} all {summary.groups} replicas {same}; "
        f"loss {summary.loss_first:.2f} -> {summary.loss_last:.2f}."
    )
