"""Whom an open round waits for beyond its deadline, and why."""

from everstep.core.lighthouse_state import JobState
from everstep.core.messages import Activity, Cause
from everstep.core.progress import ProgressJudge
from everstep.core.roster import Roster
from everstep.core.types import MemberId


class Patience:
    """Answers questions about the shared JobState; changes nothing."""

    def __init__(self, state: JobState, roster: Roster, progress: ProgressJudge) -> None:
        self._state = state
        self._roster = roster
        self._progress = progress

    def puts_off(self, member: MemberId) -> bool:
        """It is connected, and answers a round only when its own collective fails."""
        peer = self._roster.of(member)
        return peer is not None and peer.link is not None and not peer.hello.freezes_on_notice

    def takes_its_time(self, member: MemberId) -> bool:
        """Its heartbeats say that it lives, and that it moves on."""
        peer = self._roster.of(member)
        if peer is None or not self.puts_off(member):
            return False
        beat = peer.heartbeat
        is_computing = beat.activity is Activity.COMPUTING and not beat.section
        return not is_computing or beat.activity_s < self._progress.limit_of(beat)

    def silent_with(self, member: MemberId) -> list[MemberId]:
        """Whose silence may end with this member's: all fell silent together, so it was their network, or ours."""
        state = self._state
        if state.current is None:
            return []
        here = [m for m in state.current.member_ids if m not in state.departed]
        if any(state.suspects.get(m) is not Cause.SILENT for m in here):
            return []
        return [m for m in here if m != member and self._roster.is_connected(m)]

    def may_return(self) -> list[MemberId]:
        """Suspects of the current quorum that did not leave, that nobody replaced, and whose end nobody ordered."""
        state = self._state
        return [
            member
            for member in (state.current.member_ids if state.current is not None else ())
            if state.suspects.get(member) in (Cause.LINK_CLOSED, Cause.SILENT, Cause.NO_READY)
            and member not in state.departed
            and not self._roster.is_replaced(member)
        ]
