"""The agent: one process per node that places, starts, watches and starts again the workers of this node.

The machine of core/restart_policy.py decides; this file is its shell. One loop on the calling thread performs its
actions, in order, and hands it events, which come from the threads that watch workers, from those that wait for
rounds, and from signals. Nothing is polled. Each group of this node has a link to the lighthouse of its own. Without
the lighthouse everything goes on; the links connect again by themselves.
"""

import contextlib
import dataclasses
import logging
import os
import queue
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from everstep.core.node_messages import IntervalsLargest, NodeSpec, SeenInterval
from everstep.core.policies import RestartPolicyName
from everstep.core.restart_budget import BudgetPolicy
from everstep.core.restart_events import (
    CloseGroup,
    DrainAsked,
    Exit,
    GroupEnded,
    JoinNext,
    Report,
    RestartAction,
    RestartEvent,
    RoundOver,
    StartWorkers,
    StopWorkers,
    TellHealth,
    WorkerGone,
)
from everstep.core.restart_policy import (
    CODE_DO_NOT_RESTART,
    CODE_DRAINED,
    RestartConfig,
    RestartMachine,
    closing_reason,
)
from everstep.launcher.death_watch import Surroundings
from everstep.launcher.embedded import lighthouse_of
from everstep.launcher.group_rendezvous import GroupRendezvous, Round, address_for_store, free_address
from everstep.launcher.plain import PlainStarter
from everstep.launcher.rank_monitor import RankMonitor
from everstep.launcher.report import Failure, failure_table, first_failure, hand_on_error_file
from everstep.launcher.scratch import scratch_folder
from everstep.launcher.settings import JobSettings
from everstep.launcher.starting import ExitStatus, RunAs, Starter
from everstep.launcher.store_host import StoreHost, host_store
from everstep.launcher.template_client import TemplateSettings, TemplateStarter
from everstep.launcher.worker_logs import WorkerLogs
from everstep.launcher.workers import AttemptWorkers, Place, Surrounding, common_environment, shares_store
from everstep.link.auth import Credentials
from everstep.link.dial import LinkTarget
from everstep.link.node import NodeClient
from everstep.monitor.control import WorkloadAction

__all__ = ["run"]

WAIT_S = 3600.0  # for an event; then again
SPARES_MAX = 8  # forked workers that wait for work: restarting as many at once takes no fork

log = logging.getLogger("everstep.launcher")


def run(settings: JobSettings, *, budget: BudgetPolicy | None = None) -> int:
    """Run this node's share of the job, to its end; the exit code. On the main thread signals drain it.

    `budget`: how restarts are paced, beside `settings.max_restarts`. Raises ConfigError.
    """
    settings = dataclasses.replace(settings, environment=common_environment(settings))
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(scratch_folder())
        lighthouse = stack.enter_context(lighthouse_of(settings))
        starter = stack.enter_context(_starter(settings))
        logs = stack.enter_context(WorkerLogs(settings, scratch))
        agent = _Agent(settings, starter, lighthouse, budget)
        monitor = stack.enter_context(RankMonitor(settings.monitor, agent.on_request, agent.on_intervals))
        agent.around = Surrounding(
            settings=settings,
            starter=starter,
            logs=logs,
            scratch=scratch,
            lighthouse=lighthouse,
            on_gone=agent.on_gone,
            monitor=monitor,
        )
        with agent.signals():
            return agent.run()


@contextlib.contextmanager
def _starter(settings: JobSettings) -> Iterator[Starter]:
    around = Surroundings(adopts_orphans=True)
    if not settings.use_template:
        plain = PlainStarter(around, settings.python)
        try:
            yield plain
        finally:
            plain.close()
        return
    search_path = str(Path(settings.target).resolve().parent) if settings.run_as is RunAs.SCRIPT else os.getcwd()
    template = TemplateSettings(
        environment=settings.environment,
        search_path=search_path,
        preload=(*_preload(settings), *settings.preload),
        spares=min(SPARES_MAX, settings.nproc_per_node * max(1, len(settings.replica_groups))),
    )
    with TemplateStarter(template, around) as starter:
        yield starter


def _preload(settings: JobSettings) -> tuple[str, ...]:
    """Before what the operator asks for. Workers that are replica groups would take seconds to import the rest.

    Every optimizer of torch imports torch._dynamo when it is made, with 800 modules.
    """
    return ("torch", "everstep.train.manager", "torch._dynamo") if settings.replica_groups else ("torch",)


class _Agent:
    """Fields belong to the loop's thread, but for the queue."""

    around: Surrounding

    def __init__(self, settings: JobSettings, starter: Starter, lighthouse: str, budget: BudgetPolicy | None) -> None:
        self._settings = settings
        self._starter = starter
        self._lighthouse = lighthouse
        self._queue: queue.SimpleQueue[RestartEvent | Round | Failure | IntervalsLargest] = queue.SimpleQueue()
        groups = settings.replica_groups or ("",)
        pace = budget or BudgetPolicy()
        self._machine = RestartMachine(
            RestartConfig(
                groups=groups,
                workers=settings.nproc_per_node,
                policy=settings.restart_policy,
                budget=BudgetPolicy(
                    max_restarts=settings.max_restarts,
                    pause_s=pace.pause_s,
                    pause_max_s=pace.pause_max_s,
                    quick_s=pace.quick_s,
                    progress_s=pace.progress_s,
                    no_progress_max=settings.max_no_progress_cycles,
                ),
                shutdown_timeout_s=settings.shutdown_timeout_s,
                drain_timeout_s=settings.drain_timeout_s,
            )
        )
        self._rendezvous = {group: self._make_rendezvous(group) for group in groups}
        self._rounds: dict[str, Round] = {}
        self._workers: dict[str, AttemptWorkers] = {}
        self._stores: dict[str, StoreHost] = {}
        self._failures: dict[str, list[Failure]] = {}  # of each group's last attempt
        self._whys: list[str] = []
        self._signals: list[int] = []
        self._code: int | None = None

    # ---- the loop

    def run(self) -> int:
        for rendezvous in self._rendezvous.values():
            rendezvous.start()
        try:
            self._perform(self._machine.start(time.monotonic()))
            while self._code is None:
                event = self._next_event()
                now = time.monotonic()
                if isinstance(event, Round):
                    self._rounds[event.group] = event
                elif isinstance(event, Failure):
                    self._failures.setdefault(event.group, []).append(event)
                elif isinstance(event, IntervalsLargest):
                    self.around.monitor.hear(event.intervals)
                else:
                    self._perform(self._machine.receive(event, now) if event is not None else self._machine.tick(now))
        finally:
            self._end()
        if self._code not in (0, CODE_DRAINED):
            self._report()
        # As a shell says it of a program that a signal has ended.
        return 128 + self._signals[-1] if len(self._signals) > 1 else self._code

    def _next_event(self) -> RestartEvent | Round | Failure | IntervalsLargest | None:
        deadline = self._machine.next_deadline()
        timeout_s = WAIT_S if deadline is None else max(0.0, deadline - time.monotonic())
        with contextlib.suppress(queue.Empty):
            return self._queue.get(timeout=min(timeout_s, WAIT_S))
        return None

    def _end(self) -> None:
        """Nothing that this agent started goes on."""
        for workers in self._workers.values():
            workers.stop_now()
        for group, rendezvous in self._rendezvous.items():
            rendezvous.leave("")
            self._close_store(group)
        for rendezvous in self._rendezvous.values():
            rendezvous.wait_left()

    def on_gone(self, gone: WorkerGone, failure: Failure | None) -> None:
        """From the threads that watch workers."""
        if failure is not None:
            self._queue.put(failure)
        self._queue.put(gone)

    def on_request(self, action: WorkloadAction, why: str) -> None:
        """From the monitor's thread: a worker's script wants this."""
        match action:
            case WorkloadAction.Continue:
                pass
            case WorkloadAction.ExcludeThisNode:
                for rendezvous in self._rendezvous.values():
                    rendezvous.client.exclude(why)
                self._queue.put(DrainAsked(why))
            case WorkloadAction.ShutdownWorkload:
                for rendezvous in self._rendezvous.values():
                    rendezvous.close(closing_reason(CODE_DO_NOT_RESTART, why))

    def on_intervals(self, intervals: tuple[SeenInterval, ...]) -> None:
        """From the monitor's thread: what ranks here saw."""
        for rendezvous in self._rendezvous.values():
            rendezvous.client.saw(intervals)

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """While the block runs they drain this node. Elsewhere than on the main thread: nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._on_signal) for number in self._settings.signals_to_handle}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self._signals.append(number)
        self._queue.put(DrainAsked(signal.Signals(number).name))

    # ---- actions

    def _perform(self, actions: list[RestartAction]) -> None:
        for action in actions:
            match action:
                case JoinNext(group, restarts):
                    self._close_store(group)
                    self._rendezvous[group].join_next(restarts)
                case StartWorkers(group, attempt, restarts):
                    self._start_workers(group, attempt, restarts)
                case StopWorkers(group, _, how):
                    number = self._signals[0] if self._signals else signal.SIGTERM
                    self._workers[group].stop(how, number)
                case TellHealth(group, health):
                    self._rendezvous[group].stand(health)
                case CloseGroup(group, reason):
                    self._rendezvous[group].close(reason)
                case GroupEnded(group, code, why):
                    self._group_ended(group, code, why)
                case Exit(code):
                    self._code = code
                case Report(event, fields):
                    said = " ".join(f"{name}={value!r}" for name, value in fields.items() if value != "")
                    log.info("%s %s", event, said)

    def _start_workers(self, group: str, attempt: int, restarts: int) -> None:
        round_ = self._rounds[group]
        place = Place(
            group=group,
            attempt=attempt,
            restarts=restarts,
            node_rank=round_.info.rank,
            nodes=round_.info.size,
            ranks=round_.ranks,
            store=round_.info.store,
        )
        if group in self._workers:
            self._workers[group].finish()
        self._failures.pop(group, None)
        workers = self._workers[group] = AttemptWorkers(self.around, place, self._rendezvous[group].client)
        workers.start()

    def _group_ended(self, group: str, code: int, why: str) -> None:
        if group in self._workers:
            self._workers[group].finish()
        if why:
            self._whys.append(f"group {group}: {why}" if group else why)
        log.info("ended group=%r code=%d why=%r", group, code, why)
        self._rendezvous[group].leave(why)
        self._close_store(group)

    def _report(self) -> None:
        failures = [failure for group in self._failures.values() for failure in group]
        if failures:
            sys.stderr.write("\n" + failure_table(self._settings.target, failures) + "\n")
            hand_on_error_file(first_failure(failures), self._settings.environment.get("TORCHELASTIC_ERROR_FILE", ""))
        for why in self._whys:
            sys.stderr.write(f"everstep: {why}\n")
        sys.stderr.flush()

    # ---- rendezvous

    def _make_rendezvous(self, group: str) -> GroupRendezvous:
        settings = self._settings
        name = group or settings.rendezvous_group
        credentials = Credentials(job_id=settings.job_id, role="node", token=settings.token)
        target = LinkTarget(
            url=self._lighthouse,
            credentials=credentials,
            connect_timeout_s=settings.connect_timeout_s,
            tls_ca=settings.tls_ca,
            named_by="--lighthouse or --rdzv-endpoint",
        )
        is_min_healthy = settings.restart_policy is RestartPolicyName.MIN_HEALTHY
        spec = NodeSpec(
            node_id=settings.node_id,
            machine=settings.machine,
            nonce=secrets.token_hex(8),
            min_nodes=settings.min_nodes,
            max_nodes=settings.max_nodes,
            join_timeout_s=settings.join_timeout_s,
            last_call_s=settings.last_call_s,
            ranks=settings.rank_assignment,
            infrastructure_rank=settings.infrastructure_rank,
            domain=settings.domain,
            domain_size=settings.domain_size,
            min_healthy=settings.min_nodes if is_min_healthy else 0,
        )
        client = NodeClient(target, name, spec)
        client.on_fence = lambda worker: self._fence(group, worker)
        client.vouch = lambda worker: self._vouch(group, worker)
        client.on_largest = self._queue.put
        opener = self._store_opener(group, client)
        return GroupRendezvous(group, client, settings, opener, self._starter.wait_ready, self._queue.put)

    def _fence(self, group: str, worker: str) -> None:
        workers = self._workers.get(group)
        if workers is not None:
            workers.fence(worker)

    def _vouch(self, group: str, worker: str) -> str:
        workers = self._workers.get(group)
        return workers.vouch(worker) if workers is not None else ""

    # ---- the workers' stores

    def _store_opener(self, group: str, client: NodeClient) -> Callable[[], str]:
        def on_end(status: ExitStatus) -> None:
            self._queue.put(RoundOver(group, f"the workers' store ended: {status.describe()}"))

        def open_store() -> str:
            host = address_for_store(self._settings, self._lighthouse, client.link_address)
            self._close_store(group)
            if not shares_store(self._settings):
                return free_address(host)
            store = self._stores[group] = host_store(self._starter, host, self._settings.environment, on_end)
            name, port = store.address
            return f"[{name}]:{port}" if ":" in name else f"{name}:{port}"

        return open_store

    def _close_store(self, group: str) -> None:
        """On the loop's thread, or on the one that opens: never both, as one waits for what the other asks for."""
        store = self._stores.pop(group, None)
        if store is not None:
            store.close()
