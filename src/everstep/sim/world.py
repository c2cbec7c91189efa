"""One schedule: parties, faults drawn from the seed, then peace, then the question whether all go on."""

import dataclasses
import math
import random
from collections.abc import Callable

from everstep.core.follower import Follower
from everstep.core.leader import Leader
from everstep.core.lighthouse import JobConfig, LighthouseMachine
from everstep.core.messages import Cause, Log
from everstep.core.moves import ReplicaConfig
from everstep.core.replica import Replica
from everstep.core.types import MemberId, QuorumId
from everstep.sim.agents import Agents
from everstep.sim.budgets import CLIMATES, GROUPS_MANY, SLOW_TRANSFERS, Climate, Faults, Trigger
from everstep.sim.checkers import Checkers, Violation, Weights
from everstep.sim.faults import Injector
from everstep.sim.group_ends import FollowerParty, LeaderParty
from everstep.sim.lighthouse_node import LighthouseNode
from everstep.sim.loans import Transfer
from everstep.sim.network import Channel, Clock, Collectives, Delays
from everstep.sim.party import Party
from everstep.sim.process import Process
from everstep.sim.teams import Script, Teams
from everstep.sim.trainer import COLLECTIVE_TIMEOUT_S, Trainer

EVENTS_MAX = 300_000  # with groups of one rank; as many for each rank of a group
HEAL_LIMIT_S = 60.0  # I7: virtual time after the last fault within which all must go on together
WITHOUT_NOTICES_S = 2 * COLLECTIVE_TIMEOUT_S  # where they are put off: who waits for a dead one, and again for another

LEISURE_S = 0.5  # of a computation by who is far enough already, while the others come back

PATH_PAUSE_S = 1.0
TRIGGERS_LIMIT_S = 10.0  # triggers that were asked for and whose points nobody reached by then strike no more


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a schedule came to.

    `verdict` is "ok", "lost" (nobody alive holds the state), "short" (of groups), or what went wrong.
    """

    verdict: str
    seed: int
    virtual_s: float
    events: int
    messages: int
    steps: int
    faults: tuple[str, ...]
    quorum: str
    climate: str

    @property
    def is_ok(self) -> bool:
        return self.verdict in ("ok", "lost", "short")

    def __str__(self) -> str:
        done = ",".join(self.faults) or "none"
        return (
            f"seed {self.seed}: {self.verdict}; {self.steps} steps committed, quorum {self.quorum}, {self.climate}, "
            f"faults: {done}; {self.virtual_s:.2f} s virtual, {self.events} events, {self.messages} messages"
        )


class World:
    """Everything that one seed determines. Nothing in it depends on real time or hash order."""

    def __init__(
        self,
        seed: int,
        *,
        groups: int,
        steps: int,
        faults: Faults | None = None,
        triggers: tuple[Trigger, ...] = (),
        climate: Climate | None = None,
        replica_type: type[Replica] = Replica,
        lighthouse_type: type[LighthouseMachine] = LighthouseMachine,
        ranks: int = 1,
        leader_type: type[Leader] = Leader,
        follower_type: type[Follower] = Follower,
        rank_types: tuple[type[LeaderParty], type[FollowerParty]] = (LeaderParty, FollowerParty),
        agents: bool = False,
        lends: bool | None = None,
        is_sharded: bool | None = None,
        process_type: type[Process] = Process,
        transfer_type: type[Transfer] = Transfer,
    ) -> None:
        """What is not given is drawn from the seed. Sabotaged types of machines prove that the checkers can fail."""
        self.seed = seed
        self.rng = random.Random(seed)
        self.clock = Clock()
        self.climate = climate or self.rng.choice(CLIMATES)
        spare = random.Random(f"lends {seed}")
        self.lends = lends if lends is not None else spare.random() < 0.9  # else a member of an older version is there
        if self.lends and climate is None and spare.random() < 0.3:
            self.climate = SLOW_TRANSFERS
        if groups >= GROUPS_MANY and climate is None:
            self.climate = self.climate.for_many_groups()
        self.delays = self.climate.delays
        self._collectives = [Collectives(self.clock, self.rng, self.delays) for _ in range(ranks)]  # rank by rank
        self.checkers = Checkers()
        self.groups = groups
        self.steps = steps
        self.ranks = ranks
        self.replica_type = replica_type
        self.leader_type = leader_type
        self.follower_type = follower_type
        self.rank_types = rank_types
        self.lighthouse_type = lighthouse_type
        self.process_type = process_type
        self.transfer_type = transfer_type
        if faults is None:
            faults = Faults.drawn(self.rng)
            if ranks > 1:
                faults = faults.with_those_of_ranks(random.Random(f"ranks {seed}"))
            if groups >= GROUPS_MANY:
                faults = faults.with_those_of_many(random.Random(f"many {seed}"))
            if agents:
                faults = faults.with_those_of_agents(random.Random(f"agents' faults {seed}"))
        self.faults = Injector(self, faults, triggers)
        if is_sharded is None:
            is_sharded = random.Random(f"sharded {seed}").random() < 0.5
        self.script = Script(seed, self.faults, is_sharded=is_sharded)
        self.keeps_gradients = self.rng.random() < 0.8
        self.freezes_on_notice = random.Random(f"proactive {seed}").random() < 0.9
        self.lighthouse = LighthouseNode(self, self._job_config())
        self.agents = Agents(self, are_there=agents)
        self.processes: dict[str, Party] = {}  # the newest process of each replica_id; a group's leader
        self.teams = Teams(self)
        self.messages = 0
        self.trace: Callable[[str], None] | None = None
        self._links = 0
        self._starts = 0
        self._quorums: dict[str, dict[QuorumId, MemberId]] = {}
        self._by_member: dict[tuple[MemberId, int], Trainer] = {}
        self._goal: int | None = None  # to be reached by all, once no fault comes any more

    def _job_config(self) -> JobConfig:
        timeout = self.climate.heartbeat_timeout_s
        patience_s = max(1.0, 3 * self.delays.compute[1])
        return JobConfig(
            job_id="sim",
            lighthouse=f"lh{self.seed}",
            history=f"h{self.seed}",
            min_replicas=min(self.groups, self.rng.choice((1, 1, 1, 2))),
            join_timeout_s=1.0,
            heartbeat_interval_s=timeout / 4,
            heartbeat_timeout_s=timeout,
            link_grace_s=self.climate.link_grace_s,
            path_pause_s=PATH_PAUSE_S,
            stuck_floor_s=patience_s,
            stuck_initial_s=2 * patience_s,
        )

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

    def compute_s(self, step: int) -> float:
        """Of the gradient of the step after `step`."""
        seconds = self.draw("compute")
        return max(seconds, LEISURE_S) if self._goal is not None and step >= self._goal else seconds

    def new_link(self) -> int:
        self._links += 1
        return self._links

    def new_channel(self) -> Channel:
        return Channel(self.clock, lambda: self.draw("message"))

    def count_message(self) -> None:
        self.messages += 1

    def log(self, who: str, log: Log) -> None:
        if self.trace is not None:
            fields = " ".join(f"{k}={v}" for k, v in log.fields.items())
            self.trace(f"{self.now:9.4f} {who:10s} {log.event}: {fields}")

    def collectives_of(self, rank: int) -> Collectives:
        return self._collectives[rank]

    def joined(self, party: Trainer, quorum_id: QuorumId) -> None:
        member = party.replica.member
        self._quorums.setdefault(party.name, {})[quorum_id] = member
        self._by_member[member, party.rank] = party

    def leave_quorums(self, party: Party, up_to: QuorumId | None) -> None:
        """The process severs its collectives of every quorum up to this one, or died (None)."""
        joined = self._quorums.get(party.name, {})
        for quorum_id in [q for q in joined if up_to is None or q <= up_to]:
            self._collectives[party.rank].leave(quorum_id, joined.pop(quorum_id))

    def process_of(self, member: MemberId, rank: int) -> Trainer | None:
        return self._by_member.get((member, rank))

    def left(self, process: Party) -> None:
        """It keeps its last group open for the others' sake, for a while or not at all, and exits."""
        self.after(self.rng.choice((0.0, 0.5)), process.kill)

    def exited(self, process: Party) -> None:
        """It was told to, because its training thread stands still; something starts it again."""
        process.kill()
        self.after(0.1, lambda: self.restart(process.replica_id))

    def aborted(self, who: str, step: int) -> None:
        """The step after `step` counts on nobody: somebody voted no, as the schedule has it, or else it was lost.

        One that is known to get lost is passed over (docs/groups.md): some ranks have completed their second reduction,
        and some have not begun theirs, when a failure lets all keep what they have.
        """
        is_well = self.keeps_gradients and self.lighthouse.config.min_replicas == 1
        if self.ranks > 1:
            is_well = is_well and not self.script.divides and self.script.reductions_of(step) == 1
        if is_well and "veto" not in self.faults.done:
            raise Violation(f"{who} lost the computed step {step + 1}")

    # ---- the schedule

    def start_process(self, replica_id: str) -> None:
        self._starts += 1
        name = f"{replica_id}@{self._starts}"
        workers = (name, *(f"{name}/{rank}" for rank in range(1, self.ranks))) if self.agents.are_there else ()
        config = ReplicaConfig(
            replica_id=replica_id,
            nonce=name,
            store=name,
            expected_replicas=self.groups,
            keeps_gradients=self.keeps_gradients,
            freezes_on_notice=self.freezes_on_notice,
            workers=workers,
        )
        initial = Weights(value=self._starts)
        if self.ranks > 1:
            self.processes[replica_id] = self.teams.start(name, config, initial)
            return
        process = self.process_type(self, name, config, initial)
        self.processes[replica_id] = process
        process.start()

    def restart(self, replica_id: str) -> None:
        if not self.processes[replica_id].is_alive:
            self.teams.reap(replica_id)
            self.start_process(replica_id)

    def run(self) -> Outcome:
        verdict = "ok"
        try:
            self._run_schedule()
            verdict = self._check_progress()
            for process in self.living():
                self.checkers.ledger(process.name, process.replica, self.now - process.born_at, self.now)
        # Boundary of a schedule: whatever a machine or a checker raises is the finding of this seed.
        except Exception as error:
            verdict = f"VIOLATION {type(error).__name__}: {error}"
        quorum = max((p.replica.quorum.id for p in self.living() if p.replica.quorum), default=QuorumId(0, 0))
        return Outcome(
            verdict=verdict,
            seed=self.seed,
            virtual_s=self.now,
            events=self.clock.events,
            messages=self.messages,
            steps=self._highest(),
            faults=tuple(self.faults.done),
            quorum=str(quorum),
            climate=self.climate.name,
        )

    def _run_schedule(self) -> None:
        self.lighthouse.start()
        for i in range(self.groups):
            self.after(self.rng.uniform(0, 0.05), lambda i=i: self.start_process(f"g{i}"))  # type: ignore[misc]
        if self.rng.random() < 0.7:  # else the founding is hit as well
            self._run_until(lambda: self._highest() >= 1, 30.0 * self.climate.patience)
        longest_compute_s = self.delays.compute[1]
        calm_at = self.faults.schedule(window=self.steps * (longest_compute_s + 0.03))
        self._run_until(lambda: self.now >= calm_at, calm_at)
        self._run_until(lambda: self.faults.is_spent, self.now + TRIGGERS_LIMIT_S)
        self._heal()

    def _run_until(self, is_reached: Callable[[], bool], until: float) -> bool:
        while not is_reached():
            if self.clock.events > EVENTS_MAX * self.ranks:
                raise Violation(f"I7 livelock: more than {EVENTS_MAX * self.ranks} events by {self.now:.3f} s")
            if not self.clock.step(until):
                return is_reached()
        return True

    def living(self) -> list[Party]:
        return [p for p in self.processes.values() if p.is_alive]

    def _highest(self) -> int:
        return max((step for _, step in self.checkers.committed), default=0)

    # ---- liveness

    def _heal(self) -> None:
        """No fault from now on, and a calm network, though work takes as long as before."""
        self.faults.end()
        calm = Delays()
        self.delays = dataclasses.replace(self.delays, message=calm.message, wake=calm.wake, startup=calm.startup)
        self._goal = self._highest() + math.ceil(self.steps / 2)
        for process in self.teams.everyone() if self.ranks > 1 else self.living():
            process.wake_up()

    def _check_progress(self) -> str:
        """I7: within the bound, everybody alive is in one settled quorum and a good way further."""
        work_s = 2 * self.steps * sum(self.delays.compute)
        self._check_flapping()
        until = self.now + HEAL_LIMIT_S * self.climate.patience + work_s
        if not self.freezes_on_notice:
            until += WITHOUT_NOTICES_S
        if self._run_until(self._all_arrived, until):
            return "ok"
        living = self.living()
        if all(p.replica.lineage is None for p in living):
            return "lost"
        asked = [done.removeprefix("drain_group ") for done in self.faults.done]
        if all(p.replica.wants_to_leave or p.name in asked for p in living if p.replica.lineage is not None):
            return "lost"  # only leavers are left; those who went on without them are dead
        if len(living) < self.lighthouse.config.min_replicas:
            return "short"  # of groups: those that left do not come back
        rows = [
            f"{p.name}: step {p.replica.step} quorum {p.replica.quorum.id if p.replica.quorum else None} "
            f"settled {p.replica.is_settled} frozen {p.replica.is_frozen} {p.replica.phase.name} "
            f"next {p.replica.next_move()}"
            for p in living
        ]
        return "STUCK " + "; ".join(rows)

    def _check_flapping(self) -> None:
        """A broken path costs rounds in proportion to the logarithm of how long it lasts."""
        rounds = sum(log.fields.get("cause") == Cause.BROKEN_PATH for log in self.lighthouse.rounds_opened())
        # Each life of the lighthouse learns anew, and a kill of one end makes the other the one that must go.
        lessons = 1 + sum(fault.startswith(("lighthouse", "kill")) for fault in self.faults.done)
        bound = lessons * sum(3 + math.ceil(math.log2(1 + s / PATH_PAUSE_S)) for s in self.faults.broken_paths_s)
        if rounds > bound:
            raise Violation(f"I7 {rounds} rounds for broken paths, where {bound} are enough")

    def _all_arrived(self) -> bool:
        goal = self._goal
        assert goal is not None
        for process in self.processes.values():  # after each event: most often somebody is found soon
            if process.is_alive and process.replica.step < goal:
                return False
        living = self.living()
        if not living or not self.teams.have_arrived(goal):
            return False
        return len({p.replica.quorum.id for p in living if p.replica.quorum}) == 1
