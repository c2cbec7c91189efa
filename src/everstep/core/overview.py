"""What a person asks of a job: its quorum, its round, and how each process is."""

from collections.abc import Collection

from everstep.core.lighthouse_state import JobState
from everstep.core.recovery_book import RecoveryBook
from everstep.core.roster import Peer, Roster
from everstep.core.types import MemberId, Phase


def overview(
    state: JobState, roster: Roster, joiners: Collection[MemberId], recoveries: RecoveryBook, now: float
) -> dict[str, object]:
    """Plain JSON values, with a row for each process that said Hello."""
    peers = roster.peers()
    rows = [{**_row(p, _standing(p, state, joiners), now), "recovery": recoveries.status(p.member)} for p in peers]
    return {
        "epoch": state.epoch,
        "history": state.history,
        "quorum": str(state.current.id) if state.current else None,
        "members": sorted(rows, key=lambda row: str(row["replica_id"])),
        "quorum_members": [str(m) for m in state.current.member_ids] if state.current else [],
        "proposal": str(state.wanted.id) if state.wanted else None,
        "round": str(state.round.id) if state.round else None,
        "failures": state.failures,
        "ended": state.ended,
    }


def _row(peer: Peer, standing: str, now: float) -> dict[str, object]:
    beat = peer.heartbeat
    return {
        "replica_id": peer.member.replica_id,
        "incarnation": peer.member.incarnation,
        "state": standing,
        "connected": peer.link is not None,
        "heard_s_ago": round(max(0.0, now - peer.heard_at), 3),
        "step": beat.step,
        "phase": Phase(beat.phase).name.lower(),
        "activity": beat.activity.name.lower(),
        "activity_s": round(beat.activity_s, 3),
        "section": beat.section,
    }


def _standing(peer: Peer, state: JobState, joiners: Collection[MemberId]) -> str:
    if peer.member in state.suspects:
        return "suspect"
    if state.is_current(peer.member):
        return "leaving" if peer.member in state.leaving else "member"
    return "joiner" if peer.member in joiners else "waiting"
