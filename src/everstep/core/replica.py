"""A member's side of the protocol (rules T1 to T5 and L1 to L7 of DESIGN 4.4): one per replica group, in its leader.

Two threads share it under one lock, and every call is one critical section:

- the link thread feeds the lighthouse's messages and the state of the link;
- the training thread asks `next_move()` what to do, does it (build a group, recover, reduce, vote), and reports the
  result as an event. A result that arrives after a freeze, or from an older quorum, changes nothing (L7).

    RUNNING --GradientsReduced--> REDUCED --cast_vote--> VOTING --VoteEnded--> RUNNING (next step, or next attempt)

A Notice freezes it wherever it is; the round's Grant says how the step goes on, in a new quorum. All turns of the
phase are in transitions.py.
"""

from everstep.core.events import NAMES_MAX
from everstep.core.messages import (
    Adopted,
    Drain,
    Effect,
    Exit,
    Failed,
    Goodbye,
    Grant,
    Heartbeat,
    Hello,
    Log,
    Notice,
    Probe,
    Proposal,
    Ready,
    Refused,
    Send,
    Sever,
    Switch,
    ToMember,
    Waiting,
    Welcome,
)
from everstep.core.moves import (
    AskToLeave,
    BarrierEnded,
    CollectiveFailed,
    GradientsReduced,
    Leave,
    LinkDown,
    LinkUp,
    MoreReductions,
    ReadyToJoin,
    ReplicaEvent,
    StateRecovered,
    TrainAlone,
    VoteCast,
    VoteEnded,
)
from everstep.core.replica_state import ReplicaState
from everstep.core.transitions import Turn
from everstep.core.types import (
    Action,
    LineageEntry,
    LocalProtocolError,
    Member,
    MemberId,
    Phase,
    Quorum,
    QuorumId,
    RefusalCode,
    genesis,
)

FAILED_AGAIN_S = 2.0  # a failure that nobody reacted to is reported again


class Replica(ReplicaState):
    """State machine of one member. Read its attributes under the lock; only events change them."""

    # ---- the machine contract

    def receive(self, event: ToMember | ReplicaEvent, now: float) -> list[Effect]:
        """Feed a message of the lighthouse, a change of the link, or a result of the training thread."""
        if isinstance(event, ToMember):
            return self._from_lighthouse(event, now)
        match event:
            case LinkUp():
                return self._link_up()
            case LinkDown():
                self._is_up, self._beat_at, self._put_off = False, None, None  # an open round is told again
                return []
            case ReadyToJoin():
                was_ready, self._is_ready = self._is_ready, True
                return self._link_up() if self._is_up and not was_ready else []
            case BarrierEnded():
                return self._barrier_ended(event)
            case StateRecovered(quorum_id):
                return self._state_recovered(quorum_id)
            case GradientsReduced():
                return self._gradients_reduced(event)
            case MoreReductions():
                return self._more_reductions()
            case VoteEnded():
                return self._vote_ended(event)
            case CollectiveFailed():
                return self._collective_failed(event, now)
            case AskToLeave(grace_s):
                return self._ask_to_leave(now + grace_s if grace_s > 0 else None)
            case Leave(reason):
                return self._leave(reason)
            case TrainAlone(history):
                return self._train_alone(history)
        raise LocalProtocolError(f"unknown event {event!r}")

    def tick(self, now: float) -> list[Effect]:
        out: list[Effect] = []
        if self._beat_at is not None and now >= self._beat_at:
            out += self._send(self.heartbeat(now))
            self._beat_at = now + self._beat_interval_s
        if self._doubt_at is not None and now >= self._doubt_at:
            self._doubt_at = now + FAILED_AGAIN_S
            if self.quorum is not None:
                out += self._send(Failed(self.quorum.id, None, "still waiting for a decision"))
        if self._leave_at is not None and now >= self._leave_at and not self.has_left:
            out += [*self._leave("drained: nobody took its place in time"), *self._cut()]
        return out

    def next_deadline(self) -> float | None:
        leave_at = None if self.has_left else self._leave_at
        known = [d for d in (self._beat_at, self._doubt_at, leave_at) if d is not None]
        return min(known) if known else None

    def _ask_to_leave(self, leave_at: float | None) -> list[Effect]:
        self.wants_to_leave = True
        if leave_at is not None:
            self._leave_at = min(leave_at, self._leave_at or leave_at)
        return self._leave("drained before it had joined") if self.quorum is None else self._send(Drain())

    # ---- the link (L1 to L6)

    def _link_up(self) -> list[Effect]:
        self._is_up = True
        if not self._is_ready:
            return []
        out: list[Effect] = self._leave_group() if self.lineage is None else []
        if self.wants_to_leave and self.lineage is None:
            return out + self._leave("drained while it was away")
        out += self._send(self.hello())
        return out + (self._send(Drain()) if self.wants_to_leave else [])

    def _leave(self, reason: str) -> list[Effect]:
        self.has_left = True
        return self._send(Goodbye(reason, self.lineage is not None))

    def _from_lighthouse(self, message: ToMember, now: float) -> list[Effect]:
        match message:
            case Welcome():
                return self._welcome(message, now)
            case Waiting(reason):
                self.waiting_for = reason
                return [Log("waiting", {"why": reason})]
            case Notice():
                return self._notice(message)
            case Grant():
                return self._grant(message)
            case Proposal(quorum_id, members):
                proposal = self._resolve(quorum_id, members)
                if proposal is not None and self.quorum is not None and quorum_id > self.quorum.id:
                    self._proposals[quorum_id] = proposal
                return []
            case Switch():
                return self._switch(message)
            case Probe():
                return self._send(self.heartbeat(now))
            case Refused():
                return self._refused(message)
        raise LocalProtocolError(f"unknown message {message!r}")

    def _welcome(self, message: Welcome, now: float) -> list[Effect]:
        if self.lineage is not None and self.lighthouse not in ("", message.lighthouse):
            raise LocalProtocolError(f"admitted by lighthouse {message.lighthouse}, a stranger to {self.lighthouse}")
        if self.member.incarnation > 0 and message.lighthouse == self.lighthouse and message.member != self.member:
            return []  # it answers a Hello from before an eviction; the one sent since is answered next
        self.lighthouse = message.lighthouse
        self.member = message.member
        self.min_replicas = max(self.config.min_replicas, message.min_replicas)
        self._beat_interval_s = message.heartbeat_interval_s
        self._beat_at = now + message.heartbeat_interval_s
        return []

    def _notice(self, message: Notice) -> list[Effect]:
        if message.round < self.round:
            return []
        if not self.config.freezes_on_notice and self._is_in_a_collective():
            self._put_off = message
            return [Log("notice put off", {"round": str(message.round), "cause": message.cause.value})]
        return self._freeze(message)

    def _react_to_what_was_put_off(self) -> list[Effect]:
        return self._freeze(self._put_off) if self._put_off is not None else []

    def _freeze(self, message: Notice) -> list[Effect]:
        self._put_off = None
        out: list[Effect] = []
        if message.round > self.round:
            fields: dict[str, object] = {"round": str(message.round), "cause": message.cause.value}
            fields |= {"victims": ",".join(map(str, message.victims)) or "none", "detail": message.detail}
            out.append(Log("notice", fields))
        self.round = message.round
        if self.lineage is None:
            out += self._leave_group()
        else:
            self.is_frozen = True
            if self.phase is Phase.RUNNING:
                self.tag = None
            if self.quorum is not None and self.config.freezes_on_notice:
                out.append(Sever(self.quorum.id))
        out += self._send(Ready(message.round, self.report()))
        if self.wants_to_leave and self.lineage is None:
            out += self._leave("drained before it had joined")
        return out

    def _grant(self, grant: Grant) -> list[Effect]:
        if not self.is_frozen or grant.round != self.round or self.quorum is None or grant.quorum_id <= self.quorum.id:
            return []
        new = self._resolve(grant.quorum_id, grant.members)
        if new is None:
            return self._send(self.hello())
        if not new.is_member(self.member):
            raise LocalProtocolError(f"grant {grant.quorum_id} without its receiver {self.member}")
        how = self._apply_action(grant)
        self._proposals.clear()
        self.is_frozen = False
        self._enter(new)
        fields: dict[str, object] = {"round": str(grant.round), "quorum": str(new.id), "members": len(new.members)}
        return [Log("granted", fields | {"step": self.step, "attempt": self.attempt, "action": how})]

    def _apply_action(self, grant: Grant) -> str:
        """Rule L2. Returns what it came to, for the log."""
        how = grant.action.name.lower()
        if self.step < grant.step:
            if self.step != grant.step - 1 or self.phase is not Phase.VOTING or self.vote is not True:
                raise LocalProtocolError(f"cannot commit late from {self.report()} to step {grant.step}")
            self._commit()
            how = "late commit"
        elif self.attempt < grant.attempt:
            self._abort(grant.attempt)
            how = "late abort"
        elif grant.action is Action.COMMIT:
            self._commit()
        elif grant.action is Action.VOTE:
            self._turn(Turn.GRANTED_VOTE)
        elif grant.action is Action.REDUCE:
            self._turn(Turn.GRANTED_REDUCE)
            self.tag, self.vote = None, None
        if grant.action is Action.ABORT:
            self._abort(grant.attempt + 1)
        return how

    def _switch(self, switch: Switch) -> list[Effect]:
        new = self._resolve(switch.quorum_id, switch.members)
        if new is None or self.lineage is not None or not new.is_member(self.member):
            return []
        if self.quorum is not None and new.id <= self.quorum.id:
            return []
        if self._left_quorum is not None and new.id <= self._left_quorum:
            # Its collectives there are severed, and the others may be past the barrier: only a round helps.
            return self._send(Failed(new.id, None, "it had left this group while its link was down"))
        out: list[Effect] = self._leave_group()
        if switch.founding is not None and switch.founder in (None, self.member):
            self.lineage, self.attempt = switch.founding, 0
        self._turn(Turn.STATE_TAKEN)
        self._enter(new)
        return [*out, Log("switched in", {"quorum": str(new.id), "members": len(new.members)})]

    def _refused(self, message: Refused) -> list[Effect]:
        if message.code is RefusalCode.STUCK and message.member == self.member:
            self.refusal = message
            return [Log("refused", {"code": message.code.value, "detail": message.detail}), Exit(message.detail)]
        if message.code is RefusalCode.DRAINED and message.member == self.member:
            self.has_left = True
            return []
        if message.code is not RefusalCode.EVICTED:
            if message.code is not RefusalCode.STRANGER or self.lineage is None:
                self.refusal = message
            return [Log("refused", {"code": message.code.value, "detail": message.detail})]
        if message.member != self.member:
            return []
        out: list[Effect] = [Log("evicted", {"member": str(self.member), "why": message.detail})]
        self._put_off = None
        if self.wants_to_leave or self.has_left:
            self.has_left = True
            return out + self._cut()
        out += self._leave_group()
        self.member = MemberId(self.config.replica_id, message.incarnation)
        self.lineage, self.attempt = None, 0
        self.tag, self.vote = None, None
        self._turn(Turn.EVICTED)
        self.is_frozen = False
        self.evictions += 1
        self.waiting_for = "an invitation to rejoin after " + message.detail
        return out + self._send(self.hello())

    # ---- the training thread (T1 to T5)

    def _barrier_ended(self, event: BarrierEnded) -> list[Effect]:
        if self.is_frozen or self.quorum is None or event.quorum_id != self.quorum.id or self.is_settled:
            return []
        self.plan = self._plan(event.claims)
        self.is_settled = self.lineage is not None
        fields: dict[str, object] = {"quorum": str(self.quorum.id), "rank": self.rank, "step": self.plan.lineage.step}
        fields["members"] = ",".join(str(m.id) for m in self.quorum.members[:NAMES_MAX])
        if self.lineage is None and self.rank is not None:
            fields["state_from"] = str(self.quorum.members[self.plan.source_of[self.rank]].id)
        return [Log("settled", fields)]

    def _state_recovered(self, quorum_id: QuorumId) -> list[Effect]:
        if self.quorum is None or quorum_id != self.quorum.id or self.lineage is not None or self.plan is None:
            return []
        self.lineage, self.attempt = self.plan.lineage, self.plan.attempt
        self.is_settled = True
        self._turn(Turn.STATE_TAKEN)
        return [Log("recovered", {"quorum": str(quorum_id), "step": self.step})]

    def _gradients_reduced(self, event: GradientsReduced) -> list[Effect]:
        if not self._is_live(event.quorum_id) or self.phase is not Phase.RUNNING:
            return []
        self.tag = LineageEntry(self.step + 1, self.attempt, event.quorum_id, event.contributors, event.samples)
        self.vote = None
        self._turn(Turn.GRADIENTS_REDUCED)
        return []

    def _more_reductions(self) -> list[Effect]:
        """Back to RUNNING before the vote. The tag's digest counts reductions, so G3 never takes one for the other."""
        if self.phase is Phase.REDUCED and not self.is_frozen:
            self.tag = None
            self._turn(Turn.MORE_REDUCTIONS)
        return []

    def cast_vote(self, is_ok: bool) -> VoteCast | None:
        """Make the promise (T3). None when a freeze came first: ask `next_move` again.

        Returning and handing the vote to the collective must be one critical section for the freeze (H16): the shell
        issues it while it still holds the lock, or into a group that the freeze's Sever covers.
        """
        if self.is_frozen or not self.is_settled or self.phase is not Phase.REDUCED or self._doubt_at is not None:
            return None
        assert self.quorum is not None
        self.vote = self.vote if self.vote is not None else is_ok
        self.voted_for = max((q for q in self._proposals if q > self.quorum.id), default=self.quorum.id)
        self._turn(Turn.VOTE_CAST)
        return VoteCast(self.quorum.id, self.vote, self.voted_for)

    def cast_ballot(self, objection: str) -> tuple[VoteCast | None, list[Effect]]:
        """This rank's vote, no if there is an objection; the group's vote where that makes it complete."""
        return self.cast_vote(not objection), []

    def _vote_ended(self, event: VoteEnded) -> list[Effect]:
        if not self._is_live(event.quorum_id) or self.phase is not Phase.VOTING:
            return []
        assert self.quorum is not None
        if event.is_ok:
            self._commit()
        else:
            self._abort(self.attempt + 1)
        # Its collectives work, then: the round goes on at this boundary, where it interrupts nothing.
        if event.lowest != event.highest or event.lowest <= self.quorum.id:
            return self._react_to_what_was_put_off()
        proposal = self._proposals.get(event.lowest)
        if proposal is None:
            raise LocalProtocolError(f"everybody voted for proposal {event.lowest}, which this member never had")
        out = self._send(Adopted(proposal.id))
        if not proposal.is_member(self.member):
            self.has_left = True
            return [*out, Log("left", {"quorum": str(proposal.id), "step": self.step})]
        self._enter(proposal)
        out.append(Log("adopted", {"quorum": str(proposal.id), "members": len(proposal.members)}))
        return out + self._react_to_what_was_put_off()

    def _collective_failed(self, event: CollectiveFailed, now: float) -> list[Effect]:
        if self.has_left or self.is_frozen or self.quorum is None or event.quorum_id != self.quorum.id:
            return []
        self._doubt_at = now + FAILED_AGAIN_S
        peer = None
        if event.peer is not None and 0 <= event.peer < len(self.quorum.members):
            peer = self.quorum.members[event.peer].id
        fields: dict[str, object] = {"quorum": str(event.quorum_id), "peer": str(peer), "detail": event.detail}
        failed = Failed(event.quorum_id, peer, event.detail, event.is_unreachable)
        out = [Log("collective failed", fields), *self._send(failed)]
        if not self.config.freezes_on_notice:
            out.append(Sever(self.quorum.id))  # no notice ends what the others wait for from this member
        return out + self._react_to_what_was_put_off()

    def _train_alone(self, history: str) -> list[Effect]:
        self.member = MemberId(self.config.replica_id, 1)
        self.lineage = genesis(history, self.config.start_step)
        me = Member(self.member, self.config.store, self.config.recovery)
        self._enter(Quorum(QuorumId(0, 1), (me,), self.config.store))
        return []

    def _send(self, message: Adopted | Drain | Failed | Goodbye | Heartbeat | Hello | Ready) -> list[Effect]:
        """While the link is down nothing is kept for it: the next Hello says everything."""
        return [Send(message)] if self._is_up else []
