"""The demo's conductor: an embedded lighthouse, three groups, one SIGKILL, one return, and what came of it."""

import dataclasses
import enum
import random
import secrets
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from everstep.config import LighthouseSettings
from everstep.demo.display import Display
from everstep.demo.workers import Report, Worker, Workers
from everstep.errors import EverstepError
from everstep.lighthouse.app import Lighthouse
from everstep.link.auth import Credentials
from everstep.link.dial import LinkTarget
from everstep.link.operate import job_status

GROUPS = 3
STEPS_BEFORE_KILL = 40
STEPS_APART = 25  # that the survivors go on alone before the killed group starts again
STEPS_TOGETHER = 40
DEADLINE_S = 180.0


class DemoFailed(EverstepError):
    """A worker ended, or the time was up; the message says which and quotes its log."""


class Act(enum.Enum):
    TOGETHER = "all groups train"
    APART = "one group was killed; the others go on"
    RETURN = "the killed group starts again"
    FINISH = "all groups train together again"


@dataclasses.dataclass
class Group:
    """What the display shows and the summary needs."""

    number: int
    step: int = 0
    loss: float = float("nan")
    state: str = "starting"
    first_loss: float | None = None
    next_commit_at: float | None = None  # the first one after the kill
    aborted_after_kill: int = 0
    digest: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    groups: int
    steps: int
    survivor_pause_s: float
    steps_lost: int
    rejoin_s: float
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
        self._workers: dict[int, Worker] = {}
        self._act = Act.TOGETHER
        self._victim = GROUPS - 1
        self._killed_at = 0.0
        self._restarted_at = 0.0
        self._rejoined_at = 0.0
        self._step_at_kill = 0
        self._stop_step = 0
        self._ledger: dict[str, dict[str, float]] = {}

    def run(self) -> Summary:
        with tempfile.TemporaryDirectory(prefix="everstep-demo-") as name:
            folder = Path(name)
            token = _write_token(folder / "token")
            settings = LighthouseSettings(port=0, token=token, state_dir=folder / "lighthouse")
            with Lighthouse.in_thread(settings) as lighthouse:
                environment = {
                    **self._environ,
                    "EVERSTEP_LIGHTHOUSE": lighthouse.address,
                    "EVERSTEP_JOB_ID": "demo",
                    "EVERSTEP_TOKEN_FILE": str(folder / "token"),
                    "NUM_REPLICA_GROUPS": str(GROUPS),
                    "TORCH_CPP_LOG_LEVEL": "ERROR",
                }
                with Workers(environment, folder) as workers:
                    self._conduct(workers)
                where = LinkTarget(url=lighthouse.url, credentials=Credentials(job_id="demo", token=token))
                self._ledger = job_status(where)["ledger"]
        return self._summary()

    # ---- the play

    def _conduct(self, workers: Workers) -> None:
        for group in self._groups:
            self._workers[group.number] = workers.start(group.number)
        self._display.say(f"{GROUPS} replica groups start; a lighthouse runs in this process")
        deadline = time.monotonic() + DEADLINE_S
        # The instant is random, so that the kill falls into any phase of a step.
        kill_at_step = STEPS_BEFORE_KILL + self._rng.randrange(5)
        kill_delay_s = self._rng.uniform(0.0, 0.1)
        kill_at: float | None = None
        while not all(group.digest for group in self._groups):
            now = time.monotonic()
            if now >= deadline:
                raise DemoFailed(f"the demo did not end within {DEADLINE_S:g} s ({self._act.value})")
            if kill_at is None and self._act is Act.TOGETHER and self._lowest() >= kill_at_step:
                kill_at = now + kill_delay_s
            if self._act is Act.TOGETHER and kill_at is not None and now >= kill_at:
                self._kill(workers)
            wait_s = 0.2 if kill_at is None or self._act is not Act.TOGETHER else max(0.0, kill_at - now)
            for report in workers.reports(min(0.2, wait_s)):
                self._take(report, workers)
            self._display.show(self._groups, self._act.value)

    def _kill(self, workers: Workers) -> None:
        self._act = Act.APART
        victim = self._groups[self._victim]
        self._step_at_kill = max(group.step for group in self._groups)
        self._killed_at = workers.kill(self._workers[self._victim])
        victim.state = "killed"
        self._display.say(f"SIGKILL to group {self._victim} after step {self._step_at_kill}")

    def _take(self, report: Report, workers: Workers) -> None:
        group = self._groups[report.worker.group]
        if report.fields is None:
            if report.worker is self._workers[group.number] and not group.digest and group.state != "killed":
                raise DemoFailed(f"group {group.number} ended: {_last_lines(report.worker.log)}")
            return
        if report.worker is not self._workers[group.number] or group.state == "killed":
            return
        event = report.fields["event"]
        if event == "step":
            self._step(group, report.fields, workers)
        elif event == "done":
            group.digest, group.state = report.fields["digest"] + report.fields["lineage"], "done"

    def _step(self, group: Group, fields: dict[str, Any], workers: Workers) -> None:
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
        if self._act is Act.APART and self._lowest_survivor() >= self._step_at_kill + STEPS_APART:
            self._act = Act.RETURN
            self._workers[self._victim] = workers.start(self._victim)
            self._restarted_at = self._workers[self._victim].started_at
            self._groups[self._victim].state = "starting again"
            self._display.say(f"group {self._victim} starts again")
        elif self._act is Act.RETURN and group.number == self._victim:
            self._act = Act.FINISH
            self._rejoined_at = fields["at"]
            self._stop_step = max(g.step for g in self._groups) + STEPS_TOGETHER
            after_s = self._rejoined_at - self._restarted_at
            self._display.say(f"group {group.number} is back after {after_s:.1f} s, at step {group.step}")
            for worker in self._workers.values():
                workers.tell_stop(worker, self._stop_step)

    def _lowest(self) -> int:
        return min(group.step for group in self._groups)

    def _lowest_survivor(self) -> int:
        return min(group.step for group in self._groups if group.number != self._victim)

    def _summary(self) -> Summary:
        survivors = [group for group in self._groups if group.number != self._victim]
        pauses = [g.next_commit_at - self._killed_at for g in survivors if g.next_commit_at is not None]
        return Summary(
            groups=GROUPS,
            steps=self._stop_step,
            survivor_pause_s=round(max(pauses), 4),
            steps_lost=sum(group.aborted_after_kill for group in survivors),
            rejoin_s=round(self._rejoined_at - self._restarted_at, 3),
            replicas_identical=len({group.digest for group in self._groups}) == 1,
            loss_first=round(self._groups[0].first_loss or float("nan"), 4),
            loss_last=round(self._groups[0].loss, 4),
            ledger=self._ledger,
        )


def describe(summary: Summary) -> str:
    same = "hold the same bits" if summary.replicas_identical else "DIFFER: this is a bug, please report it"
    return (
        f"\nThe survivors committed their next step {summary.survivor_pause_s * 1e3:.0f} ms after the SIGKILL.\n"
        f"Computed steps lost: {summary.steps_lost}.\n"
        f"The killed group was back, with its peers' live state, {summary.rejoin_s:.1f} s after its restart.\n"
        f"After step {summary.steps} all {summary.groups} replicas {same}; "
        f"loss {summary.loss_first:.2f} -> {summary.loss_last:.2f}."
    )


def _write_token(path: Path) -> bytes:
    token = secrets.token_hex(16).encode()
    path.touch(mode=0o600)
    path.write_bytes(token)
    return token


def _last_lines(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return " | ".join(lines[-3:]) or "it wrote nothing to its log"
