"""Who is found to hang, and when: recorded stories, and a slow judge that looks at every instant."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.core.hang import LOOK_MIN_S, Hung, Unlimited
from everstep.core.limits import ENOUGH, HEARTBEAT, LimitPolicy, Limits, Observed, faded
from tests.core.hang_stage import HangStage
from tests.core.story import told_again

TRANSCRIPTS = sorted((Path(__file__).parent / "hang_transcripts").glob("*.txt"))
LIMITS = {"a": 1.0, "b": 2.5, "c": 7.0}
TICK_S = 0.25  # exact in binary, so both judges see the same instants


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: str(path.stem))
def test_the_judge_still_tells_the_story(path: Path, rewrite: bool) -> None:
    recorded = path.read_text()
    told = told_again(recorded, HangStage().run)
    if rewrite:
        path.write_text(told)
    assert told == path.read_text()


def test_there_are_stories_of_hangs() -> None:
    assert len(TRANSCRIPTS) >= 15


@dataclasses.dataclass(frozen=True)
class Act:
    """After `ticks`, this section is opened, or closed if it is open; or a beat."""

    ticks: int
    rank: int
    section: str


ACTS = st.lists(
    st.builds(Act, st.integers(0, 12), st.integers(0, 2), st.sampled_from(["a", "b", "c", "a/1", "b/1", "beat"])),
    max_size=30,
)


@given(ACTS)
def test_a_hang_is_found_at_its_very_deadline_and_nothing_else_is(acts: list[Act]) -> None:
    stage = HangStage()
    stage.run("limits a=1 b=2.5 c=7 heartbeat=5")
    stage.run("spawn 0 1 2")
    slow = SlowJudge()
    for act in [*acts, Act(60, 0, "")]:
        stage.advance(act.ticks * TICK_S)
        slow.advance(act.ticks)
        if act.section == "beat":
            stage.run(f"beat {act.rank}")
        elif act.section:
            verb = "close" if act.section in slow.open[act.rank] else "open"
            stage.run(f"{verb} {act.rank} {act.section}")
        slow.act(act)
    found = {finding.rank: at for at, finding in stage.found if isinstance(finding, Hung)}
    assert found == slow.hung


class SlowJudge:
    """Looks at everything at each tick."""

    def __init__(self) -> None:
        self.now = 0
        self.open: dict[int, dict[str, int]] = {rank: {} for rank in range(3)}
        self.beats: dict[int, int] = {}
        self.hung: dict[int, float] = {}

    def act(self, act: Act) -> None:
        if act.section == "beat":
            self.beats[act.rank] = self.now
        elif act.section and act.section not in self.open[act.rank]:
            self.open[act.rank][act.section] = self.now
        elif act.section:
            del self.open[act.rank][act.section]

    def advance(self, ticks: int) -> None:
        for _ in range(ticks):
            self.now += 1
            for rank, sections in self.open.items():
                late = [s for s, since in sections.items() if (self.now - since) * TICK_S >= LIMITS[s[0]]]
                is_silent = rank in self.beats and (self.now - self.beats[rank]) * TICK_S >= 5.0
                if (late or is_silent) and rank not in self.hung:
                    self.hung[rank] = self.now * TICK_S


def test_a_rank_in_many_sections_costs_a_look_per_shortest_limit() -> None:
    stage = HangStage()
    stage.run("limits step=10")
    stage.run("spawn 0")
    for _ in range(1000):
        stage.run("open 0 step")
        stage.advance(0.05)
        stage.run("close 0 step")
        stage.advance(0.05)
    assert not stage.found
    assert stage.looks <= 2 + 2 * 100 / 10


def test_looks_are_never_closer_than_the_least_interval_but_for_a_deadline() -> None:
    stage = HangStage()
    stage.run("limits step=0.001")
    stage.run("spawn 0")
    stage.advance(10.0)
    assert stage.looks <= 10.0 / LOOK_MIN_S + 1


def test_a_rank_that_nothing_limits_is_told_of_once() -> None:
    stage = HangStage()
    stage.run("spawn 0")
    stage.advance(1000.0)
    assert [type(finding) for _, finding in stage.found] == [Unlimited]


@given(st.lists(st.floats(0.001, 1000.0), min_size=1, max_size=20), st.floats(1.0, 10.0))
def test_a_learned_limit_is_at_least_the_factor_times_what_any_rank_saw(longest: list[float], factor: float) -> None:
    limits = Limits(LimitPolicy(safety_factor=factor, floor_s=2.0))
    for rank, seconds in enumerate(longest):
        limits.note(rank, {"step": Observed(ENOUGH, seconds)}, 0.0)
    assert limits.limit("step") == max(2.0, factor * max(longest))


def test_an_interval_counts_for_half_after_a_hundred_times_its_length() -> None:
    assert faded(60.0, 6000.0) == 30.0
    assert faded(60.0, 0.0) == 60.0
    assert faded(0.0, 5.0) == 0.0


def test_what_takes_half_a_percent_of_the_time_stays_within_its_limit_for_ever() -> None:
    """A validation of a minute every three hours, between steps of a second."""
    limits = Limits(LimitPolicy(floor_s=1.0))
    limits.keep({"step": Observed(ENOUGH, 60.0)}, 0.0)
    limits.note(0, {"step": Observed(ENOUGH, 1.0)}, 3 * 3600.0)
    limit = limits.limit("step")
    assert limit is not None
    assert limit > 60.0


def test_heartbeats_have_the_floor_of_what_may_be_anything() -> None:
    limits = Limits(LimitPolicy(floor_s=1.0, mixed_floor_s=300.0))
    limits.note(0, {HEARTBEAT: Observed(1000, 0.2), "step": Observed(1000, 0.2)}, 0.0)
    assert limits.limit(HEARTBEAT) == 300.0
    assert limits.limit("step") == 1.0
    assert limits.limit("step", is_mixed=True) == 300.0
