"""The reference run: trains what a recorded job committed once more, without any fault, and notes what it came to.

    python -m tests.train.replay FOLDER

Each step is made by as many processes as the quorum that reduced it had members, in the same rank order, each on the
samples that its counterpart drew, through the product's own buckets, step journal and collectives. There is no
lighthouse, no vote, no failure and no recovery of state. Writes FOLDER/replay.jsonl for tests/checkers.
"""

import dataclasses
import itertools
import multiprocessing
import os
import sys
import time
from multiprocessing.connection import wait
from pathlib import Path

import torch
from torch.utils.data import default_collate

import everstep as es
from everstep.collectives.gloo import GlooProcessGroup
from everstep.collectives.process_group import Membership, ReconfigurableProcessGroup, ReduceOp
from everstep.collectives.step_journal import Reduction, StepJournal, TensorReduction
from everstep.collectives.store import HostedStore
from everstep.collectives.with_lane import ProcessGroupWithLane
from everstep.core.types import Lineage, LineageEntry, Member, MemberId, Quorum, genesis
from everstep.train.header import Contribution, HeaderCarrier, StepHeader
from tests.checkers.history import History, Record, draws_of, entries_of, entry_of, load, members_of
from tests.train.recording import HistoryFile, digest_of, lineage_text
from tests.train.scripts import Plan
from tests.train.task import LEARNING_RATE, MOMENTUM, loss_of, make_dataset, make_net

HOST = "127.0.0.1"
END_TIMEOUT_S = 600.0


@dataclasses.dataclass(frozen=True)
class Step:
    """A committed step: which quorum reduced it, and what its members drew, in rank order."""

    entry: LineageEntry
    quorum: Quorum
    draws: list[Record]


@dataclasses.dataclass(frozen=True)
class Course:
    """Everything that a job committed, from the founder's weights on."""

    history: str
    seed: int
    steps: list[Step]


def read_course(folder: Path) -> Course:
    """Raises StopIteration or KeyError where the recorded histories do not hold what they must."""
    histories = [load(path) for path in sorted((folder / "histories").glob("*.jsonl")) if path.stat().st_size]
    members, draws = members_of(histories), draws_of(histories)
    steps = []
    for record in entries_of(histories).values():
        entry = entry_of(record)
        names = members[record["quorum"]]
        quorum = Quorum(entry.quorum_id, tuple(Member(_member_id(name)) for name in names))
        steps.append(Step(entry, quorum, [draws[name, entry.step, entry.attempt] for name in names]))
    first = next(record for history in histories for record in history.committed)
    return Course(first["lineage"].partition(":")[0], _founders_seed(histories), steps)


def _member_id(name: str) -> MemberId:
    replica_id, _, incarnation = name.rpartition("#")
    return MemberId(replica_id, int(incarnation))


def _founders_seed(histories: list[History]) -> int:
    """The founder is the one of the first quorum that took over nobody's state."""
    for history in histories:
        logs = [line for line in history.logs if line.startswith(("settled", "recovered"))]
        if history.committed and history.committed[0]["step"] == 1 and "state_from" not in logs[0]:
            return int(history.of("start")[0]["net_seed"])
    raise AssertionError("no history of the founder")


class Conductor(es.Manager):
    """Stands where the Manager stands, and lets every reduction through: nothing fails here."""

    def __init__(self, group: ReconfigurableProcessGroup) -> None:
        super().__init__()
        self._group = group
        self._journal = StepJournal()
        self._header: StepHeader | None = None
        self._step: Step | None = None

    def begin(self, step: Step) -> None:
        self._step = step
        self._header = None

    def start_step(self) -> None:
        pass

    def reduce(self, reduction: Reduction) -> None:
        assert self._step is not None
        if self._header is None:
            self._header = StepHeader(Contribution(*self._step.draws[self._group.rank]["columns"]))
            if not (isinstance(reduction, HeaderCarrier) and reduction.carry(self._header)):
                self._journal.append(self._header)
        self._journal.append(reduction)
        self._journal.enter(self._step.quorum.id)
        self._journal.issue_pending(self._group, self._step.quorum)

    def complete_reductions(self) -> None:
        self._journal.wait()

    def end(self) -> LineageEntry:
        """What the lineage says of this step, by what was reduced here."""
        assert self._step is not None
        assert self._header is not None
        recorded = self._step.entry
        entry = LineageEntry(
            step=recorded.step,
            attempt=recorded.attempt,
            quorum_id=recorded.quorum_id,
            contributors=len(self._header.contributions),
            samples=self._header.digest(len(self._journal)),
        )
        for reducer in self._reducers:
            reducer.step_decided(True)
        self._journal.clear()
        return entry


class Rank:
    """One process of the reference run. It takes part in the quorums that have a member of its rank."""

    def __init__(self, rank: int, course: Course, plan: Plan) -> None:
        self._rank = rank
        self._course = course
        self._net = make_net(plan.width, True, course.seed)
        self._optimizer = torch.optim.SGD(self._net.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
        self._dataset = make_dataset()
        self._is_current = True
        self._lineage: Lineage = genesis(course.history)

    def run(self, store: str, output: HistoryFile | None) -> None:
        with ProcessGroupWithLane(GlooProcessGroup(bind_host=HOST, threads=2), HOST) as group:
            conductor = Conductor(group)
            model = es.DistributedDataParallel(conductor, self._net)
            for quorum, steps in itertools.groupby(self._course.steps, key=lambda step: step.quorum):
                if self._rank >= len(quorum.members):
                    self._is_current = False
                    continue
                self._enter(group, quorum, store)
                for step in steps:
                    record = self._make(step, conductor, model)
                    if output is not None:
                        output.write(record)

    def _enter(self, group: ReconfigurableProcessGroup, quorum: Quorum, store: str) -> None:
        size = len(quorum.members)
        group.configure(Membership(quorum_id=quorum.id, rank=self._rank, size=size, store=store))
        if quorum != self._course.steps[0].quorum:
            tensors = self._state()
            rows = group.allgather(torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in tensors]))
            if not self._is_current:
                for tensor, part in zip(tensors, torch.split(rows[0], [t.nbytes for t in tensors]), strict=True):
                    tensor.copy_(part.clone().view(tensor.dtype).view(tensor.shape))
        self._is_current = True
        group.release_previous()

    def _state(self) -> list[torch.Tensor]:
        parameters = list(self._net.parameters())
        for parameter in parameters:
            self._optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
        momenta = [self._optimizer.state[parameter]["momentum_buffer"] for parameter in parameters]
        return [tensor.detach() for tensor in [*self._net.state_dict().values(), *momenta]]

    def _make(self, step: Step, conductor: Conductor, model: es.DistributedDataParallel) -> Record:
        conductor.begin(step)
        self._optimizer.zero_grad()
        x, y, _ = default_collate([self._dataset[i] for i in step.draws[self._rank]["ids"]])
        loss = loss_of(model, x, y)
        loss.backward()  # type: ignore[no-untyped-call]
        mean = loss.detach().clone()
        conductor.reduce(TensorReduction(mean, ReduceOp.SUM, is_average=True))
        conductor.complete_reductions()
        entry = conductor.end()
        self._optimizer.step()
        record = {"step": entry.step, "digest": digest_of(self._net, self._optimizer), "loss": mean.item()}
        if self._rank == 0:  # which has a part in every quorum
            self._lineage = self._lineage.extended(entry)
            record["lineage"] = lineage_text(self._lineage)
        return record


def run_rank(rank: int, folder: Path, store: str) -> None:
    """A process's whole life."""
    torch.set_num_threads(1)
    course = read_course(folder)
    output = HistoryFile(folder / "replay.jsonl") if rank == 0 else None
    Rank(rank, course, Plan(group=0, groups=1, lighthouse="")).run(store, output)


def replay(folder: Path) -> int:
    """Returns how many steps were replayed."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    steps = read_course(folder).steps
    (folder / "replay.jsonl").unlink(missing_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.train.preloaded"])
    with HostedStore(HOST) as store:
        ranks = range(max(len(step.quorum.members) for step in steps))
        processes = [context.Process(target=run_rank, args=(rank, folder, store.address)) for rank in ranks]
        try:
            for process in processes:
                process.start()
            deadline = time.monotonic() + END_TIMEOUT_S
            while all(p.exitcode in (None, 0) for p in processes) and time.monotonic() < deadline:
                alive = [process.sentinel for process in processes if process.exitcode is None]
                if not alive:
                    break
                wait(alive, deadline - time.monotonic())
        finally:
            for process in processes:
                process.kill()
                process.join()
    assert [process.exitcode for process in processes] == [0] * len(processes), "the reference run failed"
    return len(steps)


if __name__ == "__main__":
    print(f"{replay(Path(sys.argv[1]))} steps replayed")
