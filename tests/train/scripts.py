"""Training scripts that tests run in processes of their own, with faults at exact points of a step.

A child is forked from a server that has imported torch and Everstep, runs `train`, and reports through its pipe.
"""

import contextlib
import ctypes
import dataclasses
import logging
import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

import everstep as es
from everstep.collectives.process_group import Membership, ReconfigurableProcessGroup, ReduceOp, Work
from everstep.core.moves import CollectiveFailed
from everstep.core.types import QuorumId
from everstep.errors import GroupDrained, StepInterrupted
from everstep.train.presence import Presence
from tests.train.namespaces import enter
from tests.train.recording import Commits, HistoryFile, RecordingSampler, digest_of
from tests.train.task import LEARNING_RATE, MOMENTUM, loss_of, make_dataset, make_net

HOLD_DEADLINE_S = 30.0
BULK_PART = 1 << 20  # elements that are compared at a time
BULK_CHANGES_MAX = 256 << 20  # more takes too long in every step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a worker does beside training. `at_step` counts the steps that are being made, from 1."""

    group: int
    groups: int
    lighthouse: str
    seed: int = 0
    at_step: int = 0
    after_steps: int = 0  # instead of at_step: counted from this process's first step
    die_in: str = ""  # fetch, apply, forward, backward, reduction, before_step, vote, voted, optimizer, updated
    at_configure: int = 0  # die instead in its nth group: rebuild (before it is built), rebuilt, offer, meet, rereduce
    signal: int = signal.SIGKILL  # that it sends itself there, once
    object_at_step: int = 0  # report_error in this one
    hold_at_step: int = 0  # in before_step, until the test says go
    lose_vote_at_step: int = 0  # the result of this vote never reaches the training thread
    lose_reduction_at_step: int = 0
    fail_at_step: int = 0  # report a failed collective between backward and step, though nobody died
    stall_at_step: int = 0  # stand still in its forward pass, once
    stall_s: float = 0.0
    stall_holds_gil: bool = False  # as a C extension that never lets go of it: the link thread stands still as well
    stall_section: str = ""
    change_by_hand: bool = False  # clip between backward and step instead of in before_step
    workers: int = 0  # of the DataLoader
    batch_size: int = 4
    width: int = 16
    rank: int = 0  # within the replica group
    ranks: int = 1
    leader: str = ""  # where rank 0 listens
    name: str = ""  # replica_group_id; the group's number by default
    init_sync: bool = True
    namespace: str = ""  # file of the network namespace to live in
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # of the Manager
    number: int = 0  # of this start, over the whole job
    history: str = ""  # file that gets everything that is reported
    pace_s: float = 0.0  # that a forward pass takes at least
    agent_token: str = ""  # EVERSTEP_WORKER
    ballast_bytes: int = 0  # of memory that the process holds, in pages of its own
    state_bytes: int = 0  # of live state beside the model, each group's its own to begin with
    forward_file: str = ""  # where the ranks of this start meet for a collective in every forward pass
    is_rich: bool = False  # train what takes every path of the reductions

    @property
    def net_seed(self) -> int:
        return self.seed + self.group + 1000 * self.rank


class FaultyGroup(ReconfigurableProcessGroup):
    """Delegates to the real group, and strikes at an operation."""

    def __init__(self, inner: ReconfigurableProcessGroup, worker: "Worker") -> None:
        self._inner = inner
        self._worker = worker
        self._configured = 0
        self.aborted = threading.Event()

    def configure(self, membership: Membership) -> None:
        self.aborted.clear()
        self._configured += 1
        self._strike("rebuild")
        self._inner.configure(membership)
        self._strike("rebuilt")

    def _strike(self, point: str) -> None:
        if self._worker.plan.die_in == point and self._configured == self._worker.plan.at_configure:
            os.kill(os.getpid(), signal.SIGKILL)

    def abort(self, up_to: QuorumId) -> None:
        self._inner.abort(up_to)
        self.aborted.set()

    def release_previous(self) -> None:
        self._strike("offer")
        self._inner.release_previous()

    def allreduce(self, tensor: torch.Tensor, op: ReduceOp = ReduceOp.SUM) -> Work:
        worker = self._worker
        is_vote = op is ReduceOp.MIN
        if is_vote:
            worker.strike("vote")
        work = self._inner.allreduce(tensor, op)
        if not is_vote:
            self._strike("rereduce")
        lost_at = worker.plan.lose_vote_at_step if is_vote else worker.plan.lose_reduction_at_step
        if worker.step == lost_at and not worker.has_lost:
            worker.has_lost = True
            return LostWork(work, self)
        worker.strike("voted" if is_vote else "reduction")
        return work

    def allgather(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._inner.allgather(tensor)

    def meet(self, *, is_patient: bool) -> None:
        self._strike("meet")
        self._inner.meet(is_patient=is_patient)

    @property
    def quorum_id(self) -> QuorumId | None:
        return self._inner.quorum_id

    @property
    def rank(self) -> int:
        return self._inner.rank

    @property
    def size(self) -> int:
        return self._inner.size

    def close(self) -> None:
        self._inner.close()


class LostWork:
    """Takes part in the operation, but its end is never seen here: the freeze comes first."""

    def __init__(self, work: Work, group: FaultyGroup) -> None:
        self._work = work
        self._group = group

    def wait(self) -> None:
        self._work.wait()
        if not self._group.aborted.wait(HOLD_DEADLINE_S):
            raise TimeoutError("nobody froze this member")
        raise StepInterrupted("the result was lost")

    def is_completed(self) -> bool:
        return False


class StrikingSGD(torch.optim.SGD):
    worker: "Worker"

    def step(self, closure: Any = None) -> Any:
        self.worker.strike("optimizer")
        result = super().step(closure)
        self.worker.strike("updated")
        return result


class StrikingState:
    """Part of the live state: a process that has made no step yet is asked for it when it fetches."""

    def __init__(self, worker: "Worker") -> None:
        self._worker = worker

    def state_dict(self) -> dict[str, object]:
        self._worker.strike("fetch")
        return {}

    def load_state_dict(self, _state: dict[str, object]) -> None:
        self._worker.strike("apply")


class BulkState:
    """Live state of any size that every forward pass changes, all of it; tells what was loaded."""

    def __init__(self, worker: "Worker") -> None:
        self._report = worker.report
        self.content = torch.arange(worker.plan.state_bytes // 8).mul_(2 * worker.plan.group + 1)

    def advance(self) -> None:
        if self.content.nbytes <= BULK_CHANGES_MAX:
            self.content.add_(1)

    def state_dict(self) -> dict[str, object]:
        return {"content": self.content}

    def load_state_dict(self, state: dict[str, object]) -> None:
        content = state["content"]
        assert isinstance(content, torch.Tensor)
        self.content.copy_(content)
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        self._report({"event": "bulk", "is_from": self._is_from(), "peak_bytes": peak_bytes})

    def _is_from(self) -> int | None:
        """The group that made it; None if it was not whole at any one instant."""
        first, second = int(self.content[0]), int(self.content[1])
        for at in range(0, len(self.content), BULK_PART):
            part = self.content[at : at + BULK_PART]
            if not torch.equal(part, torch.arange(at, at + len(part)).mul_(second - first).add_(first)):
                return None
        return (second - first) // 2


class Reports(logging.Handler):
    """Sends Everstep's log lines to the test, without their `[job group/rank - step]`."""

    def __init__(self, report: Callable[[dict[str, Any]], None]) -> None:
        super().__init__()
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()  # the link's lines have no such beginning
        self._report({"event": "log", "text": text.partition("] ")[2] or text, "at": time.monotonic()})


class Worker:
    """One replica group."""

    def __init__(self, plan: Plan, pipe: Connection) -> None:
        self.plan = plan
        self.pipe = pipe
        self.step = 0  # that is being made
        self.first_step = 0
        self.stop_step = 1 << 60
        self.history = HistoryFile(Path(plan.history)) if plan.history else None
        self.has_struck = False
        self.has_objected = False
        self.has_failed = False
        self.has_lost = False
        self.has_held = False
        self.has_stalled = False
        self.manager: es.Manager | None = None

    def report(self, record: dict[str, Any]) -> None:
        """Into the history first: what the test hears of must be there."""
        if self.history is not None:
            self.history.write(record)
        self.pipe.send(record)

    def _before_forward(self) -> None:
        if self.plan.forward_file:  # as that of FSDP, it needs the other ranks
            if not dist.is_initialized():
                meeting = f"file://{self.plan.forward_file}"
                dist.init_process_group("gloo", meeting, rank=self.plan.rank, world_size=self.plan.ranks)
            dist.all_reduce(torch.zeros(1))
        if self.step != self.plan.stall_at_step or self.has_stalled:
            return
        self.has_stalled = True
        self.pipe.send({"event": "holding"})
        assert self.manager is not None
        with self.manager.section(self.plan.stall_section) if self.plan.stall_section else contextlib.nullcontext():
            if self.plan.stall_holds_gil:
                ctypes.PyDLL(None).usleep(int(self.plan.stall_s * 1e6))
            else:
                threading.Event().wait(self.plan.stall_s)

    def strike(self, point: str) -> None:
        at_step = self.plan.at_step or self.first_step + self.plan.after_steps
        if self.plan.die_in == point and self.step == at_step and not self.has_struck:
            self.has_struck = True
            self.pipe.send({"event": "holding"})
            os.kill(os.getpid(), self.plan.signal)

    def run(self) -> None:
        torch.set_num_threads(1)
        os.environ["EVERSTEP_GROUP_LEADER"] = self.plan.leader
        os.environ["EVERSTEP_WORKER"] = self.plan.agent_token
        self.ballast = torch.ones(self.plan.ballast_bytes, dtype=torch.uint8)
        logging.getLogger("everstep").addHandler(Reports(self.report))
        logging.getLogger("everstep").setLevel(logging.INFO)
        net = make_net(self.plan.width, self.plan.is_rich, self.plan.net_seed)
        inner = StrikingSGD(net.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
        inner.worker = self
        dataset = make_dataset()
        start = {"event": "start", "group": self.plan.name or str(self.plan.group), "number": self.plan.number}
        self.report({**start, "net_seed": self.plan.net_seed, "initial": digest_of(net, inner)})
        with es.Manager(
            lighthouse=self.plan.lighthouse,
            replica_group_id=self.plan.name or str(self.plan.group),
            replica_groups=self.plan.groups,
            init_sync=self.plan.init_sync,
            group_rank=self.plan.rank,
            group_size=self.plan.ranks,
            **self.plan.options,
        ) as manager:
            self.manager = manager
            presence = manager._presence
            assert presence is not None
            presence.group = FaultyGroup(presence.group, self)
            model = es.DistributedDataParallel(manager, net)
            commits = Commits(manager)
            optimizer = es.Optimizer(manager, inner, before_step=lambda: self._before_step(commits))
            sampler = RecordingSampler(manager, dataset, batch_size=self.plan.batch_size, report=self.report)
            # Forked, as a script's are on Linux: a child of a forkserver would start a forkserver of its own for them.
            context = "fork" if self.plan.workers else None
            loader = DataLoader(
                dataset, batch_sampler=sampler, num_workers=self.plan.workers, multiprocessing_context=context
            )
            manager.register("striking", StrikingState(self))
            bulk = BulkState(self)
            if self.plan.state_bytes:
                manager.register("bulk", bulk)
            next(net.children()).register_forward_hook(lambda *_: self.strike("forward"))
            next(net.parameters()).register_hook(lambda _: self.strike("backward"))  # type: ignore[no-untyped-call]
            for epoch in range(1 << 30):
                sampler.set_epoch(epoch)
                for x, y, ids in sampler.batches(loader):
                    self.step = manager.current_step() + 1
                    self.first_step = self.first_step or self.step
                    optimizer.zero_grad()
                    self._before_forward()
                    bulk.advance()
                    if self.plan.pace_s:  # stands for an accelerator that is busy
                        threading.Event().wait(self.plan.pace_s)
                    loss = loss_of(model, x, y)
                    loss.backward()  # type: ignore[no-untyped-call]
                    mean = loss.detach().clone()
                    if self.plan.is_rich:
                        manager.allreduce(mean)
                    if self.plan.change_by_hand:
                        torch.nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
                        self._hold()
                    if self.step == self.plan.fail_at_step and not self.has_failed:
                        self.has_failed = True
                        self._report_failure(presence)
                    if self.step == self.plan.object_at_step and not self.has_objected:
                        self.has_objected = True
                        manager.report_error(ValueError("the test objects"))
                    drawn = {"ids": ids.tolist(), "positions": sampler.positions()}
                    result = optimizer.step()
                    self._report(result, {**drawn, "digest": digest_of(net, inner), "loss": mean.item()}, commits)
                    if result.step >= self.stop_step:
                        return

    def _before_step(self, commits: Commits) -> None:
        commits.note()
        self.strike("before_step")
        if not self.plan.change_by_hand:
            self._hold()

    def _hold(self) -> None:
        if self.step == self.plan.hold_at_step and not self.has_held:
            self.has_held = True
            self.pipe.send({"event": "holding"})
            if not self.pipe.poll(HOLD_DEADLINE_S):
                raise TimeoutError("the test never said go")
            self.pipe.recv()

    def _report_failure(self, presence: Presence) -> None:
        """As if a collective had failed; returns when the others are frozen too and the round is decided."""
        with presence.changed:
            before = presence.replica.quorum
            assert before is not None
            presence.feed(CollectiveFailed(before.id, None, "the test says so"))
            decided = presence.changed.wait_for(lambda: presence.replica.quorum != before, HOLD_DEADLINE_S)
            assert decided

    def _report(self, result: es.StepResult, found: dict[str, Any], commits: Commits) -> None:
        while self.pipe.poll():
            self.stop_step = self.pipe.recv()
        ended = {"event": "step", "step": result.step, "committed": result.committed, "why": result.why}
        lineage = commits.record(result.step) if result.committed else {}
        self.report({**ended, "participants": result.participants, **found, **lineage})


def train(plan: Plan, pipe: Connection) -> None:
    """A process's whole life."""
    if plan.namespace:
        enter(plan.namespace)
    try:
        Worker(plan, pipe).run()
    except es.EverstepError as error:
        pipe.send({"event": "error", "kind": type(error).__name__, "text": str(error)})
        if plan.ranks > 1:
            raise SystemExit(1) from error
        return
    except GroupDrained:
        pipe.send({"event": "done"})
        raise
    pipe.send({"event": "done"})
