"""What becomes of the step that a failure interrupted (rule G3, the table of DESIGN 4.3).

A pure decision over the survivors' reports. It rests on one fact: a member votes ok only after all of its reductions
completed, and never changes that vote; so a commit by anyone implies that everyone holds the averaged gradient.
"""

import dataclasses
from collections.abc import Sequence

from everstep.core.types import Action, LocalProtocolError, Phase, Report


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resolution:
    """The survivors go on from committed step `step`, attempt `attempt`, with `action`."""

    step: int
    attempt: int
    action: Action


def resolve(reports: Sequence[Report]) -> Resolution:
    """Decide over the survivors that hold state (at least one).

    Raises LocalProtocolError when the reports contradict each other: no schedule of the protocol leads there.
    """
    if not reports or not all(report.has_state for report in reports):
        raise LocalProtocolError("resolve() needs reports of members that hold state")
    step = max(report.step for report in reports)
    current = [report for report in reports if report.step == step]
    late = [report for report in reports if report.step < step]
    _check_one_history(current, late)
    attempt = max(report.attempt for report in current)
    latest = [report for report in current if report.attempt == attempt]
    if late or len(latest) < len(current):
        return Resolution(step=step, attempt=attempt, action=_reduce_or_abort(reports))
    return Resolution(step=step, attempt=attempt, action=_action_of_one_attempt(latest))


def _action_of_one_attempt(reports: Sequence[Report]) -> Action:
    voted = [report for report in reports if report.phase is Phase.VOTING]
    if any(report.vote is False for report in voted):
        # Whoever voted no kept everyone from committing, and would vote no again after another reduction.
        return Action.ABORT
    all_hold_it = all(report.phase is not Phase.RUNNING for report in reports)
    if not all_hold_it or len({report.tag for report in reports}) > 1:
        return _reduce_or_abort(reports)
    return Action.COMMIT if len(voted) == len(reports) else Action.VOTE


def _reduce_or_abort(reports: Sequence[Report]) -> Action:
    return Action.REDUCE if all(report.keeps_gradients for report in reports) else Action.ABORT


def _check_one_history(current: Sequence[Report], late: Sequence[Report]) -> None:
    lineage = current[0].lineage
    for report in current:
        if report.lineage != lineage:
            raise LocalProtocolError(f"survivors on different lineages: {current[0]} and {report}")
    for report in late:
        promised = report.phase is Phase.VOTING and report.vote is True and report.tag is not None
        if not promised or report.lineage is None or report.tag is None:
            raise LocalProtocolError(
                f"{report.member} is behind step {current[0].step} and cannot commit late: {report}"
            )
        if report.tag.step != report.step + 1 or report.lineage.extended(report.tag) != lineage:
            raise LocalProtocolError(f"{report.member} would commit late to another lineage: {report}")
