"""Checks what a job's processes reported against the invariants of DESIGN 4.6. Knows nothing of how they came about."""

import itertools
import re
from collections import defaultdict

from everstep.core.events import EventKind, JobEvent
from tests.train.job import Running

_QUORUM = re.compile(r"^(?:switched in|granted|adopted) .*?quorum=(\d+)\.(\d+)")
_SETTLED = re.compile(r"^settled quorum=(\S+) .*?members=(\S+)")


def violations(members: list[Running], events: list[JobEvent]) -> list[str]:
    """One line for each broken invariant; `members` is every process that ever ran."""
    found: list[str] = []
    found += _one_lineage_a_step(members)
    found += _same_bits_for_a_lineage(members)
    found += _a_step_commits_once(members)
    found += _a_sample_counts_once(members)
    found += _quorum_ids_grow_and_name_one_membership(members)
    found += _every_failure_says_who_what_and_why(events)
    return found


def _committed(member: Running) -> list[dict[str, object]]:
    return [report for report in member.steps if report["committed"]]


def _one_lineage_a_step(members: list[Running]) -> list[str]:
    lineages: dict[object, set[object]] = defaultdict(set)
    for member in members:
        for report in _committed(member):
            lineages[report["step"]].add(report["lineage"])
    return [
        f"I1 step {step} has the lineages {sorted(map(str, seen))}" for step, seen in lineages.items() if len(seen) > 1
    ]


def _same_bits_for_a_lineage(members: list[Running]) -> list[str]:
    digests: dict[object, set[object]] = defaultdict(set)
    for member in members:
        for report in _committed(member):
            digests[report["lineage"]].add(report["digest"])
    return [f"I2 {len(seen)} different states at {lineage}" for lineage, seen in digests.items() if len(seen) > 1]


def _a_step_commits_once(members: list[Running]) -> list[str]:
    """On one process step follows step, but for where it took over a later state after an eviction."""
    found = []
    for member in members:
        steps = [int(str(report["step"])) for report in _committed(member)]
        jumps = sum(later != step + 1 for step, later in itertools.pairwise(steps))
        evictions = sum(line.startswith("evicted") for line in member.logs)
        if any(later <= step for step, later in itertools.pairwise(steps)) or jumps > evictions:
            found.append(f"I3 group {member.plan.group} committed the steps {steps}")
    return found


def _a_sample_counts_once(members: list[Running]) -> list[str]:
    """By its position in the endless line of epochs, over the whole history."""
    steps: dict[int, object] = {}
    found = []
    for member in members:
        for report in _committed(member):
            positions = report["positions"]
            assert isinstance(positions, list)
            for position in positions:
                if position in steps:
                    found.append(f"I4 position {position} counts in step {steps[position]} and in {report['step']}")
                steps[position] = report["step"]
    return found


def _quorum_ids_grow_and_name_one_membership(members: list[Running]) -> list[str]:
    found = []
    named: dict[str, set[str]] = defaultdict(set)
    for member in members:
        ids = [(int(m[1]), int(m[2])) for line in member.logs if (m := _QUORUM.match(line))]
        if any(later <= earlier for earlier, later in itertools.pairwise(ids)):
            found.append(f"I5 group {member.plan.group} was in the quorums {ids}")
        for line in member.logs:
            if m := _SETTLED.match(line):
                named[m[1]].add(m[2])
    return found + [f"I5 quorum {quorum} names {sorted(seen)}" for quorum, seen in named.items() if len(seen) > 1]


def _every_failure_says_who_what_and_why(events: list[JobEvent]) -> list[str]:
    failed = [event for event in events if event.kind is EventKind.MEMBER_FAILED]
    return [
        f"I8 {event}" for event in failed if not (event.member and event.cause and event.evidence and event.quorum_id)
    ]
