"""Types, member lists and recovery plans: the values that the machines exchange."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.core.messages import MembersChange, applied, changed, whole
from everstep.core.recovery_plan import DONORS_MAX, READERS_MAX, Claim, RecoveryPlan, plan_recovery
from everstep.core.types import (
    LineageEntry,
    LocalProtocolError,
    Member,
    MemberId,
    Quorum,
    QuorumId,
    genesis,
    in_rank_order,
)

MEMBERS = st.builds(
    Member,
    id=st.builds(MemberId, st.sampled_from(["node2", "node10", "b", "ä", "7"]), st.integers(1, 3)),
    store=st.sampled_from(["", "h:1", "h:2"]),
)
LISTS = st.lists(MEMBERS, min_size=1, unique_by=lambda member: member.id).map(in_rank_order)


FIRST = QuorumId(1, 1)


def entry(step: int, attempt: int = 0, quorum_id: QuorumId = FIRST, samples: bytes = b"s") -> LineageEntry:
    return LineageEntry(step, attempt, quorum_id, 2, samples)


def test_node2_stands_before_node10() -> None:
    names = ["node10", "node2", "b", "node2x", "7"]
    ordered = in_rank_order(Member(MemberId(name, 1)) for name in names)
    assert [member.id.replica_id for member in ordered] == ["7", "b", "node2", "node2x", "node10"]


def test_quorum_ids_grow_by_epoch_first() -> None:
    assert QuorumId(1, 9) < QuorumId(2, 1) < QuorumId(2, 2)


def test_equal_steps_in_equal_order_give_equal_lineages() -> None:
    start = genesis("h")
    assert start.extended(entry(1)).extended(entry(2)) == genesis("h").extended(entry(1)).extended(entry(2))


@pytest.mark.parametrize(
    "other", [entry(1, attempt=1), entry(1, quorum_id=QuorumId(1, 2)), entry(1, samples=b"t")], ids=str
)
def test_whatever_differs_in_a_step_differs_for_ever(other: LineageEntry) -> None:
    one, two = genesis("h").extended(entry(1)), genesis("h").extended(other)
    assert one != two
    assert one.extended(entry(2)) != two.extended(entry(2))


def test_histories_never_share_a_lineage() -> None:
    assert genesis("h").extended(entry(1)) != genesis("g").extended(entry(1))
    assert genesis("h", 5) != genesis("h", 0)


@pytest.mark.parametrize("step", [0, 1, 3])
def test_only_the_very_next_step_extends_a_lineage(step: int) -> None:
    lineage = genesis("h").extended(entry(1))
    with pytest.raises(LocalProtocolError):
        lineage.extended(entry(step))


@given(LISTS, LISTS)
def test_a_difference_applied_to_its_base_gives_the_new_list(old: tuple[Member, ...], new: tuple[Member, ...]) -> None:
    base, target = Quorum(QuorumId(1, 1), old, "s"), Quorum(QuorumId(1, 2), new, "t")
    for change, known in ((changed(target, base), base), (whole(target), None)):
        wired = msgspec.msgpack.decode(msgspec.msgpack.encode(change), type=MembersChange)
        assert applied(wired, target.id, known) == target


@given(st.lists(st.booleans(), min_size=1))
def test_every_joiner_gets_a_source_that_holds_the_state(holds: list[bool]) -> None:
    lineage = genesis("h")
    claims = [Claim(lineage if has else None, 0) for has in holds]
    if not any(holds):
        with pytest.raises(LocalProtocolError):
            plan_recovery(claims)
        return
    plan = plan_recovery(claims)
    assert sorted(plan.source_of) == [rank for rank, has in enumerate(holds) if not has]
    assert all(holds[source] for source in plan.source_of.values())
    first = list(plan.source_of.values())
    served = [first.count(rank) for rank, has in enumerate(holds) if has]
    assert max(served) - min(served) <= 1, "the sources share the work"
    for receiver, source in plan.source_of.items():
        donors = plan.donors_of(receiver)
        assert donors[0] == source
        assert len(set(donors)) == len(donors) <= DONORS_MAX
        assert all(holds[donor] for donor in donors)
        assert all(receiver in plan.receivers_of(donor) for donor in donors)
    readers = [len(plan.receivers_of(rank)) for rank, has in enumerate(holds) if has]
    assert max(readers) <= max(READERS_MAX + DONORS_MAX, -(-len(first) // len(served)))


def test_a_plan_of_an_older_version_names_one_source_for_each() -> None:
    plan = RecoveryPlan(lineage=genesis("h"), attempt=0, source_of={1: 0, 2: 3})
    assert [plan.donors_of(receiver) for receiver in (1, 2)] == [(0,), (3,)]
    assert [plan.receivers_of(rank) for rank in range(4)] == [(1,), (), (), (2,)]


def test_holders_that_disagree_are_a_bug() -> None:
    with pytest.raises(LocalProtocolError, match="start from"):
        plan_recovery([Claim(genesis("h"), 0), Claim(genesis("h"), 1)])
