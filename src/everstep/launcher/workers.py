"""The workers of one attempt: their environment (torchrun's, and Everstep's), their start, their end.

A worker's death is told to the lighthouse at once, by the thread that saw it; that it has ended, with its exit status,
comes later, once the kernel has taken back its memory.
"""

import contextlib
import dataclasses
import functools
import os
import secrets
import signal
import string
import struct
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from everstep.core.ranks import WorkerRanks
from everstep.core.restart_events import Stop, WorkerGone
from everstep.launcher.rank_monitor import RankMonitor, Ward
from everstep.launcher.report import Failure
from everstep.launcher.settings import JobSettings
from everstep.launcher.starting import ExitStatus, Launch, Starter, WorkerDeath, WorkerNotStarted, WorkerProcess
from everstep.launcher.worker_logs import AttemptLogs, WorkerLogs
from everstep.link.node import NodeClient

__all__ = ["AttemptWorkers", "Place", "Surrounding", "worker_environment"]

EXIT_CODE_FIELD = 49  # of those after the name in /proc/PID/stat
STEPS = struct.Struct("<QQ")  # what a worker's Manager keeps in a file: how many steps it committed, and the last one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where the workers of one attempt stand: their round, and their numbers in it."""

    group: str
    attempt: int
    restarts: int
    node_rank: int
    nodes: int
    ranks: WorkerRanks
    store: str  # host:port


@dataclasses.dataclass(frozen=True, kw_only=True)
class Surrounding:
    """What all attempts have in common. `on_gone` is called from other threads, and must be quick."""

    settings: JobSettings
    starter: Starter
    logs: WorkerLogs
    scratch: Path
    lighthouse: str  # its URL
    on_gone: Callable[[WorkerGone, Failure | None], None]
    monitor: RankMonitor


def common_environment(settings: JobSettings) -> dict[str, str]:
    """What all workers of this agent have in their environment, and what forks them, too."""
    environment = dict(settings.environment)
    environment |= {
        "TORCHELASTIC_SIGNALS_TO_HANDLE": ",".join(signal.Signals(n).name for n in settings.signals_to_handle),
        "EVERSTEP_JOB_ID": settings.job_id,
    }
    environment.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    if settings.nproc_per_node > 1:
        environment.setdefault("OMP_NUM_THREADS", "1")
    if settings.token is not None and not environment.get("EVERSTEP_TOKEN_FILE"):
        environment["EVERSTEP_TOKEN"] = os.fsdecode(settings.token)
    if settings.replica_groups_total:
        environment["NUM_REPLICA_GROUPS"] = str(settings.replica_groups_total)
    return environment


def shares_store(settings: JobSettings) -> bool:
    """Whether this node's agent hosts the workers' store; torch's own switch turns it off, and their rank 0 does."""
    return settings.environment.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "0") != "1"


def worker_environment(around: Surrounding, place: Place, local_rank: int) -> dict[str, str]:
    """All of a worker's environment but what names this very start of it. `settings.environment` is the common one."""
    settings, ranks = around.settings, place.ranks
    environment = dict(settings.environment)
    host, _, port = place.store.rpartition(":")
    environment |= {
        "LOCAL_RANK": str(local_rank),
        "RANK": str(ranks.base_rank + local_rank),
        "GROUP_RANK": str(place.node_rank),
        "ROLE_RANK": str(ranks.base_role_rank + local_rank),
        "ROLE_NAME": settings.role,
        "LOCAL_WORLD_SIZE": str(settings.nproc_per_node),
        "WORLD_SIZE": str(ranks.world_size),
        "GROUP_WORLD_SIZE": str(place.nodes),
        "ROLE_WORLD_SIZE": str(ranks.role_world_size),
        "MASTER_ADDR": host.strip("[]"),
        "MASTER_PORT": port,
        "TORCHELASTIC_RESTART_COUNT": str(place.restarts),
        "TORCHELASTIC_MAX_RESTARTS": str(settings.max_restarts),
        "TORCHELASTIC_RUN_ID": settings.job_id,
        "TORCHELASTIC_USE_AGENT_STORE": str(shares_store(settings)),
    }
    if place.group:  # other worlds train alone, unless the user's environment names a lighthouse
        environment |= {"EVERSTEP_LIGHTHOUSE": around.lighthouse, "REPLICA_GROUP_ID": place.group}
    devices = _devices(settings, place.group, environment)
    if settings.virtual_local_rank:
        environment["LOCAL_RANK"] = "0"
        environment["CUDA_VISIBLE_DEVICES"] = devices[local_rank] if local_rank < len(devices) else str(local_rank)
    elif devices:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    return environment


def _devices(settings: JobSettings, group: str, environment: Mapping[str, str]) -> tuple[str, ...]:
    if settings.devices:
        return settings.devices[settings.replica_groups.index(group)]
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    return tuple(name.strip() for name in visible.split(",")) if visible else ()


@dataclasses.dataclass(kw_only=True)
class _Worker:
    token: str
    local_rank: int
    process: WorkerProcess
    error_file: str
    steps: Path
    ward: Ward
    died_at: float | None = None  # seconds since the epoch
    was_told: bool = False


class AttemptWorkers:
    """`start`, then `stop` as often as is wanted; `on_gone` tells of each worker's end, also of one that never began.

    `start` and `stop` on one thread; `fence` and `vouch` on any.
    """

    def __init__(self, around: Surrounding, place: Place, client: NodeClient) -> None:
        self._around = around
        self._place = place
        self._client = client
        self._workers: dict[str, _Worker] = {}  # by token
        self._lock = threading.Lock()
        self._left = around.settings.nproc_per_node
        self._logs: AttemptLogs | None = None

    def start(self) -> None:
        place = self._place
        ranks = {local: place.ranks.base_rank + local for local in range(self._left)}
        self._logs = self._around.logs.attempt(place.group, place.restarts, ranks)
        watched: list[_Worker] = []
        for local_rank in ranks:
            worker = self._start_one(local_rank, self._logs)
            if worker is not None:
                watched.append(worker)
        self._logs.started()
        # Not before all have begun: one that ends at once would have its siblings told to end while they start.
        for worker in watched:
            worker.process.watch(functools.partial(self._on_death, worker), functools.partial(self._on_exit, worker))

    def stop(self, how: Stop, number: int = signal.SIGTERM) -> None:
        """Ask by signal `number`, or kill."""
        with self._lock:
            running = list(self._workers.values())
        for worker in running:
            worker.was_told = True
            worker.process.signal_group(signal.SIGKILL if how is Stop.KILL else number)
            if how is Stop.ASK:
                worker.process.signal_group(signal.SIGCONT)  # one that is stopped would not hear it

    def stop_now(self) -> None:
        """Kill what is left, and let the last words through."""
        self.stop(Stop.KILL)
        self.finish()

    def fence(self, token: str) -> bool:
        """Kill this worker, if it is one of these."""
        worker = self._workers.get(token)
        if worker is not None:
            worker.process.signal_group(signal.SIGKILL)
        return worker is not None

    def vouch(self, token: str) -> str:
        worker = self._workers.get(token)
        return worker.process.state() if worker is not None else ""

    def finish(self) -> None:
        """Once all have ended: let their last words through."""
        if self._logs is not None:
            self._logs.finish()

    # ---- starting

    def _start_one(self, local_rank: int, logs: AttemptLogs) -> _Worker | None:
        settings = self._around.settings
        files = logs.files(local_rank)
        token = secrets.token_hex(8)
        steps = self._around.scratch / f"steps-{token}"
        environment = worker_environment(self._around, self._place, local_rank)
        ward = self._around.monitor.prepare()
        environment |= ward.environment | {
            "TORCHELASTIC_ERROR_FILE": files.error_file,
            "EVERSTEP_WORKER": token,
            "EVERSTEP_STEPS_FILE": str(steps),
        }
        with contextlib.suppress(OSError):  # without it, restarts are counted as if no step had been made
            steps.write_bytes(bytes(STEPS.size))
        launch = Launch(
            run_as=settings.run_as,
            target=settings.target,
            args=tuple(string.Template(arg).safe_substitute(local_rank=local_rank) for arg in settings.args),
            environment=environment,
            cwd=os.getcwd(),
            stdout=files.stdout,
            stderr=files.stderr,
        )
        try:
            process = self._around.starter.start(launch)
        except WorkerNotStarted as error:
            ward.let_go()
            self._never_began(local_rank, str(error))
            return None
        ward.watch(process, self._name(local_rank), files.stderr, self._client.report_rank)
        worker = _Worker(
            token=token,
            local_rank=local_rank,
            process=process,
            error_file=files.error_file,
            steps=steps,
            ward=ward,
        )
        with self._lock:
            self._workers[token] = worker
        self._client.worker_started(token, process.pid)
        return worker

    def _name(self, local_rank: int) -> str:
        group = f" of group {self._place.group}" if self._place.group else ""
        return f"rank {self._place.ranks.base_rank + local_rank}{group}"

    def _never_began(self, local_rank: int, why: str) -> None:
        status = ExitStatus()
        place = self._place
        failure = Failure(
            group=place.group,
            rank=place.ranks.base_rank + local_rank,
            local_rank=local_rank,
            pid=0,
            status=status,
            at=time.time(),
            detail=why,
        )
        gone = WorkerGone(group=place.group, attempt=place.attempt, local_rank=local_rank, detail=why)
        self._around.on_gone(gone, failure)

    # ---- ending, on the threads that watch

    def _on_death(self, worker: _Worker, death: WorkerDeath) -> None:
        status = dying_status(worker.process.pid)
        self._client.worker_ended(worker.token, status.describe(), is_clean=status.is_clean)
        worker.died_at = time.time() - (time.monotonic() - death.at)

    def _on_exit(self, worker: _Worker, status: ExitStatus) -> None:
        place = self._place
        worker.ward.let_go()
        with self._lock:
            del self._workers[worker.token]
        failure = None
        if not status.is_clean:
            failure = Failure(
                group=place.group,
                rank=place.ranks.base_rank + worker.local_rank,
                local_rank=worker.local_rank,
                pid=worker.process.pid,
                status=status,
                at=worker.died_at or time.time(),
                error_file=worker.error_file,
                was_told=worker.was_told,
            )
        steps, reached = _steps_in(worker.steps)
        gone = WorkerGone(
            group=place.group,
            attempt=place.attempt,
            local_rank=worker.local_rank,
            code=status.code,
            signal=status.signal,
            steps=steps,
            reached=reached,
            detail=status.describe(),
        )
        self._around.on_gone(gone, failure)


def dying_status(pid: int) -> ExitStatus:
    """What a process that is ending will be reaped with, as far as the system shows it already."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            status = int(file.read().rpartition(")")[2].split()[EXIT_CODE_FIELD])
    except (OSError, ValueError, IndexError):
        return ExitStatus()
    number = status & 0x7F
    return ExitStatus(signal=number) if number else ExitStatus(code=status >> 8)


def _steps_in(path: Path) -> tuple[int, int]:
    """What the worker's Manager has written; and the file is gone."""
    try:
        steps, reached = STEPS.unpack(path.read_bytes())
        path.unlink()
        return steps, reached
    except (OSError, struct.error):
        return 0, 0
