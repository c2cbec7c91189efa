"""Whether an open round may be decided (the other half of rule G3). Three answers, like etcd raft's `quorum`."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence

from everstep.core.types import MemberId, Phase, Quorum, QuorumId, Report


@dataclasses.dataclass(frozen=True)
class Pending:
    """Not yet; `why` is for people."""

    why: str


@dataclasses.dataclass(frozen=True)
class Lost:
    """Everybody who could answer did, and nobody holds the state. `is_unused`: the founding quorum never committed."""

    is_unused: bool


@dataclasses.dataclass(frozen=True)
class Won:
    """These members, in rank order, form the next quorum."""

    survivors: tuple[MemberId, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundView:
    """What the lighthouse knows of an open round."""

    current: Quorum
    proposals: Sequence[Quorum]  # outstanding: sent after `current`, perhaps adopted by somebody who is out of reach
    reports: Mapping[MemberId, Report]
    suspects: Collection[MemberId]
    is_founding: bool
    departed: Collection[MemberId] = ()  # said Goodbye: they answer, and end
    may_return: Collection[MemberId] = ()  # suspects that may live and hold the state


def count_round(view: RoundView) -> Pending | Lost | Won:
    """Decide over the answers so far. Call it when nobody is missing: it looks at every member once."""
    needed = [m for m in view.current.member_ids if m not in view.suspects]
    missing = [m for m in needed if m not in view.reports]
    if missing:
        return Pending(f"{len(missing)} of {len(needed)} members have not answered, {missing[0]} among them")
    survivors = tuple(m for m in needed if view.reports[m].has_state)
    if not survivors:
        return _nobody_has_state(view)
    if view.may_return and all(m in view.departed for m in survivors):
        back = next(iter(view.may_return))
        return Pending(f"only members that leave the job answer, and others may come back, {back} among them")
    for proposal in view.proposals:
        if proposal.id > view.current.id and not _is_held_back(proposal, survivors, view):
            return Pending(f"proposal {proposal.id} may be in force among members that do not answer")
    return Won(survivors)


def _nobody_has_state(view: RoundView) -> Pending | Lost:
    members = view.current.member_ids
    answered = [m for m in members if m in view.reports]
    if len(answered) < len(members) and not answered:
        return Pending("no member of the quorum answers")
    # A step commits only with every member's contribution. One that never had the state never contributed.
    never_had_it = any(not view.reports[m].has_state for m in answered)
    return Lost(is_unused=view.is_founding and never_had_it)


def _is_held_back(proposal: Quorum, survivors: Sequence[MemberId], view: RoundView) -> bool:
    """Is it certain that `proposal` has not become a running quorum behind our back?

    Needed when only leavers of `proposal` survive: its members may have switched and committed further steps while
    their messages are still on the way (found in simulation; docs/decisions/001). One survivor that is a member of
    it, or did not vote for it, or one of its members that answers without state, rules that out.
    """
    members = set(proposal.member_ids)
    if any(survivor in members for survivor in survivors):
        return True
    if any(m in view.reports and not view.reports[m].has_state for m in members):
        return True
    return any(not _voted_for(view.reports[survivor], proposal.id) for survivor in survivors)


def _voted_for(report: Report, proposal: QuorumId) -> bool:
    return report.phase is Phase.VOTING and report.voted_for == proposal
