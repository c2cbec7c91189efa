"""Kills and aborts at random instants in the middle of several allreduces: every survivor must go on, and soon.

`python -m tests.collectives.storm SECONDS [SEED]` says how long survivors took, round by round at their slowest.
"""

import random
import signal
import sys
import time
from contextlib import ExitStack, suppress

from everstep.collectives.store import host_store
from tests.collectives.members import Member, Outcome, outcomes_in_any_order

MEMBERS = 4
THREADS = 2  # as many as a job's group has
SIZES = ([7, 1_000, 50_000, 7], [300_000] * 4, [100_000] * 8, [1_000_000, 3, 1_000_000])
INTERRUPTED = ("StepInterrupted", "PeerLost")
TIMEOUT_S = 60.0  # far more than the limit of a drain: no lost operation is saved by its own timeout
ANSWER_TIMEOUT_S = 20.0
GOES_ON_WITHIN_S = 5.0


def storm(seconds: float, seed: int) -> list[float]:
    """Of each round: how long the slowest survivor took to be in a group again. Fails when one cannot."""
    rng = random.Random(seed)
    took: list[float] = []
    with ExitStack() as stack:
        store = stack.enter_context(host_store()).address
        group = [_join(stack) for _ in range(MEMBERS)]
        seq = 0
        ends_at = time.monotonic() + seconds
        while time.monotonic() < ends_at:
            seq += 1
            configured = [m.begin("configure", seq, rank, len(group), store, TIMEOUT_S) for rank, m in enumerate(group)]
            if rng.random() < 0.1:  # a death within the building
                victims = _strike(rng, group, seq)
                running = configured
            else:
                _all_went_on(group, configured, f"seed {seed} round {seq}", took)
                sizes = rng.choice(SIZES)
                running = [m.begin("reduce_several", sizes) for m in group]
                victims = _strike(rng, group, seq)
            survivors = [m for m in group if m not in victims]
            orders = [order for m, order in zip(group, running, strict=True) if m not in victims]
            for outcome in _outcomes(survivors, orders):
                is_built = running is configured and not outcome.error
                assert is_built or outcome.error in INTERRUPTED, (seed, seq, outcome)
            for victim in victims:
                victim.close()
            group = [m for m in group if m not in victims]
            group += [_join(stack) for _ in victims]
            rng.shuffle(group)
    return took


def _outcomes(group: list[Member], orders: list[int]) -> list[Outcome]:
    """When one does not answer, every member shows on stderr what its threads do."""
    try:
        return outcomes_in_any_order(group, orders, ANSWER_TIMEOUT_S)
    except AssertionError:
        for member in group:
            member.signal(signal.SIGUSR1)
            member.do("ping")
        raise


def _join(stack: ExitStack) -> Member:
    member = Member()
    stack.callback(_leave, member)
    member.do("reduce_in_threads", THREADS)
    return member


def _leave(member: Member) -> None:
    with suppress(ValueError):  # it was closed as a victim
        member.close()


def _strike(rng: random.Random, group: list[Member], seq: int) -> list[Member]:
    """Kill up to two members and abort the others, in any order and some twice, within some 20 ms."""
    victims = rng.sample(group, rng.choice((0, 0, 0, 1, 2)))
    survivors = [m for m in group if m not in victims]
    strokes: list[tuple[float, Member, bool]] = [(rng.uniform(0, 0.01), m, True) for m in victims]
    for member in survivors:
        times = rng.choice((1, 1, 2))
        strokes += [(rng.choice((0.0, 0.002, 0.02)) * rng.random() + 0.005, member, False) for _ in range(times)]
    began_at = time.monotonic()
    aborts: list[tuple[Member, int]] = []
    for due, member, is_kill in sorted(strokes, key=lambda s: s[0]):
        while time.monotonic() - began_at < due:
            pass
        if is_kill:
            member.signal(signal.SIGKILL)
        else:
            aborts.append((member, member.begin("abort", seq)))
    for member, order in aborts:
        assert not member.outcome(order, ANSWER_TIMEOUT_S).error
    return victims


def _all_went_on(group: list[Member], orders: list[int], where: str, took: list[float]) -> None:
    outcomes = _outcomes(group, orders)
    assert not any(o.error for o in outcomes), (where, outcomes)
    took.append(max(o.took_s for o in outcomes))


if __name__ == "__main__":
    seconds = sorted(storm(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1))
    print(f"{len(seconds)} groups: median {seconds[len(seconds) // 2]:.3f} s, slowest {seconds[-5:]}")
