"""A training job whose replica groups have several ranks, each a process of its own."""

import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from typing import Any

from tests.train.job import Job, Running, assert_same_bits


class RankedJob(Job):
    """`team[group]` are the ranks of its latest start; `started` every rank of every start."""

    def __init__(self, groups: int, ranks: int = 2, **lighthouse: Any) -> None:
        super().__init__(groups, **lighthouse)
        self.ranks = ranks
        self.team: dict[int, list[Running]] = {}
        self.started: list[Running] = []

    def __enter__(self) -> "RankedJob":
        super().__enter__()
        return self

    def start_team(self, group: int, plans: dict[int, dict[str, Any]] | None = None, **plan: Any) -> list[Running]:
        """`plans` are by rank; `plan` is everybody's."""
        place = {"ranks": self.ranks, "leader": f"127.0.0.1:{self._stack.enter_context(reserved_port())}", **plan}
        self.team[group] = [
            self.start(group, rank=rank, **(place | (plans or {}).get(rank, {}))) for rank in range(self.ranks)
        ]
        self.running.pop(group)
        self.started += self.team[group]
        return self.team[group]

    def start_teams(self, plans: dict[tuple[int, int], dict[str, Any]] | None = None, **plan: Any) -> None:
        for group in range(self.groups):
            self.start_team(group, {r: p for (g, r), p in (plans or {}).items() if g == group}, **plan)

    def kill(self, member: Running) -> None:
        assert member.process.pid is not None
        os.kill(member.process.pid, signal.SIGKILL)

    def everyone(self, *but: int) -> list[Running]:
        return [member for group, team in self.team.items() if group not in but for member in team]

    def until_all_recover(self, team: list[Running]) -> None:
        size = self.groups
        self.until(lambda: all(m.step > 0 and m.participants == size for m in team), "the team trains with the others")
        for member in team:
            assert any(line.startswith("recovered step=") for line in member.logs), member.logs

    def until_team_fails(self, group: int) -> None:
        self.until(lambda: all(m.has_ended for m in self.team[group]), f"group {group} ends", deadline_s=15)
        for member in self.team[group]:
            member.process.join(10)
            assert member.process.exitcode not in (0, None), self.describe()


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A port where only a listener that names it can bind, until the block ends.

    A port that was merely free a moment ago is not: before rank 0 has imported torch, any of the hundreds of sockets
    that the processes of this test and of others open may get it. Bound and not listening, it is passed over when the
    kernel picks a port, and a listener with SO_REUSEADDR may still have it.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield int(holder.getsockname()[1])


def assert_ranks_agree(job: RankedJob) -> None:
    """Rank r of every group holds the same bits at the same lineage; the ranks of a group ended each step alike."""
    for rank in range(job.ranks):
        assert_same_bits([member for member in job.started if member.plan.rank == rank])
    for team in (job.started[i : i + job.ranks] for i in range(0, len(job.started), job.ranks)):
        outcomes = [[(s["step"], s["committed"], s["participants"], s["why"]) for s in m.steps] for m in team]
        for each in outcomes[1:]:
            both = min(len(each), len(outcomes[0]))
            assert each[:both] == outcomes[0][:both]


def samples_by_step(members: list[Running]) -> dict[int, list[int]]:
    """The sample ids of each committed step, over all of these."""
    found: dict[int, list[int]] = {}
    for member in members:
        for report in member.steps:
            if report["committed"]:
                found.setdefault(report["step"], []).extend(report["ids"])
    return found
