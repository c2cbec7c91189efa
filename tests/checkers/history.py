"""Checks what a job's processes recorded against the invariants of DESIGN 4.6. Knows nothing of how they came about.

A history is what one process reported, record by record; `load` reads it from a file of JSON lines:

    start   group, number (of this start, over the whole job)
    log     text: a line that Everstep logged
    draw    member, step (being made), attempt, positions, ids: what the member is about to put into that try
    step    committed, step; where it committed: lineage, digest (of the state after it), entry, positions
"""

import collections
import dataclasses
import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from everstep.core.types import Lineage, LineageEntry, LocalProtocolError, QuorumId, genesis

_QUORUM = re.compile(r"^(?:switched in|granted|adopted) .*?quorum=(\d+)\.(\d+)")
_SETTLED = re.compile(r"^settled quorum=(\S+) .*?members=(\S+)")
Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class History:
    """One process, from its start to its end. `number` orders the starts of one group."""

    group: str
    number: int
    records: list[Record]

    def of(self, event: str) -> list[Record]:
        return [record for record in self.records if record["event"] == event]

    @property
    def committed(self) -> list[Record]:
        return [record for record in self.of("step") if record["committed"]]

    @property
    def logs(self) -> list[str]:
        return [record["text"] for record in self.of("log")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failure:
    """What the lighthouse said when it held that a member had failed."""

    member: str
    cause: str
    evidence: str


def load(path: Path) -> History:
    """A process that is killed may leave half a line at the end, and nowhere else."""
    *lines, _half = path.read_text().split("\n")
    records = [json.loads(line) for line in lines]
    start = records[0]
    return History(start["group"], start["number"], records)


def violations(histories: list[History], failures: Iterable[Failure], killed: Iterable[str] = ()) -> list[str]:
    """One line for each broken invariant. `histories`: every process that ever ran; `killed`: members that were."""
    return [
        *_one_lineage_a_step(histories),
        *_lineages_are_the_chain_of_their_entries(histories),
        *_same_bits_for_a_lineage(histories),
        *_a_step_commits_once(histories),
        *_a_sample_counts_once(histories),
        *_quorum_ids_grow_and_name_one_membership(histories),
        *_every_failure_says_who_and_why(list(failures), killed),
    ]


# ---- what the histories say together


def entries_of(histories: list[History]) -> dict[int, Record]:
    """By step, what the lineage says of it; empty for histories that do not record it."""
    found = {r["step"]: r["entry"] for history in histories for r in history.committed if r.get("entry")}
    return dict(sorted(found.items()))


def members_of(histories: list[History]) -> dict[str, tuple[str, ...]]:
    """By quorum, its members in rank order."""
    lines = (_SETTLED.match(line) for history in histories for line in history.logs)
    return {m[1]: tuple(m[2].split(",")) for m in lines if m}


def draws_of(histories: list[History]) -> dict[tuple[str, int, int], Record]:
    """By (member, step, attempt). A killed member's are here, whether or not it lived to see the step commit."""
    return {(r["member"], r["step"], r["attempt"]): r for history in histories for r in history.of("draw")}


# ---- I1, I2


def _one_lineage_a_step(histories: list[History]) -> list[str]:
    lineages: dict[int, set[str]] = collections.defaultdict(set)
    for history in histories:
        for record in history.committed:
            lineages[record["step"]].add(record["lineage"])
    return [f"I1 step {step} has the lineages {sorted(seen)}" for step, seen in lineages.items() if len(seen) > 1]


def _lineages_are_the_chain_of_their_entries(histories: list[History]) -> list[str]:
    """Each names the one before it, so that two processes with one lineage have the whole past in common."""
    lineages = {r["step"]: r["lineage"] for history in histories for r in history.committed}
    found = []
    for step, entry in entries_of(histories).items():
        if step > 1 and step - 1 not in lineages:
            continue  # that no step is missing is I3's
        before = lineage_of(lineages[step - 1]) if step > 1 else genesis(lineages[step].partition(":")[0])
        try:
            is_chained = before.extended(entry_of(entry)) == lineage_of(lineages[step])
        except LocalProtocolError:
            is_chained = False
        if not is_chained:
            found.append(f"I1 the lineage of step {step} does not follow from that of step {step - 1} and {entry}")
    return found


def lineage_of(text: str) -> Lineage:
    history, step, digest = text.split(":")
    return Lineage(history, int(step), bytes.fromhex(digest))


def entry_of(record: Record) -> LineageEntry:
    quorum_id = QuorumId(*map(int, record["quorum"].split(".")))
    samples = bytes.fromhex(record["samples"])
    return LineageEntry(record["step"], record["attempt"], quorum_id, record["contributors"], samples)


def _same_bits_for_a_lineage(histories: list[History]) -> list[str]:
    digests: dict[str, set[str]] = collections.defaultdict(set)
    for history in histories:
        for record in history.committed:
            digests[record["lineage"]].add(record["digest"])
    return [f"I2 {len(seen)} different states at {lineage}" for lineage, seen in digests.items() if len(seen) > 1]


# ---- I3


def _a_step_commits_once(histories: list[History]) -> list[str]:
    """In one process step follows step, but for where it took over a later state after an eviction."""
    found = []
    starts: dict[str, list[History]] = collections.defaultdict(list)
    for history in sorted(histories, key=lambda h: h.number):
        starts[history.group].append(history)
        steps = _steps(history)
        jumps = sum(later != step + 1 for step, later in itertools.pairwise(steps))
        if jumps > sum(line.startswith("evicted") for line in history.logs):
            found.append(f"I3 group {history.group} committed with gaps: {_around_gaps(steps)}")
    for group, of_group in starts.items():
        steps = [step for history in of_group for step in _steps(history)]
        again = [later for step, later in itertools.pairwise(steps) if later <= step]
        if again:
            found.append(f"I3 group {group} committed again: {again}")
    known = {step for history in histories for step in _steps(history)}
    missing = sorted(set(range(1, max(known, default=0))) - known)
    return [*found, *(f"I3 nobody committed step {step}, but later ones" for step in missing if min(known) == 1)]


def _steps(history: History) -> list[int]:
    return [int(record["step"]) for record in history.committed]


def _around_gaps(steps: list[int]) -> list[tuple[int, int]]:
    return [(step, later) for step, later in itertools.pairwise(steps) if later != step + 1]


# ---- I4


def _a_sample_counts_once(histories: list[History]) -> list[str]:
    """By its position in the endless line of epochs, over the whole history."""
    found: list[str] = []
    steps: dict[int, int] = {}
    widest = 0
    for step, positions in _counted(histories, found):
        widest = max(widest, len(positions))
        for position in positions:
            if position in steps:
                found.append(f"I4 position {position} counts in step {steps[position]} and in {step}")
            steps[position] = step
    if entries_of(histories) and steps:  # what a dead member drew is drawn again, in the very next steps
        lost = [position for position in range(max(steps) - 2 * widest) if position not in steps]
        found += [f"I4 position {position} never counted" for position in lost]
    return found


def _counted(histories: list[History], found: list[str]) -> Iterable[tuple[int, list[int]]]:
    """(step, positions) of what went into each committed step: all contributors' draws, where they are recorded."""
    entries, members, draws = entries_of(histories), members_of(histories), draws_of(histories)
    for step, entry in entries.items():
        contributors = members.get(entry["quorum"], ())
        if len(contributors) != entry["contributors"]:
            found.append(
                f"I4 step {step} has {entry['contributors']} contributors, {entry['quorum']} is {contributors}"
            )
        positions: list[int] = []
        for member in contributors:
            draw = draws.get((member, step, entry["attempt"]))
            if draw is None:
                found.append(f"I4 {member} has put something unrecorded into step {step}")
            else:
                positions += draw["positions"]
        yield step, positions
    if not entries:
        for history in histories:
            for record in history.committed:
                yield record["step"], record["positions"]


# ---- I5, I8


def _quorum_ids_grow_and_name_one_membership(histories: list[History]) -> list[str]:
    found = []
    named: dict[str, set[str]] = collections.defaultdict(set)
    for history in histories:
        ids = [(int(m[1]), int(m[2])) for line in history.logs if (m := _QUORUM.match(line))]
        back = [(earlier, later) for earlier, later in itertools.pairwise(ids) if later <= earlier]
        if back:
            found.append(f"I5 group {history.group} went from one quorum to an older one: {back}")
        for line in history.logs:
            if m := _SETTLED.match(line):
                named[m[1]].add(m[2])
    entries = entries_of(histories)
    for step, entry in entries.items():
        if step - 1 in entries and entry_of(entry).quorum_id < entry_of(entries[step - 1]).quorum_id:
            found.append(f"I5 step {step} was reduced in an older quorum than step {step - 1}")
    return found + [f"I5 quorum {quorum} names {sorted(seen)}" for quorum, seen in named.items() if len(seen) > 1]


def _every_failure_says_who_and_why(failures: list[Failure], killed: Iterable[str]) -> list[str]:
    found = [f"I8 {failure}" for failure in failures if not (failure.member and failure.cause and failure.evidence)]
    told = {failure.member for failure in failures}
    return found + [f"I8 {member} was killed, and nobody said so" for member in killed if member not in told]
