"""A stage for recorded transcripts: one lighthouse machine, some members, and a prompter who says what happens.

Each command of a transcript makes something happen; messages then travel at once, in order, but for those of members
that are held. Everything that the machines return is written down. Idea: etcd raft's data-driven tests.
"""

import dataclasses
from collections.abc import Callable

from everstep.core.lighthouse import (
    AdmitGroup,
    DrainGroup,
    Event,
    JobConfig,
    LighthouseMachine,
    LinkClosed,
    LinkMessage,
    LinkOpened,
    StartNewHistory,
)
from everstep.core.messages import (
    Activity,
    Close,
    Effect,
    Exit,
    JournalRecord,
    Log,
    Persist,
    Publish,
    Send,
    Sever,
    ToLighthouse,
    ToMember,
)
from everstep.core.moves import (
    AskToLeave,
    BarrierEnded,
    Build,
    CollectiveFailed,
    GradientsReduced,
    Leave,
    LinkDown,
    LinkUp,
    ReadyToJoin,
    ReplicaConfig,
    ReplicaEvent,
    StateRecovered,
    VoteCast,
    VoteEnded,
)
from everstep.core.recovery_plan import Claim
from everstep.core.replica import Replica
from everstep.core.replica_state import ReplicaState
from everstep.core.types import MemberId, Quorum, QuorumId
from tests.core.described import described, fields, listed
from tests.core.recoveries import Recoveries, shown


@dataclasses.dataclass
class Actor:
    name: str
    replica: Replica
    link: int = 0  # 0: down
    is_alive: bool = True
    is_held: bool = False
    up: list[ToLighthouse] = dataclasses.field(default_factory=list)
    down: list[ToMember] = dataclasses.field(default_factory=list)
    cast: VoteCast | None = None


class Stage:
    """`run` performs one command and returns what was written down."""

    def __init__(self) -> None:
        self.now = 0.0
        self.actors: dict[str, Actor] = {}
        self.lighthouse: LighthouseMachine | None = None
        self._config = JobConfig(
            job_id="job", lighthouse="lh", history="h", join_timeout_s=5.0, stuck_timeout_s=8.0, stuck_initial_s=20.0
        )
        self._disk: JournalRecord | None = None
        self._expected = 0
        self._links = self._starts = 0
        self._votes: dict[QuorumId, dict[MemberId, VoteCast]] = {}
        self._lines: list[str] = []
        self._recoveries = Recoveries()

    def run(self, line: str) -> str:
        command, *words = line.split()
        self._lines = []
        act: Callable[..., None] = getattr(self, f"do_{command}")
        act(*words)
        self._deliver()
        return "\n".join(self._lines)

    # ---- the world

    def do_groups(self, count: str, min_replicas: str = "1") -> None:
        self._expected = int(count)
        self._config = dataclasses.replace(self._config, min_replicas=int(min_replicas))

    def do_lighthouse(self, what: str, identity: str = "lh") -> None:
        """start | crash, then everybody's link is down."""
        if what == "start":
            if identity != "lh":
                self._config, self._disk = dataclasses.replace(self._config, lighthouse=identity), None
            self.lighthouse = LighthouseMachine(self._config, self._disk)
            self._lighthouse_did(self.lighthouse.start(self.now))
            return
        self.lighthouse = None
        for actor in self.actors.values():
            if actor.link:
                self._cut(actor)

    def do_start_passive(self, *names: str) -> None:
        self.do_start(*names, freezes_on_notice=False)

    def do_start(self, *names: str, freezes_on_notice: bool = True) -> None:
        for name in names:
            self._starts += 1
            replica_id = name.rstrip("'")
            config = ReplicaConfig(
                replica_id=replica_id,
                nonce=f"{name}/{self._starts}",
                store=name,
                expected_replicas=self._expected,
                freezes_on_notice=freezes_on_notice,
                workers=self._workers_of(f"{name}/{self._starts}"),
            )
            self.actors[name] = Actor(name, Replica(config))
            self._tell(self.actors[name], ReadyToJoin())
            self.do_connect(name)

    def do_connect(self, *names: str) -> None:
        for name in names:
            actor = self.actors[name]
            self._links += 1
            actor.link = self._links
            self._feed_lighthouse(LinkOpened(actor.link))
            self._tell(actor, LinkUp())

    def do_disconnect(self, name: str) -> None:
        actor = self.actors[name]
        link = actor.link
        self._cut(actor)
        self._feed_lighthouse(LinkClosed(link, "lost"))

    def do_kill(self, name: str) -> None:
        actor = self.actors[name]
        actor.is_alive = False
        if actor.link:
            link, actor.link = actor.link, 0
            actor.up.clear()
            actor.down.clear()
            self._feed_lighthouse(LinkClosed(link, "killed"))

    def do_vanish(self, name: str) -> None:
        """It dies, and nobody is told: its host is gone."""
        self.actors[name].is_alive = False
        self.actors[name].is_held = True

    def do_hold(self, *names: str) -> None:
        for name in names:
            self.actors[name].is_held = True

    def do_release(self, *names: str) -> None:
        for name in names:
            self.actors[name].is_held = False

    def do_wait(self, seconds: str) -> None:
        """Time passes; heartbeats are sent and not written down."""
        until = self.now + float(seconds)
        while True:
            machines: list[tuple[float, int, Actor | None]] = []
            if self.lighthouse is not None and (due := self.lighthouse.next_deadline()) is not None:
                machines.append((due, 0, None))
            for i, actor in enumerate(a for a in self.actors.values() if a.is_alive):
                if (due := actor.replica.next_deadline()) is not None:
                    machines.append((due, i + 1, actor))
            machines.sort(key=lambda entry: entry[:2])
            if not machines or machines[0][0] > until:
                break
            self.now = max(self.now, machines[0][0])
            actor_due = machines[0][2]
            if actor_due is not None:
                self._member_did(actor_due, actor_due.replica.tick(self.now))
            elif self.lighthouse is not None:
                self._lighthouse_did(self.lighthouse.tick(self.now))
            self._deliver()
        self.now = until

    # ---- the members

    def do_build(self, *names: str) -> None:
        """The barrier of their quorum ends on these members; everybody in it takes part."""
        for name in names:
            actor = self.actors[name]
            quorum = actor.replica.quorum
            assert quorum is not None
            self._tell(
                actor, BarrierEnded(quorum.id, tuple(self._claim_of(quorum, member) for member in quorum.member_ids))
            )

    def do_recover(self, *names: str) -> None:
        for name in names:
            quorum = self.actors[name].replica.quorum
            assert quorum is not None
            self._tell(self.actors[name], StateRecovered(quorum.id))

    def do_fetch(self, name: str, *words: str) -> None:
        replica = self._replica_of(name)
        self._did(name, replica.show_recovery(self._recoveries.fetch(name, replica, self.now, words), self.now))

    def do_fetched(self, name: str, *words: str) -> None:
        replica = self._replica_of(name)
        self._did(name, replica.show_recovery(self._recoveries.fetched(name, replica, self.now, words), self.now))

    def do_recoveries(self) -> None:
        assert self.lighthouse is not None
        self._lines += shown(self.lighthouse, self.now)

    def do_reduce(self, *names: str) -> None:
        for name in names:
            quorum = self.actors[name].replica.quorum
            assert quorum is not None
            self._tell(self.actors[name], GradientsReduced(quorum.id, len(quorum.members), b"s"))

    def do_vote(self, *words: str) -> None:
        """vote NAME ok|no ..."""
        for name, ok in zip(words[::2], words[1::2], strict=True):
            actor = self.actors[name]
            cast = actor.replica.cast_vote(ok == "ok")
            if cast is None:
                self._write(f"{name} may not vote")
                continue
            self._votes.setdefault(cast.quorum_id, {})[actor.replica.member] = cast
            self._write(f"{name} votes {'ok' if cast.is_ok else 'no'} for {cast.proposal} in {cast.quorum_id}")

    def do_voted(self, *names: str) -> None:
        """The result of the vote reaches these members."""
        for name in names:
            actor = self.actors[name]
            quorum = actor.replica.quorum
            assert quorum is not None
            votes = [self._votes[quorum.id][member] for member in quorum.member_ids]
            proposals = [vote.proposal for vote in votes]
            is_ok = all(vote.is_ok for vote in votes)
            self._tell(actor, VoteEnded(quorum.id, is_ok, min(proposals), max(proposals)))

    def do_step(self, *names: str) -> None:
        """A whole step with nothing to tell: reduced, voted ok, committed."""
        self.do_reduce(*names)
        self.do_vote(*(word for name in names for word in (name, "ok")))
        self.do_voted(*names)

    def do_fail(self, name: str, peer: str = "") -> None:
        """A collective fails on it, naming the peer of that rank."""
        quorum = self.actors[name].replica.quorum
        assert quorum is not None
        self._tell(self.actors[name], CollectiveFailed(quorum.id, int(peer) if peer else None, "connection reset"))

    def do_unreachable(self, name: str, peer: str) -> None:
        """A collective fails on it because the peer of that rank does not answer."""
        quorum = self.actors[name].replica.quorum
        assert quorum is not None
        self._tell(self.actors[name], CollectiveFailed(quorum.id, int(peer), "no answer", is_unreachable=True))

    def do_drain(self, name: str) -> None:
        self._tell(self.actors[name], AskToLeave())

    def do_drain_group(self, replica_id: str) -> None:
        """The operator's request."""
        self._feed_lighthouse(DrainGroup(replica_id))

    def do_admit(self, replica_id: str) -> None:
        """The operator's request."""
        self._feed_lighthouse(AdmitGroup(replica_id))

    def do_new_history(self) -> None:
        """The operator's request."""
        self._feed_lighthouse(StartNewHistory())

    def do_doing(self, name: str, activity: str, section: str = "") -> None:
        """What its training thread does from now on; in a section, if one is named."""
        self.actors[name].replica.mark(Activity[activity.upper()], self.now)
        if section:
            self.actors[name].replica.open_section(section)

    def do_leave(self, name: str) -> None:
        self._tell(self.actors[name], Leave("training is done"))

    def do_show(self) -> None:
        for actor in (a for a in self.actors.values() if a.is_alive):
            replica = actor.replica
            flags = [word for word, is_so in (("frozen", replica.is_frozen), ("settled", replica.is_settled)) if is_so]
            quorum = replica.quorum.id if replica.quorum else "none"
            where = f"quorum {quorum}, step {replica.step}, attempt {replica.attempt}, {replica.phase.name}"
            move = replica.next_move()
            why = f" ({move.why})" if hasattr(move, "why") else ""
            self._write(f"{actor.name} {replica.member}: {where} {' '.join(flags)}; {type(move).__name__}{why}")

    # ---- plumbing

    def _replica_of(self, name: str) -> ReplicaState:
        return self.actors[name].replica

    def _did(self, name: str, effects: list[Effect]) -> None:
        self._member_did(self.actors[name], effects)

    def _workers_of(self, process: str) -> tuple[str, ...]:
        return ()

    def _claim_of(self, quorum: Quorum, member: MemberId) -> Claim:
        for actor in self.actors.values():
            if actor.replica.member == member:
                move = actor.replica.next_move()
                if isinstance(move, Build):
                    return move.claim
        return self._settled_claim(quorum)

    def _settled_claim(self, quorum: Quorum) -> Claim:
        """Of one that is past the barrier: what those who are not past it claim with state is what it claimed."""
        for actor in self.actors.values():
            if quorum.is_member(actor.replica.member) and actor.replica.plan is not None:
                plan = actor.replica.plan
                return Claim(plan.lineage, plan.attempt)
        raise AssertionError("nobody claims the state")

    def _cut(self, actor: Actor) -> None:
        actor.link = 0
        actor.up.clear()
        actor.down.clear()
        self._tell(actor, LinkDown())

    def _tell(self, actor: Actor, event: ToMember | ReplicaEvent) -> None:
        self._member_did(actor, actor.replica.receive(event, self.now))

    def _member_did(self, actor: Actor, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Send(message, _):
                    if type(message).__name__ != "Heartbeat":
                        self._write(f"{actor.name} -> {described(message)}")
                    if actor.link:
                        actor.up.append(message)  # type: ignore[arg-type]
                case Sever(up_to):
                    self._write(f"{actor.name} severs {up_to}")
                case Exit(reason):
                    self._write(f"{actor.name} shows its stacks and exits: {reason}")
                    self.do_kill(actor.name)
                case Log(event, values):
                    self._write(f"{actor.name} logs {event}: {fields(values)}")

    def _feed_lighthouse(self, event: Event) -> None:
        if self.lighthouse is not None:
            self._lighthouse_did(self.lighthouse.receive(event, self.now))

    def _lighthouse_did(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Send(message, links):
                    to = [a for a in self.actors.values() if a.link in links]
                    self._write(f"    lighthouse -> {','.join(a.name for a in to)}: {described(message)}")
                    for actor in to:
                        actor.down.append(message)  # type: ignore[arg-type]
                case Persist(record):
                    self._disk = record
                    current = listed(record.current) if record.current else "no quorum"
                    proposals = "".join(f", proposed {listed(q)}" for q in record.proposals)
                    leaving = f", leaving {' '.join(map(str, record.leaving))}" if record.leaving else ""
                    gives_up = ", gives up the state" if record.gives_up else ""
                    self._write(f"    lighthouse writes: epoch {record.epoch}, {current}{proposals}{leaving}{gives_up}")
                case Close(link, reason):
                    for actor in self.actors.values():
                        if actor.link == link:
                            self._write(f"    lighthouse closes {actor.name}: {reason}")
                            self._cut(actor)
                            self._feed_lighthouse(LinkClosed(link, reason))
                case Publish(event):
                    self._write(f"    lighthouse publishes {event.kind.value} {event.member}".rstrip())
                case Log(event, values):
                    self._write(f"    lighthouse logs {event}: {fields(values)}")

    def _deliver(self) -> None:
        moved = True
        while moved:
            moved = False
            for actor in list(self.actors.values()):
                if actor.is_held or not actor.link:
                    continue
                if actor.up:
                    moved = True
                    self._feed_lighthouse(LinkMessage(actor.link, actor.up.pop(0)))
                elif actor.down and actor.is_alive:
                    moved = True
                    self._tell(actor, actor.down.pop(0))

    def _write(self, line: str) -> None:
        self._lines.append(line)
