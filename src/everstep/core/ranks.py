"""Who of the nodes that came takes part, and with which rank: three ways to say, and the ranks of their workers.

Pure and without memory: what the last round was comes in with each candidate.
"""

import dataclasses
import enum
from collections.abc import Iterable, Sequence

from everstep.core.types import natural_key


class RankPolicy(str, enum.Enum):
    """Where a node's rank comes from."""

    PREVIOUS = "previous"  # survivors keep theirs, newcomers fill the gaps, in natural order of their ids
    INFRASTRUCTURE = "infrastructure"  # the scheduler's number of the node, in every round; no spares
    TOPOLOGY = "topology"  # nodes of one domain next to each other, whole domains first


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A node that wants to take part. `arrived` orders those of whom there are too many: first come, first served."""

    node_id: str
    arrived: int = 0
    previous: int | None = None  # its rank in the round before
    infrastructure: int | None = None  # SLURM_PROCID, else GROUP_RANK
    domain: str = ""

    @property
    def natural(self) -> tuple[object, ...]:
        """`node2` before `node10`."""
        return (natural_key(self.node_id), self.node_id)


def assign(
    policy: RankPolicy, candidates: Iterable[Candidate], nodes_max: int, domain_size: int = 0
) -> tuple[str, ...]:
    """The ids of at most `nodes_max` nodes in rank order; who is not named is a spare.

    `domain_size` (for TOPOLOGY): how many nodes make a domain whole; 0: as many as the largest has.
    """
    nodes = list(candidates)
    if policy is RankPolicy.INFRASTRUCTURE:
        numbered = sorted(nodes, key=lambda c: (c.infrastructure is None, c.infrastructure or 0, c.natural))
        return tuple(c.node_id for c in numbered[:nodes_max])
    if policy is RankPolicy.TOPOLOGY:
        return tuple(c.node_id for c in _by_domain(nodes, domain_size)[:nodes_max])
    return _keeping_ranks(nodes, nodes_max)


def _keeping_ranks(nodes: list[Candidate], nodes_max: int) -> tuple[str, ...]:
    survivors = sorted((c for c in nodes if c.previous is not None), key=lambda c: c.previous or 0)
    newcomers = sorted((c for c in nodes if c.previous is None), key=lambda c: c.arrived)
    chosen = [*survivors, *newcomers][:nodes_max]
    ranks: list[Candidate | None] = [None] * len(chosen)
    displaced: list[Candidate] = []  # the world has become too small for their ranks
    for survivor in chosen[: len(survivors)]:
        rank = survivor.previous
        if rank is not None and rank < len(ranks) and ranks[rank] is None:
            ranks[rank] = survivor
        else:
            displaced.append(survivor)
    rest = iter([*displaced, *sorted(chosen[len(survivors) :], key=lambda c: c.natural)])
    return tuple((c if c is not None else next(rest)).node_id for c in ranks)


def _by_domain(nodes: list[Candidate], domain_size: int) -> list[Candidate]:
    """Whole domains first, each with its nodes together; what is left of a domain beyond its size counts as broken."""
    domains: dict[str, list[Candidate]] = {}
    for node in sorted(nodes, key=lambda c: c.natural):
        domains.setdefault(node.domain, []).append(node)
    named = [domain for domain in domains if domain]
    size = domain_size or max((len(domains[domain]) for domain in named), default=0)
    whole: list[Candidate] = []
    broken: list[Candidate] = []
    for domain in sorted(named, key=lambda name: (natural_key(name), name)):
        members = domains[domain]
        count = len(members) // size * size
        whole += members[:count]
        broken += members[count:]
    return [*whole, *broken, *domains.get("", [])]


# ---- workers


@dataclasses.dataclass(frozen=True, kw_only=True)
class NodeRole:
    """What a node runs: `local_world_size` workers of one role."""

    role: str
    local_world_size: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerRanks:
    """A node's share of the ranks: its workers have `local_world_size` ranks from each base on."""

    base_rank: int
    world_size: int
    base_role_rank: int
    role_world_size: int


def worker_ranks(nodes: Sequence[NodeRole]) -> tuple[WorkerRanks, ...]:
    """For the nodes in rank order, as torchrun's agent numbers workers: within the job, and within their role."""
    role_sizes: dict[str, int] = {}
    for node in nodes:
        role_sizes[node.role] = role_sizes.get(node.role, 0) + node.local_world_size
    world_size = sum(role_sizes.values())
    found = []
    base = 0
    role_bases = dict.fromkeys(role_sizes, 0)
    for node in nodes:
        found.append(
            WorkerRanks(
                base_rank=base,
                world_size=world_size,
                base_role_rank=role_bases[node.role],
                role_world_size=role_sizes[node.role],
            )
        )
        base += node.local_world_size
        role_bases[node.role] += node.local_world_size
    return tuple(found)
