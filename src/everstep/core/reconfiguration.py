"""Rounds, grants and proposals: how one quorum follows another (rules G1 to G5 and G7 of DESIGN 4.4)."""

from collections.abc import Iterable

from everstep.core.events import NAMES_MAX, EventKind, JobEvent, of_member, of_quorum
from everstep.core.lighthouse_state import JobState, OpenRound
from everstep.core.messages import (
    Cause,
    Effect,
    Grant,
    Log,
    Notice,
    Proposal,
    Publish,
    Refused,
    Send,
    Switch,
    Waiting,
)
from everstep.core.patience import Patience
from everstep.core.progress import ProgressJudge
from everstep.core.quorum import Lost, Pending, RoundView, Won, count_round
from everstep.core.resolution import resolve
from everstep.core.roster import Roster
from everstep.core.types import Member, MemberId, Quorum, QuorumId, RefusalCode, Report


class Reconfigurer:
    """Acts on the shared JobState; the machine in lighthouse.py tells it what happened."""

    def __init__(self, state: JobState, roster: Roster, joiners: dict[MemberId, None], progress: ProgressJudge) -> None:
        self._state = state
        self._roster = roster
        self._joiners = joiners
        self.patience = Patience(state, roster, progress)

    # ---- suspicion and rounds (G1, G2)

    def suspect(self, member: MemberId, cause: Cause, detail: str, now: float) -> list[Effect]:
        """Evidence says that `member` failed. Provisional until a Grant leaves it out."""
        state = self._state
        out: list[Effect] = []
        self._joiners.pop(member, None)
        if member in state.suspects:
            if cause is Cause.PROCESS_EXITED or state.suspects[member] in (Cause.SILENT, Cause.NO_READY, Cause.STUCK):
                state.suspects[member] = cause  # firmer evidence than silence, or that it stood still
            return out
        if member not in state.known_members:
            return self._refuse([member], "not heard of while it waited to join: " + detail)
        out += self._note_suspect(member, cause, detail)
        if not state.is_current(member):
            out += self._refuse([member], "suspected while joining: " + detail)
        if state.round is not None:
            state.round.reports.pop(member, None)
            state.round.missing.pop(member, None)
            if state.is_current(member):
                out += self._notice([member], cause, detail)
            out += self.try_grant(now)
        elif state.is_current(member):
            out += self.open_round((member,), cause, detail, now)
        else:
            out += self.propose()
        return out

    def _note_suspect(self, member: MemberId, cause: Cause, detail: str) -> list[Effect]:
        self._state.suspects[member] = cause
        out: list[Effect] = [Log("member suspected", {"member": str(member), "cause": cause.value, "detail": detail})]
        if cause is not Cause.LEFT:  # that was told when it said so, and is no failure
            quorum = self._state.current
            out.append(of_member(EventKind.MEMBER_FAILED, member, quorum=quorum, cause=cause, evidence=detail))
        return out

    def clear(self, member: MemberId, why: str) -> list[Effect]:
        """It was suspect, and has shown that it can answer."""
        if member in self._state.stuck:
            return []  # its link answers; its training thread would not
        if self._state.suspects.pop(member, None) in (None, Cause.LEFT):
            return []
        return [of_member(EventKind.MEMBER_CLEARED, member, quorum=self._state.current, evidence=why)]

    def open_round(self, victims: tuple[MemberId, ...], cause: Cause, detail: str, now: float) -> list[Effect]:
        state = self._state
        assert state.current is not None
        state.failures += 1
        missing = {m: None for m in state.current.member_ids if m not in state.suspects}
        state.round = OpenRound(
            id=state.new_round_id(),
            deadline=now + state.config.heartbeat_timeout_s,
            opened_at=now,
            missing=missing,
        )
        fields: dict[str, object] = {"round": str(state.round.id), "cause": cause.value, "detail": detail}
        fields["victims"] = ",".join(map(str, victims)) or "none"
        out: list[Effect] = [*self._notice(state.known_members, cause, detail, victims), Log("round opened", fields)]
        opened = JobEvent(
            kind=EventKind.ROUND_OPENED,
            quorum_id=str(state.current.id),
            round=str(state.round.id),
            cause=cause,
            evidence=detail,
            left=tuple(map(str, victims[:NAMES_MAX])),
        )
        out.append(Publish(opened))
        return out + self.try_grant(now)

    def _notice(
        self, members: Iterable[MemberId], cause: Cause, detail: str, victims: tuple[MemberId, ...] = ()
    ) -> list[Send]:
        assert self._state.round is not None
        members = list(members)
        for member in members:
            if self._roster.is_connected(member):
                self._state.round.noticed[member] = None
        return self._roster.send(Notice(self._state.round.id, victims, cause, detail), members)

    def notice_again(self, member: MemberId) -> list[Send]:
        return self._notice([member], Cause.OUT_OF_STEP, "a round is open")

    def ready(self, report: Report, now: float) -> list[Effect]:
        """An answer to the open round (the caller has compared the round)."""
        state = self._state
        assert state.round is not None
        out: list[Effect] = []
        member = report.member
        if member in state.stuck:
            return []
        silent = self.patience.silent_with(member)
        if member in state.known_members:
            out += self.clear(member, "it answered the round")
        state.round.reports[member] = report
        if report.has_state and report.quorum_id is not None and self.learn(report.quorum_id, out):
            assert state.current is not None
            state.round.missing = {
                m: None for m in state.current.member_ids if m not in state.suspects and m not in state.round.reports
            }
            out += self._notice([m for m in state.round.missing if m not in state.round.noticed], Cause.OUT_OF_STEP, "")
        state.round.missing.pop(member, None)
        if silent:
            state.round.missing |= dict.fromkeys(silent)
            state.round.deadline = now + state.config.heartbeat_timeout_s
            fields: dict[str, object] = {"round": str(state.round.id), "members": len(silent)}
            out.append(Log("all were silent; the others get as long to come back", fields))
        return out + self.try_grant(now)

    def give_up_waiting(self, now: float) -> list[Effect]:
        """The round's deadline passed: whoever has not answered becomes a suspect."""
        state = self._state
        assert state.round is not None
        state.round.deadline = now + state.config.heartbeat_timeout_s
        out: list[Effect] = []
        waiting_on = {m: None for m in state.round.missing if self.patience.takes_its_time(m)}
        for member in [m for m in state.round.missing if m not in waiting_on]:
            cause = Cause.NO_READY
            why = f"no answer to round {state.round.id} within {state.config.heartbeat_timeout_s:g} s"
            if self.patience.puts_off(member):
                cause = Cause.STUCK
                why = f"no progress in round {state.round.id}, while it puts the notice off"
                state.condemn(member)
            if member in state.suspects:
                state.suspects[member] = cause
                continue
            out += self._note_suspect(member, cause, why)
        state.round.missing = waiting_on
        return out + self.try_grant(now)

    def restate_round(self, now: float) -> list[Effect]:
        """The quorum under an open round turned out to be a newer one: its members must be frozen as well."""
        state = self._state
        assert state.round is not None
        assert state.current is not None
        waiting_for = [m for m in state.current.member_ids if m not in state.round.reports]
        state.round.missing = {m: None for m in waiting_for if m not in state.suspects}
        out: list[Effect] = []
        for member in waiting_for:
            out += self.notice_again(member)
        return out + self.try_grant(now)

    # ---- the decision (G3)

    def try_grant(self, now: float) -> list[Effect]:
        state = self._state
        if state.round is None or state.current is None or state.round.missing:
            return []
        view = RoundView(
            current=state.current,
            proposals=tuple(state.proposals.values()),
            reports=state.round.reports,
            suspects=state.suspects,
            is_founding=state.is_founding,
            departed=state.departed,
            may_return=self.patience.may_return() if state.departed else (),
        )
        match count_round(view):
            case Pending(why):
                return self._say_waiting(f"{why}; should they be gone for good, {state.how_to_give_up}")
            case Lost(is_unused) if is_unused:
                return self._abandon_founding()
            case Lost():
                return self._say_waiting(f"no member that holds the state answers; {state.how_to_give_up}")
            case Won(survivors):
                out = self._judge_paths(survivors, now)
                return out + self._grant(tuple(m for m in survivors if m not in state.suspects), now)
        raise AssertionError("unreachable")

    def _judge_paths(self, survivors: tuple[MemberId, ...], now: float) -> list[Effect]:
        """Make suspects of those who must make way because somebody else cannot reach them."""
        state = self._state
        assert state.round is not None
        assert state.current is not None
        reports = state.round.reports
        answered = [m for m in state.current.member_ids if m in reports and m not in state.suspects]
        first = {m: 2 * (not reports[m].has_state) + (m in state.leaving) for m in answered}
        verdicts = state.paths.judge(answered, max(reports[m].step for m in survivors), now, first.__getitem__)
        return [e for v in verdicts for e in self._note_suspect(v.member, Cause.BROKEN_PATH, v.detail)]

    def _say_waiting(self, why: str) -> list[Effect]:
        assert self._state.round is not None
        if self._state.round.reported_why == why:
            return []
        self._state.round.reported_why = why
        sends: list[Effect] = [*self._roster.send(Waiting(why), [*self._state.known_members, *self._joiners])]
        return [*sends, Log("round waits", {"round": str(self._state.round.id), "why": why})]

    def _abandon_founding(self) -> list[Effect]:
        """Everyone who held the initial state of a new history died before step 1 could commit: found it again."""
        state = self._state
        assert state.round is not None
        assert state.current is not None
        out: list[Effect] = [Log("founding abandoned", {"quorum": str(state.current.id)})]
        for member in state.current.member_ids:
            if member in state.round.reports and self._roster.is_connected(member):
                self._joiners[member] = None
            else:
                out += self._refuse([member], "its quorum was founded anew without it")
        state.forget_quorums()
        state.history = ""
        return [*out, state.persist()]

    def _grant(self, survivors: tuple[MemberId, ...], now: float) -> list[Effect]:
        state = self._state
        assert state.round is not None
        assert state.current is not None
        old, round_, known = state.current, state.round, state.known_members
        resolution = resolve([round_.reports[m] for m in survivors])
        kept = dict.fromkeys(survivors)
        left_out = [m for m in known if m not in kept]
        new = state.new_quorum({m.id: m for m in old.members if m.id in kept})
        state.current, state.round, state.is_founding = new, None, False
        state.proposals.clear()
        state.wanted = None
        suspects = dict(state.suspects)
        state.suspects.clear()
        for member in left_out:
            state.departed.pop(member, None)
            state.leaving.pop(member, None)
        out: list[Effect] = [state.persist()]
        for change, links in self._roster.split_by_known(new, old, survivors):
            grant = Grant(round_.id, new.id, change, resolution.step, resolution.attempt, resolution.action)
            out.append(Send(grant, links))
        out += self._leave_out(left_out, old, round_, suspects)
        fields: dict[str, object] = {
            "round": str(round_.id),
            "quorum": str(new.id),
            "members": len(new.members),
            "left_out": ",".join(str(m) for m in old.member_ids if m not in kept) or "none",
            "step": resolution.step,
            "attempt": resolution.attempt,
            "action": resolution.action.name,
            "took_ms": round((now - round_.opened_at) * 1000, 1),
        }
        out.append(Log("granted", fields))
        how = resolution.action.name.lower()
        changed = EventKind.QUORUM_CHANGED
        out.append(of_quorum(changed, new, old, round_id=round_.id, step=resolution.step, action=how))
        return out + self.propose()

    def _leave_out(
        self, left_out: list[MemberId], old: Quorum, round_: OpenRound, suspects: dict[MemberId, Cause]
    ) -> list[Effect]:
        """Evict for ever (G7) whoever the Grant leaves out, but for those who answered that they hold nothing."""
        evicted = []
        for member in left_out:
            report = round_.reports.get(member)
            answered_none = report is not None and not report.has_state and member not in suspects
            if answered_none and self._roster.is_connected(member):
                self._joiners[member] = None
            elif not old.is_member(member) and member in self._joiners and member not in suspects:
                continue  # proposed, never switched: it waits for the next proposal
            else:
                self._joiners.pop(member, None)
                evicted.append(member)
        self._state.left_out.update((member, suspects[member]) for member in evicted if member in suspects)
        out: list[Effect] = []
        for member in evicted:
            pause = self._state.paths.pause_of(member.replica_id) if suspects.get(member) is Cause.BROKEN_PATH else None
            out += self._refuse([member], pause.why if pause else "left out of the quorum that survived a failure")
        return out

    def _refuse(self, members: list[MemberId], detail: str) -> list[Effect]:
        out: list[Effect] = []
        for member in members:
            out.append(of_member(EventKind.MEMBER_EVICTED, member, evidence=detail))
            out += self.tell_evicted(member, detail)
        return out

    def tell_evicted(self, member: MemberId, detail: str) -> list[Effect]:
        """It is out for ever (G7). One that is stuck ends; any other goes on under a new incarnation."""
        self._state.evict(member)
        if not self._roster.is_connected(member):
            return []
        out: list[Effect] = []
        if member in self._state.stuck:
            refusal = Refused(RefusalCode.STUCK, "it stood still while the others waited: " + detail, member)
        else:
            refusal = Refused(RefusalCode.EVICTED, detail, member, self._state.new_incarnation(out))
        return [*out, *self._roster.send(refusal, [member])]

    # ---- growing and leaving (G4, G5)

    def learn(self, quorum_id: QuorumId, out: list[Effect]) -> bool:
        """Somebody is in `quorum_id`: if that is a newer one than ours, it is the current one from now on."""
        state = self._state
        if state.current is None or quorum_id <= state.current.id or quorum_id not in state.proposals:
            return False
        old, state.current = state.current, state.proposals[quorum_id]
        state.is_founding = False
        state.wanted = None  # proposed again under a new id: who has just come in was never sent it
        for other in [q for q in state.proposals if q <= quorum_id]:
            del state.proposals[other]
        left = [m for m in old.member_ids if not state.current.is_member(m)]
        for member in state.current.member_ids:
            self._joiners.pop(member, None)
        out.append(of_quorum(EventKind.QUORUM_CHANGED, state.current, old))
        for member in left:
            if member not in state.departed:
                why = "at a step boundary, as asked"
                out.append(of_member(EventKind.MEMBER_LEFT, member, quorum=old, evidence=why))
            state.leaving.pop(member, None)
            state.suspects.pop(member, None)
            state.departed.pop(member, None)
            state.evict(member)
            refusal = Refused(RefusalCode.DRAINED, "the others went on without it, as was asked", member)
            out += self._roster.send(refusal, [member])
        fields: dict[str, object] = {"quorum": str(quorum_id), "members": len(state.current.members)}
        fields["joined"] = ",".join(str(m) for m in state.current.member_ids if not old.is_member(m)) or "none"
        fields["left"] = ",".join(map(str, left)) or "none"
        out.append(Log("adopted", fields))
        return True

    def switch_joiners(self) -> list[Effect]:
        """Tell the current quorum's list to everyone in it: those without state enter it now, the others ignore it."""
        state = self._state
        assert state.current is not None
        groups = self._roster.split_by_known(state.current, None, state.current.member_ids)
        return [Send(Switch(state.current.id, change), links) for change, links in groups]

    def propose(self) -> list[Effect]:
        """Propose the quorum that joiners and leavers call for, unless it is proposed or in force already (G5)."""
        state = self._state
        current = state.current
        if state.round is not None or current is None:
            return []
        joiners = self._members_to_add(current)
        stay = {m.id: m for m in current.members if m.id not in state.leaving}
        members = (stay or {m.id: m for m in current.members}) | joiners
        if len({m.replica_id for m in members}) < len(members):
            return []  # an older incarnation of a joiner is still in: its death is on the way
        wanted = state.wanted or current
        if set(members) == set(wanted.member_ids):
            return []
        # The store stays with a member that holds the state: a joiner may not be up yet.
        host = next(m for m in current.members if m.id in members)
        new = state.new_quorum(members, store=host.store)
        state.proposals[new.id] = state.wanted = new
        out: list[Effect] = [state.persist()]
        for change, links in self._roster.split_by_known(new, current, current.member_ids):
            out.append(Send(Proposal(new.id, change), links))
        fields: dict[str, object] = {"quorum": str(new.id), "members": len(members)}
        fields["joining"] = ",".join(map(str, joiners)) or "none"
        fields["leaving"] = ",".join(str(m) for m in current.member_ids if m not in members) or "none"
        out += [Log("proposed", fields), of_quorum(EventKind.QUORUM_PROPOSED, new, current)]
        return out

    def resend_proposal(self, member: MemberId) -> list[Effect]:
        wanted = self._state.wanted
        if wanted is None:
            return []
        groups = self._roster.split_by_known(wanted, self._state.current, [member])
        return [Send(Proposal(wanted.id, change), links) for change, links in groups]

    def _members_to_add(self, current: Quorum) -> dict[MemberId, Member]:
        added = {}
        for member in self._joiners:
            peer = self._roster.of(member)
            if peer is None or peer.link is None or member in self._state.suspects or current.is_member(member):
                continue
            if member in self._state.held or self._state.paths.pause_of(member.replica_id) is not None:
                continue
            added[member] = peer.address
        return added
