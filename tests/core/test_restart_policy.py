"""What holds of a node's restarts whatever happens, in whatever order."""

import random

import pytest

from everstep.core.node_messages import NodeHealth
from everstep.core.policies import RestartPolicyName
from everstep.core.restart_budget import BudgetPolicy, Exhausted, Granted, RestartBudget
from everstep.core.restart_events import (
    Closed,
    CloseGroup,
    DrainAsked,
    Evicted,
    Exit,
    GroupEnded,
    Joined,
    JoinFailed,
    JoinNext,
    LinkChanged,
    NodesWait,
    RestartAction,
    RestartEvent,
    RoundOver,
    StartWorkers,
    Stop,
    StopWorkers,
    TellHealth,
    WorkerGone,
)
from everstep.core.restart_policy import NEVER_AGAIN, RestartConfig, RestartMachine, closing_reason, code_in

WORKERS = 2


class World:
    """A node's surroundings: it does what the machine asks, late, and lets things happen at random."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        policy = self.rng.choice(list(RestartPolicyName))
        self.max_restarts = self.rng.randrange(4)
        groups = ("",) if self.rng.random() < 0.5 else tuple("abc"[: self.rng.randint(1, 3)])
        budget = BudgetPolicy(max_restarts=self.max_restarts)
        self.machine = RestartMachine(
            RestartConfig(groups=groups, workers=WORKERS, policy=policy, budget=budget, shutdown_timeout_s=3.0)
        )
        self.alive: dict[str, dict[int, bool]] = {name: {} for name in groups}  # True: told to end
        self.attempts = dict.fromkeys(groups, 0)
        self.failed_starts = dict.fromkeys(groups, 0)
        self.asked: dict[str, int] = {}  # groups that want the next round
        self.ended: dict[str, int] = {}
        self.exit_code: int | None = None
        self.never: set[str] = set()  # groups in which a worker asked not to be started again
        self.others: dict[str, int] = dict.fromkeys(groups, 0)  # restarts that other nodes know of
        self.perform(self.machine.start(self.now))

    def perform(self, actions: list[RestartAction]) -> None:
        for action in actions:
            assert self.exit_code is None, f"{action} after the exit"
            match action:
                case JoinNext(group, restarts):
                    assert not self.alive[group], "the next round is asked for while workers run"
                    assert group not in self.ended
                    self.asked[group] = restarts
                case StartWorkers(group, attempt, _):
                    assert not self.alive[group], "two attempts at once"
                    assert attempt == self.attempts[group] + 1
                    assert group not in self.ended
                    assert group not in self.never, "started again after it asked not to be"
                    self.attempts[group] = attempt
                    self.alive[group] = dict.fromkeys(range(WORKERS), False)
                case StopWorkers(group, attempt, how):
                    assert attempt == self.attempts[group]
                    if how is Stop.KILL:
                        for rank in list(self.alive[group]):
                            self.gone(group, rank, signal=9)
                    else:
                        self.alive[group] = dict.fromkeys(self.alive[group], True)
                case GroupEnded(group, code, _):
                    assert not self.alive[group], "ended while workers run"
                    assert self.ended.setdefault(group, code) == code
                case Exit(code):
                    assert set(self.ended) == set(self.alive)
                    self.exit_code = code
                case TellHealth(group, health):
                    assert health is not NodeHealth.FINISHED or not self.alive[group]
                case CloseGroup(_, reason):
                    assert reason

    def tell(self, event: RestartEvent) -> None:
        self.perform(self.machine.receive(event, self.now))

    def gone(self, group: str, rank: int, code: int | None = None, signal: int | None = None) -> None:
        del self.alive[group][rank]
        if code in NEVER_AGAIN:
            self.never.add(group)
        attempt = self.attempts[group]
        self.tell(WorkerGone(group=group, attempt=attempt, local_rank=rank, code=code, signal=signal))

    def advance(self, seconds: float) -> None:
        until = self.now + seconds
        while self.exit_code is None:
            deadline = self.machine.next_deadline()
            if deadline is None or deadline > until:
                break
            self.now = max(self.now, deadline)
            self.perform(self.machine.tick(self.now))
            later = self.machine.next_deadline()
            assert later is None or later > self.now
        self.now = until

    def anything(self) -> None:
        rng, group = self.rng, self.rng.choice(list(self.alive))
        match rng.randrange(12):
            case 0:
                self.tell(RoundOver(group, "another node"))
                self.others[group] += rng.random() < 0.3
            case 1:
                self.tell(NodesWait(group))
            case 2 if rng.random() < 0.1:
                self.tell(Evicted(group, "silent"))
            case 3 if rng.random() < 0.1:
                self.tell(DrainAsked("SIGTERM"))
            case 4 if rng.random() < 0.1:
                self.tell(Closed(group, rng.choice([closing_reason(1, "x"), "done", closing_reason(93, "y")])))
            case 5 if rng.random() < 0.1:
                self.tell(LinkChanged(group, rng.random() < 0.5))
            case 6 if rng.random() < 0.05:
                self.tell(JoinFailed(group, 91, "unreachable"))
            case 7 | 8:
                self.live(group)
            case _:
                self.advance(rng.choice([0.0, 0.5, 5.0, 40.0]))

    def live(self, group: str) -> None:
        """The rendezvous and the workers do something of their own."""
        rng = self.rng
        if group in self.asked:
            known = max(self.asked.pop(group), self.others[group])
            self.others[group] = known
            self.tell(Joined(group, known, rng.choice([1, 2])))
        elif self.alive[group]:
            rank = rng.choice(list(self.alive[group]))
            kind = rng.random()
            if kind < 0.4 or self.alive[group][rank]:
                self.gone(group, rank, signal=rng.choice([9, 11, 15]))
            else:
                self.gone(group, rank, code=0 if kind < 0.7 else 1 if kind < 0.97 else rng.choice(NEVER_AGAIN))


@pytest.mark.parametrize("start", range(0, 2000, 500))
def test_no_two_attempts_run_at_once_the_budget_holds_and_it_always_ends(start: int) -> None:
    for seed in range(start, start + 500):
        world = World(seed)
        for _ in range(world.rng.randrange(60)):
            if world.exit_code is None:
                world.anything()
        # From now on nothing comes from outside but what the node waits for, and every worker fails: it ends.
        for _ in range(400):
            if world.exit_code is not None:
                break
            for group in world.alive:
                if group in world.asked:
                    world.tell(Joined(group, world.asked.pop(group), 1))
                for rank in list(world.alive[group]):
                    if rank in world.alive[group]:
                        world.gone(group, rank, code=1)
                if group not in world.ended and not world.alive[group] and group not in world.asked:
                    world.tell(RoundOver(group, "too few are healthy"))
            world.advance(70.0)
        assert world.exit_code is not None, f"seed {seed}: it never ended"
        assert world.machine.restarts_used <= world.max_restarts + sum(world.others.values())


def test_quick_failures_are_followed_by_growing_pauses() -> None:
    budget = RestartBudget(BudgetPolicy(max_restarts=10, pause_s=1.0, pause_max_s=8.0, quick_s=10.0))
    answers = [budget.ask("", 0.5, 0) for _ in range(7)]
    assert answers == [Granted(pause) for pause in (0.0, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0)]
    assert budget.ask("", 11.0, 0) == Granted(0.0)
    assert budget.ask("", 0.5, 0) == Granted(0.0)


def test_attempts_that_do_not_pass_the_furthest_step_are_given_up_whatever_the_budget() -> None:
    budget = RestartBudget(BudgetPolicy(max_restarts=100, no_progress_max=3))
    reached = [50, 50, 51, 51, 40]
    assert all(isinstance(budget.ask("", 60.0, 5, step), Granted) for step in reached)
    answer = budget.ask("", 60.0, 0, 0)
    assert isinstance(answer, Exhausted)
    assert answer.was_given
    assert "3 attempts in a row ended without passing step 51" in answer.why


def test_attempts_that_say_nothing_of_steps_are_not_given_up_for_that() -> None:
    budget = RestartBudget(BudgetPolicy(max_restarts=100, no_progress_max=3))
    assert all(isinstance(budget.ask("", 60.0, 0), Granted) for _ in range(20))


def test_without_restarts_progress_does_not_help() -> None:
    assert isinstance(RestartBudget(BudgetPolicy(max_restarts=0)).ask("", 1e6, 10**6), Exhausted)


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        (closing_reason(93, "local rank 0: exit code 93"), 93),
        ("node b: " + closing_reason(1, "local rank 0: exit code 7; used up"), 1),
        ("node b: shutdown", None),
        ("every node has finished", None),
    ],
)
def test_the_code_of_a_group_that_gave_up_is_in_the_reason(reason: str, code: int | None) -> None:
    assert code_in(reason) == code
