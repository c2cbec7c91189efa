"""Messages and quorums in the words of the transcripts."""

from everstep.core.messages import (
    Adopted,
    Failed,
    Goodbye,
    Grant,
    Hello,
    MembersChange,
    Notice,
    Proposal,
    Ready,
    Refused,
    Switch,
    ToLighthouse,
    ToMember,
    Waiting,
    Welcome,
)
from everstep.core.types import Quorum, Report


def fields(fields: dict[str, object]) -> str:
    return " ".join(f"{key}={value}" for key, value in fields.items())


def listed(quorum: Quorum) -> str:
    return f"{quorum.id}({' '.join(map(str, quorum.member_ids))})"


def reported(report: Report) -> str:
    state = f"step {report.step} attempt {report.attempt} {report.phase.name}" if report.has_state else "no state"
    vote = {None: "", True: " voted ok", False: " voted no"}[report.vote]
    where = f" in {report.quorum_id}" if report.quorum_id else ""
    return f"{report.member} {state}{vote}{where}{' unsettled' if report.is_unsettled and report.has_state else ''}"


def changed(change: MembersChange) -> str:
    base = f"{change.base}" if change.base else "all"
    return " ".join([base, *(f"+{m.id}" for m in change.added), *(f"-{m}" for m in change.removed)])


def described(message: ToLighthouse | ToMember) -> str:
    kind = type(message).__name__
    match message:
        case Hello(report):
            return f"{kind} {reported(report)}"
        case Ready(round_, report):
            return f"{kind} {round_}: {reported(report)}"
        case Adopted(quorum_id):
            return f"{kind} {quorum_id}"
        case Failed(quorum_id, peer, detail):
            return f"{kind} {quorum_id} peer {peer}: {detail}"
        case Goodbye(reason, had_state):
            return f"{kind} {reason}{' (had the state)' if had_state else ''}"
        case Welcome(member):
            return f"{kind} {member}"
        case Waiting(reason):
            return f"{kind}: {reason}"
        case Proposal(quorum_id, members):
            return f"{kind} {quorum_id}: {changed(members)}"
        case Switch(quorum_id, members, founding, founder):
            founds = f" founding {founding}, state from {founder}" if founding else ""
            return f"{kind} {quorum_id}: {changed(members)}{founds}"
        case Notice(round_, victims, cause):
            return f"{kind} {round_}: {cause.value} {' '.join(map(str, victims)) or 'nobody'}"
        case Grant(round_, quorum_id, members, step, attempt, action):
            return f"{kind} {round_} -> {quorum_id}: {changed(members)}; step {step} attempt {attempt} {action.name}"
        case Refused(code, detail, _, incarnation):
            return f"{kind} {code.value}: {detail}{f' (now #{incarnation})' if incarnation else ''}"
    return kind
