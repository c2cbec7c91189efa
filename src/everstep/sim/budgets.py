"""What may go wrong in a schedule: budgets of faults drawn from the seed, triggers at named points, and climates."""

import dataclasses
import random

from everstep.sim.network import Delays

# Points a trigger may name. A member reaches one after it handled what the point is called after; the lighthouse
# before it handles a message, before it writes ("lighthouse:Persist") and before it sends what stands behind the
# record that is on disk now ("lighthouse:Persisted").
MEMBER_POINTS = (
    "Welcome",
    "Proposal",
    "Switch",
    "Notice",
    "Grant",
    "Refused",
    "Build",
    "Recover",
    "Reduce",
    "BarrierEnded",
    "StateRecovered",
    "GradientsReduced",
    "VoteCast",
    "VoteEnded",
    "CollectiveFailed",
)
LIGHTHOUSE_POINTS = (
    "lighthouse:Hello",
    "lighthouse:Ready",
    "lighthouse:Adopted",
    "lighthouse:Failed",
    "lighthouse:Persist",
    "lighthouse:Persisted",
)
# Reached in groups of several ranks as well: by a follower that heard its leader, or a leader that heard a follower.
RANK_POINTS = (
    "View",
    "Began",
    "Decided",
    "Deciding",
    "Prepare",
    "Prepared",
    "Apply",
    "Applied",
    "MoreReductions",
    "RankFroze",
    "RankSettled",
    "RankRecovered",
    "RankReduced",
    "RankReopened",
    "RankDecides",
    "Ballot",
    "RankFailed",
)
# Reached where live state is lent: by a donor that keeps still, by a joiner that has read a chunk, or all of them.
LOAN_POINTS = ("Lent", "Landed", "Fetched")
GROUPS_MANY = 6
# After the message went to one link, before it goes to the next: only for "lighthouse_sending", which draws from these.
SENDING_POINTS = tuple(f"lighthouse:sent:{kind}" for kind in ("Grant", "Grant", "Notice", "Proposal", "Switch"))
FAULTS_AT_POINTS = ("kill", "kill", "kill_unnoticed", "link", "stall_up", "stall_down", "stop", "lighthouse", "error")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trigger:
    """Strike with `fault` when `by` (any member: None) reaches `point` for the nth time.

    `victim` is a replica_id, "follower of" one, "self" (who reached it) or "other". `seconds` is how long it lasts, or
    until the restart.
    """

    point: str
    fault: str
    nth: int = 1
    by: str | None = None
    victim: str = "self"
    after_s: float = 0.0
    seconds: float | None = None

    @staticmethod
    def drawn(rng: random.Random, more_points: tuple[str, ...] = ()) -> "Trigger":
        return Trigger(
            point=rng.choice(MEMBER_POINTS * 2 + LIGHTHOUSE_POINTS + more_points),
            fault=rng.choice(FAULTS_AT_POINTS),
            nth=rng.choice((1, 2, 3, 5, 8, 13, 21)),
            victim=rng.choice(("self", "self", "other")),
            after_s=rng.choice((0.0, 0.0, 0.0005, 0.002)),
        )

    @staticmethod
    def drawn_of_sends(rng: random.Random) -> "Trigger":
        nth = rng.choice((1, 2, 3, 4, 5, 8))
        return Trigger(point=rng.choice(SENDING_POINTS), fault="lighthouse_sending", nth=nth)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Faults:
    """How many of each fault a schedule has at most; the seed draws instants and victims."""

    kill: int = 0
    kill_twice: int = 0  # two groups within 2 ms
    kill_unnoticed: int = 0  # its socket stays open (a forked child holds it): only silence tells
    link: int = 0
    stall: int = 0  # a link delivers nothing for longer than the heartbeat timeout: false suspicion
    stall_up: int = 0  # the same towards the lighthouse only
    stall_down: int = 0
    stop: int = 0  # a process is stopped and continued
    lighthouse: int = 0
    lighthouse_stop: int = 0  # the lighthouse is stopped and continued
    veto: int = 0
    error: int = 0  # a collective fails though nobody died, and may name somebody who is well
    drain: int = 0
    leave: int = 0  # a process says Goodbye and exits; nobody starts it again
    join: int = 0
    at_points: int = 0  # triggers, drawn
    hang: int = 0  # a training thread stands still while its link lives
    drain_group: int = 0  # the operator asks a group to leave
    broken_path: int = 0  # two groups cannot reach each other for a while; both reach the lighthouse
    lighthouse_sending: int = 0  # the lighthouse dies between two links of one message; what it sent arrives
    # Of followers, in groups of several ranks; the others strike leaders.
    rank_kill: int = 0
    rank_kill_unnoticed: int = 0
    rank_stop: int = 0
    rank_stall: int = 0  # its channel to the leader, and back, delivers nothing for a while
    rank_stall_up: int = 0
    rank_stall_down: int = 0
    rank_error: int = 0
    rank_drain: int = 0
    rank_hang: int = 0
    crash_loop: int = 0  # a group dies again and again, soon after each start
    switch: int = 0  # all links deliver nothing for a while, together
    # With agents.
    hold: int = 0  # a C call holds the GIL of a process, whose agent vouches for it
    agent_link: int = 0  # an agent's link is lost
    agent_stall: int = 0  # it answers and reports late
    kill_agent: int = 0  # and what it runs with it

    def with_those_of_ranks(self, rng: random.Random) -> "Faults":
        """`rng` is a stream of its own."""
        return dataclasses.replace(
            self,
            rank_kill=rng.choice((0, 1, 1, 2)),
            rank_kill_unnoticed=rng.choice((0, 0, 0, 1)),
            rank_stop=rng.choice((0, 0, 1, 2)),
            rank_stall=rng.choice((0, 0, 1)),
            rank_stall_up=rng.choice((0, 0, 0, 1)),
            rank_stall_down=rng.choice((0, 0, 0, 1)),
            rank_error=rng.choice((0, 0, 1, 2)),
            rank_drain=rng.choice((0, 0, 0, 0, 0, 1)),
            rank_hang=rng.choice((0, 0, 0, 0, 0, 1)),
        )

    def with_those_of_agents(self, rng: random.Random) -> "Faults":
        return dataclasses.replace(
            self,
            hold=rng.choice((0, 1, 1, 2)),
            agent_link=rng.choice((0, 0, 1, 2)),
            agent_stall=rng.choice((0, 0, 1)),
            kill_agent=rng.choice((0, 0, 0, 1)),
        )

    def with_those_of_many(self, rng: random.Random) -> "Faults":
        """Only where there are many groups: seeds with few still mean what they meant when they were found."""
        return dataclasses.replace(self, crash_loop=rng.choice((0,) * 7 + (1,)), switch=rng.choice((0,) * 5 + (1,)))

    @staticmethod
    def drawn(rng: random.Random) -> "Faults":
        """The mix of everything that `--seed` runs."""
        spare = random.Random()
        spare.setstate(rng.getstate())  # so that older seeds still mean what they meant when they were found
        return Faults(
            kill=rng.choice((0, 1, 1, 2, 3)),
            kill_twice=rng.choice((0, 0, 1)),
            kill_unnoticed=rng.choice((0, 0, 0, 1)),
            link=rng.choice((0, 1, 2)),
            stall=rng.choice((0, 0, 1)),
            stall_up=rng.choice((0, 0, 1)),
            stall_down=rng.choice((0, 0, 0, 1)),
            stop=rng.choice((0, 0, 1)),
            lighthouse=rng.choice((0, 0, 1, 2)),
            lighthouse_stop=rng.choice((0, 0, 0, 1)),
            veto=rng.choice((0, 1, 2)),
            error=rng.choice((0, 1, 2)),
            drain=rng.choice((0, 0, 0, 1)),
            leave=rng.choice((0, 0, 0, 0, 0, 1)),
            join=rng.choice((0, 0, 1, 2)),
            at_points=rng.choice((0, 1, 2, 4)),
            hang=spare.choice((0, 0, 0, 0, 0, 1)),
            drain_group=spare.choice((0, 0, 0, 0, 0, 0, 1)),
            lighthouse_sending=spare.choice(
                (0, 0, 0, 0, 1, 0, 0, 0, 0)
            ),  # so ordered that no seed of seeds.txt draws it
            broken_path=spare.choice((0, 0, 0, 0, 1, 2)),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Climate:
    """How long things take and how patient the lighthouse is. Messages calm down when the faults end."""

    name: str
    delays: Delays = dataclasses.field(default_factory=Delays)
    heartbeat_timeout_s: float = 2.0
    link_grace_s: float = 0.02
    patience: float = 1.0  # scales the bound of I7

    def for_many_groups(self) -> "Climate":
        """What a schedule costs grows with its heartbeats, which are nearly all that happens in these two."""
        timeout_s = {"heavy": 20.0, "hasty": 0.16}.get(self.name, self.heartbeat_timeout_s)
        return dataclasses.replace(self, heartbeat_timeout_s=timeout_s)


CLIMATES = (
    Climate(name="lan"),
    Climate(name="lan"),
    Climate(name="wan", delays=Delays(message=(0.0005, 0.3)), heartbeat_timeout_s=0.4),
    Climate(name="hasty", heartbeat_timeout_s=0.08, link_grace_s=0.0),
    Climate(name="sluggish", delays=Delays(wake=(0.0, 0.2), startup=(0.0, 3.0))),
    Climate(name="heavy", delays=Delays(compute=(1.0, 20.0), transfer=(0.5, 30.0)), patience=20.0),
)
SLOW_TRANSFERS = Climate(name="slow-transfers", delays=Delays(transfer=(0.1, 6.0)))
