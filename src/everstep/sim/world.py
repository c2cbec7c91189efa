"""One schedule: parties, faults drawn from the seed, then peace, then the question whether all go on."""

import dataclasses
import random
from collections.abc import Callable

from everstep.core.lighthouse import JobConfig
from everstep.core.messages import Log
from everstep.core.moves import ReplicaConfig
from everstep.core.types import LocalProtocolError, MemberId, QuorumId, natural_key
from everstep.sim.checkers import Checkers, Violation, Weights
from everstep.sim.lighthouse_node import LighthouseNode
from everstep.sim.network import Channel, Clock, Collectives, Delays
from everstep.sim.process import Process

EVENTS_MAX = 300_000
HEAL_LIMIT_S = 60.0  # I7: virtual time after the last fault within which all must go on together


@dataclasses.dataclass(frozen=True, kw_only=True)
class Faults:
    """How many of each fault a schedule has at most; the seed draws instants and victims."""

    kill: int = 0
    kill_twice: int = 0  # two groups within 2 ms
    link: int = 0
    stall: int = 0  # a link delivers nothing for longer than the heartbeat timeout: false suspicion
    stop: int = 0  # a process is stopped and continued
    lighthouse: int = 0
    veto: int = 0
    error: int = 0  # a collective fails though nobody died
    drain: int = 0
    join: int = 0

    @staticmethod
    def drawn(rng: random.Random) -> "Faults":
        """The mix of everything that `--seed` runs."""
        return Faults(
            kill=rng.choice((0, 1, 1, 2, 3)),
            kill_twice=rng.choice((0, 0, 1)),
            link=rng.choice((0, 1, 2)),
            stall=rng.choice((0, 0, 1)),
            stop=rng.choice((0, 0, 1)),
            lighthouse=rng.choice((0, 0, 1, 2)),
            veto=rng.choice((0, 1, 2)),
            error=rng.choice((0, 1, 2)),
            drain=rng.choice((0, 0, 0, 1)),
            join=rng.choice((0, 0, 1)),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a schedule came to. `verdict` is "ok", "lost" (nobody alive held the state), or the violation."""

    verdict: str
    seed: int
    virtual_s: float
    events: int
    messages: int
    steps: int
    faults: tuple[str, ...]
    quorum: str

    @property
    def is_ok(self) -> bool:
        return self.verdict in ("ok", "lost")

    def __str__(self) -> str:
        done = ",".join(self.faults) or "none"
        return (
            f"seed {self.seed}: {self.verdict}; {self.steps} steps committed, quorum {self.quorum}, faults: {done}; "
            f"{self.virtual_s:.2f} s virtual, {self.events} events, {self.messages} messages"
        )


class World:
    """Everything that one seed determines. Nothing in it depends on real time or hash order."""

    def __init__(
        self, seed: int, *, groups: int, steps: int, faults: Faults | None = None, config: JobConfig | None = None
    ) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.clock = Clock()
        self.delays = Delays()
        self.collectives = Collectives(self.clock, self.rng, self.delays)
        self.checkers = Checkers()
        self.groups = groups
        self.steps = steps
        self.faults = faults if faults is not None else Faults.drawn(self.rng)
        self.config = config or JobConfig(job_id="sim", lighthouse=f"lh{seed}", history=f"h{seed}", join_timeout_s=1.0)
        self.lighthouse = LighthouseNode(self, self.config)
        self.processes: dict[str, Process] = {}  # the newest process of each replica_id
        self.messages = 0
        self.trace: Callable[[str], None] | None = None
        self._links = 0
        self._starts = 0
        self._quorums: dict[str, dict[QuorumId, MemberId]] = {}
        self._by_member: dict[MemberId, Process] = {}
        self._vetoes = 0
        self._done: list[str] = []
        self._goal = steps
        self._draining: dict[str, None] = {}

    # ---- services for the parties

    @property
    def now(self) -> float:
        return self.clock.now

    def at(self, when: float, call: Callable[[], None]) -> None:
        self.clock.at(when, call)

    def after(self, delay: float, call: Callable[[], None]) -> None:
        self.clock.after(delay, call)

    def after_delay(self, kind: str, call: Callable[[], None]) -> None:
        self.clock.after(self.draw(kind), call)

    def draw(self, kind: str) -> float:
        low, high = getattr(self.delays, kind)
        return self.rng.uniform(low, high)

    def new_link(self) -> int:
        self._links += 1
        return self._links

    def new_channel(self) -> Channel:
        return Channel(self.clock, self.rng, self.delays.message)

    def count_message(self) -> None:
        self.messages += 1

    def log(self, who: str, log: Log) -> None:
        if self.trace is not None:
            fields = " ".join(f"{k}={v}" for k, v in log.fields.items())
            self.trace(f"{self.now:9.4f} {who:10s} {log.event}: {fields}")

    def joined(self, name: str, quorum_id: QuorumId, member: MemberId) -> None:
        self._quorums.setdefault(name, {})[quorum_id] = member
        self._by_member[member] = next(p for p in self.processes.values() if p.name == name)

    def leave_quorums(self, name: str, up_to: QuorumId | None) -> None:
        """The process severs its collectives of every quorum up to this one, or died (None)."""
        joined = self._quorums.get(name, {})
        for quorum_id in [q for q in joined if up_to is None or q <= up_to]:
            self.collectives.leave(quorum_id, joined.pop(quorum_id))

    def process_of(self, member: MemberId) -> Process | None:
        return self._by_member.get(member)

    def wants_veto(self) -> bool:
        if self._vetoes > 0 and self.rng.random() < 0.1:
            self._vetoes -= 1
            self._done.append("veto")
            return True
        return False

    def left(self, process: Process) -> None:
        """It keeps its last group open for the others' sake, for a while or not at all, and exits."""
        self._draining.pop(process.replica.config.replica_id, None)
        self.after(self.rng.choice((0.0, 0.5)), process.kill)

    # ---- the schedule

    def start_process(self, replica_id: str) -> None:
        self._starts += 1
        name = f"{replica_id}@{self._starts}"
        config = ReplicaConfig(replica_id=replica_id, nonce=name, store=name, expected_replicas=self.groups)
        process = Process(self, name, config, Weights(value=self._starts))
        self.processes[replica_id] = process
        process.connect()

    def run(self) -> Outcome:
        verdict = "ok"
        try:
            self.lighthouse.start()
            for i in range(self.groups):
                self.after(self.rng.uniform(0, 0.05), lambda i=i: self.start_process(f"g{i}"))  # type: ignore[misc]
            self._run_until(lambda: self._highest() >= 1, 30.0)
            calm_at = self._schedule_faults()
            self._run_until(lambda: self.now >= calm_at, calm_at + 1.0)
            self._heal()
            verdict = self._check_progress()
        except (Violation, LocalProtocolError) as error:
            verdict = f"VIOLATION {type(error).__name__}: {error}"
        quorum = max((p.replica.quorum.id for p in self._living() if p.replica.quorum), default=QuorumId(0, 0))
        return Outcome(
            verdict=verdict,
            seed=self.seed,
            virtual_s=self.now,
            events=self.clock.events,
            messages=self.messages,
            steps=self._highest(),
            faults=tuple(self._done),
            quorum=str(quorum),
        )

    def _run_until(self, is_reached: Callable[[], bool], until: float) -> bool:
        while not is_reached():
            if self.clock.events > EVENTS_MAX:
                raise Violation(f"I7 livelock: more than {EVENTS_MAX} events by {self.now:.3f} s")
            if not self.clock.step(until):
                return is_reached()
        return True

    def _living(self) -> list[Process]:
        return [p for p in self.processes.values() if p.is_alive]

    def _highest(self) -> int:
        return max((step for _, step in self.checkers.committed), default=0)

    def _schedule_faults(self) -> float:
        """Draw when each fault happens; returns when the last one has."""
        window = 0.05 * self.steps
        calm_at = self.now
        for kind in (f.name for f in dataclasses.fields(self.faults)):
            count = getattr(self.faults, kind)
            if kind == "veto":
                self._vetoes = count
                continue
            for _ in range(count):
                when = self.now + self.rng.uniform(0, window)
                calm_at = max(calm_at, when)
                self.at(when, getattr(self, f"_fault_{kind}"))
        return calm_at

    def _victim(self) -> Process | None:
        living = sorted(self._living(), key=lambda p: natural_key(p.name))
        return self.rng.choice(living) if living else None

    def _fault_kill(self) -> None:
        victim = self._victim()
        if victim is None or len(self._living()) < 2:
            return
        self._done.append(f"kill {victim.name}")
        victim.kill()
        replica_id = victim.replica.config.replica_id
        self.after(self.rng.choice((0.01, 0.2, 1.0, 3.0)), lambda: self._restart(replica_id))

    def _fault_kill_twice(self) -> None:
        self._fault_kill()
        self.after(self.rng.uniform(0, 0.002), self._fault_kill)

    def _restart(self, replica_id: str) -> None:
        if not self.processes[replica_id].is_alive:
            self.start_process(replica_id)

    def _fault_link(self) -> None:
        victim = self._victim()
        if victim is not None:
            self._done.append(f"link {victim.name}")
            victim.link_lost("lost", self.rng.choice((0.005, 0.1, 1.0, 4.0)))

    def _fault_stall(self) -> None:
        victim = self._victim()
        if victim is not None:
            self._done.append(f"stall {victim.name}")
            victim.stall_link(self.rng.choice((0.05, 0.5, 3.0)))

    def _fault_stop(self) -> None:
        victim = self._victim()
        if victim is not None:
            self._done.append(f"stop {victim.name}")
            victim.stop(self.rng.choice((0.05, 0.5, 3.0, 6.0)))

    def _fault_lighthouse(self) -> None:
        if self.lighthouse.is_up:
            self._done.append("lighthouse")
            self.lighthouse.crash()
            self.after(self.rng.choice((0.01, 0.5, 3.0)), self.lighthouse.start)

    def _fault_error(self) -> None:
        victim = self._victim()
        if victim is not None:
            self._done.append(f"error {victim.name}")
            victim.report_spurious_error()

    def _fault_drain(self) -> None:
        victim = self._victim()
        if victim is not None and len(self._living()) > 1:
            self._done.append(f"drain {victim.name}")
            self._draining[victim.replica.config.replica_id] = None
            victim.drain()

    def _fault_join(self) -> None:
        self._done.append("join")
        self.start_process(f"g{self.groups + len(self._done)}")

    # ---- liveness

    def _heal(self) -> None:
        self._vetoes = 0
        self._goal = self._highest() + self.steps

    def _check_progress(self) -> str:
        """I7: within the bound, everybody alive is in one settled quorum and a good way further."""
        until = self.now + HEAL_LIMIT_S
        if self._run_until(self._all_arrived, until):
            return "ok"
        living = self._living()
        if not any(p.replica.lineage is not None and not p.replica.is_frozen for p in living):
            return "lost"
        if self._draining and all(p.replica.config.replica_id in self._draining for p in living if p.replica.lineage):
            return "lost"  # only leavers are left; those who went on without them are dead
        rows = [
            f"{p.name}: step {p.replica.step} quorum {p.replica.quorum.id if p.replica.quorum else None} "
            f"settled {p.replica.is_settled} frozen {p.replica.is_frozen} {p.replica.phase.name} "
            f"next {p.replica.next_move()}"
            for p in living
        ]
        return "STUCK " + "; ".join(rows)

    def _all_arrived(self) -> bool:
        living = self._living()
        if not living or any(p.replica.step < self._goal for p in living):
            return False
        return len({p.replica.quorum.id for p in living if p.replica.quorum}) == 1
