"""Ranks: what each policy promises, and that workers are numbered as torchrun's agent numbers them."""

from hypothesis import given
from hypothesis import strategies as st

from everstep.core.ranks import Candidate, NodeRole, RankPolicy, WorkerRanks, assign, worker_ranks


def nodes(*ids: str) -> list[Candidate]:
    return [Candidate(node_id=node_id, arrived=order) for order, node_id in enumerate(ids)]


def test_newcomers_are_ranked_in_natural_order() -> None:
    assert assign(RankPolicy.PREVIOUS, nodes("node10", "node2", "node1"), 4) == ("node1", "node2", "node10")


def test_survivors_keep_their_ranks_and_newcomers_fill_the_gaps() -> None:
    came = [
        Candidate(node_id="c", previous=2),
        Candidate(node_id="new10", arrived=0),
        Candidate(node_id="a", previous=0),
        Candidate(node_id="new2", arrived=1),
    ]
    assert assign(RankPolicy.PREVIOUS, came, 4) == ("a", "new2", "c", "new10")


def test_a_survivor_whose_rank_is_beyond_the_smaller_world_takes_the_first_gap() -> None:
    came = [Candidate(node_id="d", previous=3), Candidate(node_id="b", previous=1), Candidate(node_id="c", previous=2)]
    assert assign(RankPolicy.PREVIOUS, came, 4) == ("d", "b", "c")


def test_survivors_go_before_newcomers_and_these_by_arrival() -> None:
    came = [Candidate(node_id="z", arrived=0), Candidate(node_id="y", arrived=1), Candidate(node_id="x", previous=0)]
    assert assign(RankPolicy.PREVIOUS, came, 2) == ("x", "z")


@given(
    previous=st.lists(st.one_of(st.none(), st.integers(0, 12)), max_size=14),
    nodes_max=st.integers(1, 12),
)
def test_previous_gives_every_rank_once_and_moves_no_survivor_without_need(
    previous: list[int | None], nodes_max: int
) -> None:
    held = [rank if rank not in previous[:i] else None for i, rank in enumerate(previous)]
    came = [Candidate(node_id=f"n{i}", arrived=i, previous=rank) for i, rank in enumerate(held)]
    chosen = assign(RankPolicy.PREVIOUS, came, nodes_max)
    assert len(chosen) == len(set(chosen)) == min(nodes_max, len(came))
    for candidate in came:
        if candidate.previous is not None and candidate.previous < len(chosen) and candidate.node_id in chosen:
            assert chosen[candidate.previous] == candidate.node_id


def test_infrastructure_ranks_are_the_schedulers_numbers_in_every_round() -> None:
    came = [
        Candidate(node_id="a", infrastructure=2, previous=0),
        Candidate(node_id="b", infrastructure=0, previous=1),
        Candidate(node_id="c", infrastructure=1, previous=2),
    ]
    assert assign(RankPolicy.INFRASTRUCTURE, came, 3) == ("b", "c", "a")
    assert assign(RankPolicy.INFRASTRUCTURE, came[:2], 3) == ("b", "a")  # a lost node's number is closed up, in order


def test_topology_puts_whole_domains_first_and_keeps_each_together() -> None:
    came = [
        Candidate(node_id="n1", domain="rack10"),
        Candidate(node_id="n2", domain="rack2"),
        Candidate(node_id="n3", domain="rack1"),
        Candidate(node_id="n4", domain="rack10"),
        Candidate(node_id="n5", domain="rack2"),
        Candidate(node_id="n6"),
    ]
    assert assign(RankPolicy.TOPOLOGY, came, 9) == ("n2", "n5", "n1", "n4", "n3", "n6")
    assert assign(RankPolicy.TOPOLOGY, came, 4) == ("n2", "n5", "n1", "n4")  # spares come from broken domains
    assert assign(RankPolicy.TOPOLOGY, came, 9, domain_size=1)[:1] == ("n3",)


def test_workers_are_numbered_over_the_job_and_within_their_role() -> None:
    found = worker_ranks(
        [
            NodeRole(role="t", local_world_size=2),
            NodeRole(role="p", local_world_size=1),
            NodeRole(role="t", local_world_size=4),
        ]
    )
    assert found == (
        WorkerRanks(base_rank=0, world_size=7, base_role_rank=0, role_world_size=6),
        WorkerRanks(base_rank=2, world_size=7, base_role_rank=0, role_world_size=1),
        WorkerRanks(base_rank=3, world_size=7, base_role_rank=2, role_world_size=6),
    )


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 8)), min_size=1, max_size=12))
def test_ranks_of_workers_are_consecutive_and_unique(shape: list[tuple[str, int]]) -> None:
    roles = [NodeRole(role=role, local_world_size=size) for role, size in shape]
    found = worker_ranks(roles)
    ranks = [r.base_rank + i for r, node in zip(found, roles, strict=True) for i in range(node.local_world_size)]
    assert ranks == list(range(found[0].world_size))
    for role in set("abc"):
        mine = [(r, n) for r, n in zip(found, roles, strict=True) if n.role == role]
        numbers = [r.base_role_rank + i for r, n in mine for i in range(n.local_world_size)]
        assert numbers == list(range(sum(n.local_world_size for _, n in mine)))
        assert all(r.role_world_size == len(numbers) for r, _ in mine)
