"""Rendezvous in the virtual world: faults from a seed end in one round; costs at 10,000 nodes; checkers can fail."""

from pathlib import Path

import pytest

from everstep.core.messages import Effect, SendToNodes
from everstep.core.node_messages import RoundComplete, RoundDissolved, RoundInfo
from everstep.core.rendezvous import RendezvousConfig, RendezvousEvent, RendezvousMachine
from everstep.sim.__main__ import main
from everstep.sim.rendezvous import RendezvousWorld
from everstep.sim.rendezvous_scale import ScaleRounds

SEEDS_FILE = Path(__file__).with_name("seeds_rendezvous.txt")


def _regression_seeds() -> list[tuple[int, str]]:
    rows = []
    for line in SEEDS_FILE.read_text().splitlines():
        if line and not line.startswith("#"):
            seed, what = line.split(maxsplit=1)
            rows.append((int(seed), what))
    return rows


@pytest.mark.parametrize(("seed", "what"), _regression_seeds(), ids=lambda v: str(v)[:40])
def test_a_seed_of_a_rendezvous_that_once_failed_ends_well(seed: int, what: str) -> None:
    outcome = RendezvousWorld(seed, nodes=2 + seed % 6).run()
    assert outcome.is_ok, f"{outcome} ({what})"


@pytest.mark.parametrize("first", range(0, 600, 150))
def test_mixed_faults_end_in_one_round(first: int) -> None:
    for seed in range(first, first + 150):
        outcome = RendezvousWorld(seed, nodes=2 + seed % 6).run()
        assert outcome.is_ok, str(outcome)


def test_fifty_nodes_end_in_one_round() -> None:
    for seed in range(3):
        outcome = RendezvousWorld(seed, nodes=50, faults=40).run()
        assert outcome.is_ok, str(outcome)


def test_a_seed_says_the_same_twice() -> None:
    assert str(RendezvousWorld(7).run()) == str(RendezvousWorld(7).run())


def test_the_command_line_runs_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--rendezvous", "--seeds", "0:5"]) == 0
    assert "5 seeds: 5 ok" in capsys.readouterr().out


def test_a_node_costs_the_same_among_500_and_among_10_000() -> None:
    costs = []
    for nodes in (500, 10_000):
        world = ScaleRounds(nodes)
        rows = []
        for phase in (world.join, world.lose_one, world.number_workers):
            world.messages = world.bytes = 0
            phase()
            rows.append((world.messages / nodes, world.bytes / nodes))
        costs.append(rows)
    for (messages, size), (messages_10k, size_10k) in zip(*costs, strict=True):
        assert messages_10k == pytest.approx(messages, rel=0.01)
        assert size_10k < 1.05 * size  # numbers have a digit more


class TellsRanksTwice(RendezvousMachine):
    """The last node of a round is told the first one's rank."""

    def receive(self, event: RendezvousEvent, now: float) -> list[Effect]:
        return [_with_rank_0(effect) for effect in super().receive(event, now)]


def _with_rank_0(effect: Effect) -> Effect:
    if isinstance(effect, SendToNodes) and isinstance(effect.message, RoundComplete):
        info = effect.message.info
        if info.rank == info.size - 1:
            return SendToNodes(RoundComplete(RoundInfo(info.round, 0, info.size, info.store)), effect.links)
    return effect


class NoticesNoDeath(RendezvousMachine):
    """Its nodes are alive for ever."""

    def __init__(self, config: RendezvousConfig) -> None:
        super().__init__(config)
        self._roster.expired = lambda now: []  # type: ignore[method-assign]


class DropsTheEnd(RendezvousMachine):
    """Its nodes hear nothing of the end of their rounds."""

    def receive(self, event: RendezvousEvent, now: float) -> list[Effect]:
        return [effect for effect in super().receive(event, now) if not self._is_end(effect)]

    def _is_end(self, effect: Effect) -> bool:
        return isinstance(effect, SendToNodes) and isinstance(effect.message, RoundDissolved)


class DropsTheEndForThoseWhoComeBack(DropsTheEnd):
    """A node that was away while its round ended hears nothing of that."""

    def _is_end(self, effect: Effect) -> bool:
        return super()._is_end(effect) and "not connected" in repr(effect)


@pytest.mark.parametrize(
    ("sabotaged", "says"),
    [
        (TellsRanksTwice, "rank 0"),
        (NoticesNoDeath, ""),
        (DropsTheEnd, "two rounds stand"),
        (DropsTheEndForThoseWhoComeBack, "two rounds stand"),
    ],
)
def test_a_broken_lighthouse_is_caught(sabotaged: type[RendezvousMachine], says: str) -> None:
    outcomes = [RendezvousWorld(seed, nodes=4, machine_type=sabotaged).run() for seed in range(12)]
    assert any(not outcome.is_ok and says in outcome.verdict for outcome in outcomes)
