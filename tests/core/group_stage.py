"""A stage for transcripts of groups of several ranks: `ranks 2` first, then actors `a` (the leader) and `a/1`.

What the ranks tell each other is delivered and written down as the rest is; a follower that is held hears nothing.
"""

from everstep.core.follower import Follower
from everstep.core.group import (
    Ballot,
    Began,
    Decided,
    FromRank,
    Outcome,
    RankBeat,
    RankFroze,
    RankReduced,
    ToFollower,
    View,
)
from everstep.core.leader import Leader
from everstep.core.messages import Effect, Log, Sever, Tell
from everstep.core.moves import (
    Applied,
    Apply,
    AskToLeave,
    BarrierEnded,
    CollectiveFailed,
    Deciding,
    GradientsReduced,
    Leave,
    MoreReductions,
    ReadyToJoin,
    ReplicaConfig,
    ReplicaEvent,
    StateRecovered,
)
from everstep.core.replica_state import ReplicaState
from tests.core.described import fields
from tests.core.stage import Actor, Stage

BEAT_S = 0.1


class Rank:
    """A follower, and what is under way between it and its leader."""

    def __init__(self, name: str, leader: Actor, rank: int, config: ReplicaConfig) -> None:
        self.name = name
        self.leader = leader
        self.rank = rank
        self.replica = Follower(config)
        self.is_alive = True
        self.is_held = False
        self.up: list[object] = []
        self.down: list[object] = []


class GroupStage(Stage):
    """Its members have followers. Commands name `a` for the leader, and `a/1` for its first follower."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 1
        self.followers: dict[str, Rank] = {}

    # ---- the world

    def do_ranks(self, size: str) -> None:
        self.size = int(size)

    def do_start(self, *names: str, freezes_on_notice: bool = True) -> None:
        for name in names:
            config = ReplicaConfig(
                replica_id=name.rstrip("'"),
                nonce=name,
                store=name,
                expected_replicas=self._expected,
                freezes_on_notice=freezes_on_notice,
            )
            leader = Leader(config, self.size, self.now)
            actor = self.actors[name] = Actor(name, leader)
            for rank in range(1, self.size):
                self.followers[f"{name}/{rank}"] = Rank(f"{name}/{rank}", actor, rank, config)
            self._tell(actor, ReadyToJoin())
            for follower in self._followers_of(actor):
                self._tell_follower(follower, ReadyToJoin())
            self.do_connect(name)

    def do_hold(self, *names: str) -> None:
        for name in names:
            (self.followers.get(name) or self.actors[name]).is_held = True

    def do_release(self, *names: str) -> None:
        for name in names:
            (self.followers.get(name) or self.actors[name]).is_held = False

    def do_kill(self, name: str) -> None:
        """A leader that dies, or loses a follower, ends its group: its link closes without Goodbye."""
        leader = self.followers[name].leader if name in self.followers else self.actors[name]
        for follower in self._followers_of(leader):
            follower.is_alive = False
            follower.up.clear()
            follower.down.clear()
        self._write(f"{name} dies; with it end {', '.join(n for n in self._names_of(leader) if n != name)}")
        super().do_kill(leader.name)

    def do_wait(self, seconds: str) -> None:
        """Followers that are not held are heard all the while."""
        until = self.now + float(seconds)
        while self.now < until:
            for follower in self.followers.values():
                if follower.is_alive and not follower.is_held:
                    self._hear(follower, follower.replica.beat(self.now))
            super().do_wait(str(min(BEAT_S, until - self.now)))
            self.now = min(self.now, until) if until - self.now > 1e-9 else until

    # ---- the ranks

    def do_build(self, *names: str) -> None:
        for name in names:
            if name not in self.followers:
                super().do_build(name)
                continue
            quorum = self.followers[name].replica.quorum
            assert quorum is not None
            claims = tuple(self._claim_of(quorum, member) for member in quorum.member_ids)
            self._tell_follower(self.followers[name], BarrierEnded(quorum.id, claims))

    def do_recover(self, *names: str) -> None:
        for name in names:
            quorum = self._machine(name).quorum
            assert quorum is not None
            self._feed(name, StateRecovered(quorum.id))

    def do_reduce(self, *names: str) -> None:
        for name in names:
            quorum = self._machine(name).quorum
            assert quorum is not None
            self._feed(name, GradientsReduced(quorum.id, len(quorum.members), b"s"))

    def do_reopen(self, *names: str) -> None:
        """These ranks' scripts add a reduction to a step that they had reduced."""
        for name in names:
            self._feed(name, MoreReductions())

    def do_begin(self, *names: str) -> None:
        """The scripts of these groups begin a step, on all ranks."""
        for name in names:
            actor = self.actors[name]
            assert isinstance(actor.replica, Leader)
            self._member_did(actor, actor.replica.begin_batch())

    def do_follow(self, *names: str) -> None:
        """The scripts of these followers begin the step that their leader's has begun."""
        for name in names:
            follower = self._machine(name)
            assert isinstance(follower, Follower)
            if follower.has_begun:
                begun = follower.begin_batch()
                self._write(f"{name} begins step {begun.batch.step} among {' '.join(map(str, begun.members))}")
            else:
                self._write(f"{name} may not begin yet")

    def do_ballot(self, *words: str) -> None:
        """ballot NAME ok|no ...: that rank's part of its group's vote; the leader's last."""
        for name, ok in zip(words[::2], words[1::2], strict=True):
            objection = "" if ok == "ok" else f"{name} objects"
            if name in self.followers:
                follower = self.followers[name]
                self._feed(name, Deciding(together=False))
                _, effects = follower.replica.cast_ballot(objection)
                self._follower_did(follower, effects)
                self._deliver()
                continue
            actor = self.actors[name]
            self._feed(name, Deciding(together=False))
            cast, effects = actor.replica.cast_ballot(objection)
            self._member_did(actor, effects)
            if cast is None:
                self._write(f"{name} waits for the other ranks' ballots, or for the lighthouse")
                continue
            self._votes.setdefault(cast.quorum_id, {})[actor.replica.member] = cast
            self._write(f"{name} votes {'ok' if cast.is_ok else 'no'} for {cast.proposal} in {cast.quorum_id}")

    def do_step(self, *names: str) -> None:
        """A whole step of these groups, all ranks: reduced, voted ok, committed."""
        self.do_begin(*names)
        self._deliver()
        ranks = [rank for name in names for rank in reversed(self._names_of(self.actors[name]))]
        self.do_reduce(*ranks)
        self._deliver()
        self.do_ballot(*(word for rank in ranks for word in (rank, "ok")))
        self.do_voted(*names)

    def do_voted(self, *names: str) -> None:
        """The result of the vote reaches these groups, and their scripts end the batch."""
        for name in names:
            super().do_voted(name)
            actor = self.actors[name]
            assert isinstance(actor.replica, Leader)
            committed = actor.replica.attempt == 0
            self._member_did(actor, actor.replica.end_batch(Outcome(committed, actor.replica.step, "")))
            self._deliver()
            for follower in self._followers_of(actor):
                follower.replica.end_batch()

    def do_fail(self, name: str, peer: str = "") -> None:
        quorum = self._machine(name).quorum
        assert quorum is not None
        self._feed(name, CollectiveFailed(quorum.id, int(peer) if peer else None, "connection reset"))

    def do_drain(self, name: str) -> None:
        self._feed(name, AskToLeave())

    def do_leave(self, name: str) -> None:
        self._feed(name, Leave("training is done"))

    def do_show(self) -> None:
        super().do_show()
        for follower in (f for f in self.followers.values() if f.is_alive):
            replica, move = follower.replica, follower.replica.next_move()
            quorum = replica.quorum.id if replica.quorum else "none"
            why = f" ({move.why})" if hasattr(move, "why") else ""
            frozen = " frozen" if replica.is_frozen else ""
            where = f"quorum {quorum}, step {replica.step}, attempt {replica.attempt}, {replica.phase.name}{frozen}"
            self._write(f"{follower.name}: {where}; {type(move).__name__}{why}")

    # ---- plumbing

    def _machine(self, name: str) -> ReplicaState:
        return self.followers[name].replica if name in self.followers else self.actors[name].replica

    def _replica_of(self, name: str) -> ReplicaState:
        return self._machine(name)

    def _did(self, name: str, effects: list[Effect]) -> None:
        if name in self.followers:
            self._follower_did(self.followers[name], effects)
        else:
            super()._did(name, effects)

    def _names_of(self, leader: Actor) -> list[str]:
        return [leader.name, *(follower.name for follower in self._followers_of(leader))]

    def _followers_of(self, leader: Actor) -> list[Rank]:
        return [follower for follower in self.followers.values() if follower.leader is leader]

    def _feed(self, name: str, event: ReplicaEvent) -> None:
        if name in self.followers:
            self._tell_follower(self.followers[name], event)
        else:
            self._tell(self.actors[name], event)

    def _tell_follower(self, follower: Rank, event: ToFollower | ReplicaEvent) -> None:
        self._follower_did(follower, follower.replica.receive(event, self.now))

    def _hear(self, follower: Rank, message: object) -> None:
        event = FromRank(follower.rank, message)  # type: ignore[arg-type]
        self._member_did(follower.leader, follower.leader.replica.receive(event, self.now))  # type: ignore[arg-type]

    def _follower_did(self, follower: Rank, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Tell(message):
                    follower.up.append(message)
                    self._write(f"{follower.name} -> {follower.leader.name}: {_said(message)}")
                case Sever(up_to):
                    self._write(f"{follower.name} severs {up_to}")
                case Log(event, values):
                    self._write(f"{follower.name} logs {event}: {fields(values)}")

    def _member_did(self, actor: Actor, effects: list[Effect]) -> None:
        super()._member_did(actor, effects)
        for effect in effects:
            if isinstance(effect, Tell):
                self._write(f"{actor.name} -> its ranks: {_said(effect.message)}")
                for follower in self._followers_of(actor):
                    follower.down.append(effect.message)

    def _deliver(self) -> None:
        moved = True
        while moved:
            super()._deliver()
            moved = False
            for follower in self.followers.values():
                if follower.is_held or not follower.is_alive:
                    continue
                while follower.down:
                    moved = True
                    self._tell_follower(follower, follower.down.pop(0))  # type: ignore[arg-type]
                while follower.up:
                    moved = True
                    self._hear(follower, follower.up.pop(0))
        for name in [*self.actors, *self.followers]:
            if self._machine(name).next_move() == Apply():
                self._write(f"{name} applies what it fetched")
                self._feed(name, Applied())


def _said(message: object) -> str:
    kind = type(message).__name__
    match message:
        case View():
            where = f"quorum {message.quorum_id or 'none'}, step {message.lineage.step if message.lineage else -1}"
            flags = [word for word in ("settled", "frozen", "in_doubt") if getattr(message, f"is_{word}")]
            flags += [word for word in ("has_left", "holds_average") if getattr(message, word)]
            severed = f", severed {message.severed}" if message.severed else ""
            return f"{kind} {where}, attempt {message.attempt}{severed} {' '.join(flags)}".rstrip()
        case Began(number, batch):
            return f"{kind} {number}: step {batch.step} attempt {batch.attempt}"
        case Decided(number, outcome):
            return f"{kind} {number}: {'committed' if outcome.committed else 'aborted'} step {outcome.step}"
        case Ballot(_, objection):
            return f"{kind} {'no: ' + objection if objection else 'ok'}"
        case RankReduced(key):
            return f"{kind} step {key.step} attempt {key.attempt} in {key.quorum_id}"
        case RankFroze(round_):
            return f"{kind} {round_}"
        case RankBeat():
            return kind
    return f"{kind} {' '.join(str(value) for value in vars_of(message))}".rstrip()


def vars_of(message: object) -> list[object]:
    return [getattr(message, name) for name in getattr(message, "__struct_fields__", ())]
