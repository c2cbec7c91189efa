"""The Manager: this replica group's part in the job, as a training script sees it."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from everstep.collectives.process_group import ReduceOp
from everstep.collectives.step_journal import Reduction, TensorReduction
from everstep.config import ManagerSettings, check_count, manager_settings
from everstep.core.moves import ReplicaConfig
from everstep.errors import ConfigError
from everstep.recovery import RecoveryTransport
from everstep.train.drain import DrainOnSigterm
from everstep.train.group_presence import make_presence
from everstep.train.header import Contribution
from everstep.train.parts import Reducer, SampleSource
from everstep.train.presence import Presence, new_nonce
from everstep.train.recovering import LiveState, Recovery, Stateful
from everstep.train.stepper import Decision, Stepper


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What `step()` came to; true when the step committed, which is so on every member or on none.

    `step` counts committed steps; `participants` put gradients in; `why` says why it did not commit; `loss` is what a
    closure returned.
    """

    committed: bool
    step: int
    participants: int
    why: str = ""
    loss: Any = None

    def __bool__(self) -> bool:
        return self.committed


class Manager:
    """One a process. `with es.Manager() as manager:` joins the job and leaves it; nothing happens before.

    Arguments win over the environment (EVERSTEP_LIGHTHOUSE, EVERSTEP_JOB_ID, EVERSTEP_TOKEN_FILE, REPLICA_GROUP_ID,
    NUM_REPLICA_GROUPS). Without a lighthouse the script trains alone, with no network.

    - `min_replicas`: with fewer replica groups no step commits; it waits, and says so.
    - `init_sync`: all but one group of a new job take over that one's initial weights before step 1.
    - `group_rank`, `group_size`: this process among the ranks of its group; by default torchrun's RANK and WORLD_SIZE.
      All ranks make the same steps, and all of a group's agree on each (docs/groups.md).
    - `host`: the local address for the other groups; by default the one on the way to the lighthouse.
    - `proactive_recovery` (EVERSTEP_PROACTIVE_RECOVERY, on): a notice of a peer's failure ends this member's
      collectives at once. Off: they must fail by themselves, within `collective_timeout_s`.
    - `backend`: "gloo" for tensors on the CPU; "nccl" for those on this process's current GPU as well.
    - `recovery_transport`: "http", "process_group", or your own (docs/recovery.md); the same in all groups.
    - `drain_on_sigterm`: SIGTERM asks to leave at a step boundary, as `drain()` does; a second one ends the process.
      Only where the script has no handler of its own, and only from the main thread.
    - `drain_grace_s`: how long a leaver waits for somebody to take its place before it leaves as it is.

    All methods belong to the training thread, but for `report_error` and `drain`. Raises ConfigError,
    LighthouseUnreachable and LighthouseRefused when it starts, or at the next step when it happens later.
    """

    def __init__(
        self,
        *,
        lighthouse: str | None = None,
        job_id: str | None = None,
        token_file: str | Path | None = None,
        replica_group_id: str | int | None = None,
        replica_groups: int | None = None,
        min_replicas: int = 1,
        init_sync: bool = True,
        host: str | None = None,
        connect_timeout_s: float = 30.0,
        collective_timeout_s: float = 300.0,
        proactive_recovery: bool | None = None,
        backend: str = "gloo",
        recovery_transport: str | RecoveryTransport = "http",
        drain_on_sigterm: bool = True,
        drain_grace_s: float = 20.0,
        group_rank: int | None = None,
        group_size: int | None = None,
    ) -> None:
        self._arguments: dict[str, Any] = {
            "lighthouse": lighthouse,
            "job_id": job_id,
            "token_file": token_file,
            "replica_group_id": replica_group_id,
            "replica_groups": replica_groups,
            "min_replicas": min_replicas,
            "connect_timeout_s": connect_timeout_s,
            "collective_timeout_s": collective_timeout_s,
            "proactive_recovery": proactive_recovery,
            "backend": backend,
            "recovery_transport": recovery_transport,
            "drain_grace_s": drain_grace_s,
            "group_rank": group_rank,
            "group_size": group_size,
        }
        self._drain_grace_s = drain_grace_s
        self.backend = backend
        self._sigterm = DrainOnSigterm(self.drain) if drain_on_sigterm else None
        self._init_sync = init_sync
        self._host = host
        self._state = LiveState()
        self._reducers: list[Reducer] = []
        self._samples: SampleSource | None = None
        self._presence: Presence | None = None
        self._stepper: Stepper | None = None
        self._start_step = 0
        self._batches_committed = 0
        self._error: Exception | None = None
        self._state.register("everstep", self._save_own, self._load_own)

    # ---- life

    def start(self) -> "Manager":
        """Connect to the lighthouse: what `with` does. Blocks until it has accepted this process.

        The group joins at its first step; what it may be refused for then shows there.
        """
        if self._presence is not None:
            raise ConfigError("the Manager is started already")
        settings: ManagerSettings = manager_settings(**self._arguments)
        config = ReplicaConfig(
            replica_id=settings.replica_group_id,
            nonce=new_nonce(),
            expected_replicas=settings.replica_groups,
            min_replicas=settings.min_replicas,
            init_sync=self._init_sync,
            start_step=self._start_step,
            freezes_on_notice=settings.proactive_recovery,
            collective_timeout_s=settings.collective_timeout_s,
        )
        presence = make_presence(settings, config, self._host)
        presence.__enter__()
        self._presence = presence
        self._stepper = Stepper(presence, Recovery(presence, self._state), self._contribution)
        if self._sigterm is not None:
            self._sigterm.install()
        return self

    def shutdown(self) -> None:
        """Leave the job on purpose. The others go on; nobody sees a failure."""
        self._end(None, None, None)

    def __enter__(self) -> "Manager":
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(kind, error, trace)

    def _end(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._sigterm is not None:
            self._sigterm.remove()  # it asks the presence
        presence, self._presence = self._presence, None
        if presence is not None:
            presence.__exit__(kind, error, trace)

    def drain(self) -> None:
        """Ask to leave at a step boundary; any thread. The next step after that raises GroupDrained, a SystemExit(0).

        No step fails anywhere. The only holder of the state stays until another has it, or `drain_grace_s` passed.
        """
        self._here().ask_to_leave(self._drain_grace_s)

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        """While it is open this group may keep the others waiting as long as it likes: validation, checkpoints.

        Otherwise a group that all others wait for is evicted after a limit learned from the job's steps. The rank
        monitor of `everstep run` has a learned limit for each section all the same, of 300 s at least (docs/hangs.md).
        """
        replica = self._here().replica
        with self._here().phases.section(name):
            replica.open_section(name)
            try:
                yield
            finally:
                replica.close_section(time.monotonic())

    # ---- what a joiner copies

    def register(self, name: str, stateful: Stateful) -> None:
        """Let joiners recover this object's state_dict too. Same names, in every replica group."""
        self._state.register(name, stateful.state_dict, stateful.load_state_dict)

    def register_state_dict_fn(
        self, key: str, load_state_dict: Callable[[Any], object], state_dict: Callable[[], Mapping[str, object]]
    ) -> None:
        self._state.register(key, state_dict, load_state_dict)

    def state_dict(self) -> dict[str, int]:
        """For a checkpoint on disk, beside the model's and the optimizer's."""
        return {"step": self.current_step(), "batches_committed": self._batches_committed}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Continue from a checkpoint: before the manager starts."""
        if self._presence is not None:
            raise ConfigError("load the manager's state before it starts: it tells the lighthouse its step then")
        check_count("step", state_dict["step"], 0, 1 << 48)
        self._start_step = state_dict["step"]
        self._batches_committed = state_dict["batches_committed"]

    # ---- questions

    def current_step(self) -> int:
        """Committed steps."""
        if self._presence is None:
            return self._start_step
        with self._presence.changed:
            return max(self._presence.replica.step, 0)

    def batches_committed(self) -> int:
        """Batches in committed steps, over all participants."""
        return self._batches_committed

    def num_participants(self) -> int:
        """Replica groups in the quorum that contribute."""
        presence = self._here()
        with presence.changed:
            quorum = presence.replica.quorum
            return len(quorum.members) if quorum is not None else 0

    def participating_rank(self) -> int | None:
        """This group's rank among them; None while it is not one of them."""
        presence = self._here()
        with presence.changed:
            return presence.replica.rank if presence.replica.is_settled else None

    def is_participating(self) -> bool:
        return self.participating_rank() is not None

    def has_been_drained(self) -> bool:
        """It was asked to leave and has left the quorum: end the loop."""
        presence = self._here()
        with presence.changed:
            return presence.replica.has_left

    def errored(self) -> Exception | None:
        """What `report_error` latched for the step under way."""
        return self._error

    def report_error(self, error: Exception) -> None:
        """Vote no on the step under way: it is aborted on every member. Any thread; the first error counts."""
        if self._error is None:
            self._error = error

    # ---- a step

    def start_step(self) -> None:
        """Be a settled member with the current state; joins, recovers and waits as needed. Cheap within a step."""
        self._steps().begin()

    def allreduce(self, tensor: torch.Tensor, op: str = "avg") -> "AllReduce":
        """Reduce a tensor of the script's own over the participants, in place, as part of the step.

        `op`: "avg", "sum", "min" or "max". A failure may repeat the reduction; the content is final once step() says
        that it committed.
        """
        if op not in _REDUCE_OPS:
            raise ConfigError(f"op={op!r} is no reduction; use one of {', '.join(_REDUCE_OPS)}")
        reduction = TensorReduction(tensor, _REDUCE_OPS[op], is_average=op == "avg")
        self.reduce(reduction)
        return AllReduce(self._steps(), reduction)

    def should_commit(self) -> bool:
        """Vote on the step without an Optimizer wrapper: step your optimizer only if it returns True."""
        return self.decide().committed

    def decide(self, before_step: Callable[[], object] | None = None, objection: str = "") -> Decision:
        """End the step: vote, survive what happens, and return what every member returns."""
        for reducer in self._reducers:
            reducer.flush()

        def before_vote() -> str:
            return self._before_vote(before_step)

        decision = self._steps().decide(before_vote, objection, together=before_step is not None)
        if decision.committed:
            self._batches_committed += decision.participants
        else:
            self._here().log.warning("step %d not committed: %s", decision.step + 1, decision.why)
        for reducer in self._reducers:
            reducer.step_decided(decision.committed)
        if self._samples is not None:
            self._samples.step_decided(decision)
        self._error = None
        return decision

    def skip_open_step(self) -> None:
        """A new step begins though the last one was reduced and never decided (a GradScaler skipped it): vote no."""
        if self._stepper is not None and self._stepper.is_open:
            self.decide(objection="this step was skipped: a GradScaler found infinities, or step() was never called")

    def _before_vote(self, before_step: Callable[[], object] | None) -> str:
        objection = next(filter(None, (reducer.objection() for reducer in self._reducers)), "")
        if before_step is not None and (not objection or self._here().group_size > 1):
            before_step()  # in a group of several ranks whatever this one objects to: the others are in it
        if objection:
            return objection
        for reducer in self._reducers:
            reducer.settle()
        if self._error is not None:
            return f"{type(self._error).__name__}: {self._error}"
        if self._samples is not None:
            return self._samples.check(self._steps().contributions)
        return ""

    # ---- for DistributedDataParallel, Optimizer and DistributedSampler

    def add_reducer(self, reducer: Reducer) -> None:
        self._reducers.append(reducer)

    def set_samples(self, samples: SampleSource) -> None:
        if self._samples is not None:
            raise ConfigError("this manager has a DistributedSampler already")
        self._samples = samples

    def reduce(self, reduction: Reduction) -> None:
        self._steps().append(reduction)

    def complete_reductions(self) -> None:
        self._steps().complete()

    def members(self) -> tuple[tuple[str, ...], str]:
        """Whom samples are shared out among, in rank order, and this group among them, as `replica#incarnation`.

        Within a step they are those that it was begun with, on every rank, whoever has died since.
        """
        begun = self._steps().drawn_among()
        return tuple(map(str, begun.members)), str(begun.member)

    def group_place(self) -> tuple[int, int]:
        """This rank within its replica group, and how many there are."""
        presence = self._here()
        return presence.group_rank, presence.group_size

    def lineage(self) -> str:
        """History, step and digest: equal on members with equal weights."""
        presence = self._here()
        with presence.changed:
            return str(presence.replica.lineage)

    def _contribution(self) -> Contribution:
        return self._samples.contribution() if self._samples is not None else Contribution()

    def _save_own(self) -> dict[str, object]:
        return {"batches_committed": self._batches_committed}

    def _load_own(self, state: dict[str, object]) -> None:
        batches = state["batches_committed"]
        assert isinstance(batches, int)
        self._batches_committed = batches

    def _here(self) -> Presence:
        if self._presence is None:
            raise ConfigError("the Manager is not started: use `with es.Manager() as manager:`, or call start()")
        return self._presence

    def _steps(self) -> Stepper:
        self._here()
        assert self._stepper is not None
        return self._stepper


class AllReduce:
    """A script's own reduction under way."""

    def __init__(self, stepper: Stepper, reduction: TensorReduction) -> None:
        self._stepper = stepper
        self._reduction = reduction

    def wait(self) -> None:
        """Block until the tensor holds the result, or the step is aborted (then step() says so)."""
        self._stepper.wait_for(self._reduction)


_REDUCE_OPS = {"avg": ReduceOp.SUM, "sum": ReduceOp.SUM, "min": ReduceOp.MIN, "max": ReduceOp.MAX}
