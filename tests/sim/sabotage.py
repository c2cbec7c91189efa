"""Machines that lack one rule each. A simulation that does not catch them proves nothing."""

import msgspec

from everstep.core.admission import Admission
from everstep.core.agents import AgentDesk
from everstep.core.broken_paths import BrokenPaths, LeftOut
from everstep.core.founding import FoundingDesk
from everstep.core.lighthouse import Event, JobConfig, LighthouseMachine, LinkMessage
from everstep.core.messages import (
    Adopted,
    Effect,
    Grant,
    JournalRecord,
    Notice,
    Persist,
    Send,
    Switch,
    ToMember,
    whole,
)
from everstep.core.moves import ReplicaEvent, VoteCast, VoteEnded
from everstep.core.quorum import RoundView, Won, count_round
from everstep.core.reconfiguration import Reconfigurer
from everstep.core.replica import Replica
from everstep.core.roster import Peer
from everstep.core.types import Action, Phase, QuorumId, Report

# ---- members


class CommitsOnItsOwnVote(Replica):
    """T4 without the others' votes."""

    def receive(self, event: ToMember | ReplicaEvent, now: float) -> list[Effect]:
        if isinstance(event, VoteEnded):
            event = VoteEnded(event.quorum_id, self.vote is True, event.lowest, event.highest)
        return super().receive(event, now)


class AdoptsOnMinAlone(Replica):
    """T4 without MIN == MAX."""

    def receive(self, event: ToMember | ReplicaEvent, now: float) -> list[Effect]:
        if isinstance(event, VoteEnded):
            event = VoteEnded(event.quorum_id, event.is_ok, event.lowest, event.lowest)
        return super().receive(event, now)


class AdoptsOnMaxAlone(Replica):
    def receive(self, event: ToMember | ReplicaEvent, now: float) -> list[Effect]:
        if isinstance(event, VoteEnded):
            event = VoteEnded(event.quorum_id, event.is_ok, event.highest, event.highest)
        return super().receive(event, now)


class TakesLateResults(Replica):
    """L7 dropped: what completes after the freeze counts."""

    def _is_live(self, quorum_id: QuorumId) -> bool:
        return self.is_settled and self.quorum is not None and quorum_id == self.quorum.id


class ChangesItsVote(Replica):
    """T3 without the promise."""

    def cast_vote(self, is_ok: bool) -> VoteCast | None:
        self.vote = None
        return super().cast_vote(is_ok)


class DoesNotFreeze(Replica):
    """L1 without the freeze."""

    def receive(self, event: ToMember | ReplicaEvent, now: float) -> list[Effect]:
        out = super().receive(event, now)
        if isinstance(event, Notice):
            self.is_frozen = False
        return out


class HidesThatItIsUnsettled(Replica):
    """L6 without `is_unsettled`: nobody unfreezes who lost its Grant."""

    def report(self) -> Report:
        return msgspec.structs.replace(super().report(), is_unsettled=False)


class AdoptsInSilence(Replica):
    """T4 without Adopted."""

    def receive(self, event: ToMember | ReplicaEvent, now: float) -> list[Effect]:
        return [e for e in super().receive(event, now) if not (isinstance(e, Send) and isinstance(e.message, Adopted))]


class ReducesByTheCommitQuorum(Replica):
    """The lineage entry names the quorum of the commit, not of the reduction."""

    def _commit(self) -> None:
        if self.tag is not None and self.quorum is not None:
            self.tag = msgspec.structs.replace(self.tag, quorum_id=max(self.quorum.id, self.round_quorum))
        super()._commit()

    round_quorum = QuorumId(0, 0)

    def receive(self, event: ToMember | ReplicaEvent, now: float) -> list[Effect]:
        if isinstance(event, Grant):
            self.round_quorum = event.quorum_id
        return super().receive(event, now)


class ForgetsTheAttempt(Replica):
    """A reduction that failed its vote keeps its attempt number."""

    def report(self) -> Report:
        return msgspec.structs.replace(super().report(), attempt=0)


class EntersASeveredGroupAgain(Replica):
    """L4 without the memory of the group it left."""

    def _from_lighthouse(self, message: ToMember, now: float) -> list[Effect]:
        if isinstance(message, Switch):
            self._left_quorum = None
        return super()._from_lighthouse(message, now)


class DropsTheGradientWhenFrozen(Replica):
    """L1: VOTING must stay VOTING."""

    def _from_lighthouse(self, message: ToMember, now: float) -> list[Effect]:
        if isinstance(message, Notice) and self.phase is Phase.VOTING:
            self.phase, self.tag, self.vote = Phase.RUNNING, None, None
        return super()._from_lighthouse(message, now)


# ---- the lighthouse


class SabotagedLighthouse(LighthouseMachine):
    """The lighthouse with other parts."""

    changes_type: type[Reconfigurer] = Reconfigurer
    admission_type: type[Admission] = Admission
    founding_type: type[FoundingDesk] = FoundingDesk
    paths_type: type[BrokenPaths] = BrokenPaths

    def __init__(self, config: JobConfig, record: JournalRecord | None = None) -> None:
        super().__init__(config, record)
        self._state.paths = self.paths_type(config.path_pause_s)
        self._changes = self.changes_type(self._state, self._roster, self._joiners, self._progress)
        self._founding = self.founding_type(self._state, self._roster, self._joiners)
        parts = (self._state, self._roster, self._joiners, self._detector, self._changes)
        self._admission = self.admission_type(*parts, self._crashes, self._workers)
        self._agents = AgentDesk(*parts, self._admission, self._workers, self._judge_progress)


class KeepsNoJournal(LighthouseMachine):
    """Nothing is written before it is sent, or ever."""

    def start(self, now: float) -> list[Effect]:
        return [e for e in super().start(now) if not isinstance(e, Persist)]

    def receive(self, event: Event, now: float) -> list[Effect]:
        return [e for e in super().receive(event, now) if not isinstance(e, Persist)]

    def tick(self, now: float) -> list[Effect]:
        return [e for e in super().tick(now) if not isinstance(e, Persist)]


class JournalsAfterwards(LighthouseMachine):
    """The record is written after what rests on it was sent."""

    def receive(self, event: Event, now: float) -> list[Effect]:
        out = super().receive(event, now)
        return [e for e in out if not isinstance(e, Persist)] + [e for e in out if isinstance(e, Persist)]


class ActsOtherwise(LighthouseMachine):
    """G3 with another action."""

    replaced: Action
    by: Action

    def receive(self, event: Event, now: float) -> list[Effect]:
        return [self._replace(effect) for effect in super().receive(event, now)]

    def tick(self, now: float) -> list[Effect]:
        return [self._replace(effect) for effect in super().tick(now)]

    def _replace(self, effect: Effect) -> Effect:
        if isinstance(effect, Send) and isinstance(effect.message, Grant) and effect.message.action is self.replaced:
            return Send(msgspec.structs.replace(effect.message, action=self.by), effect.links)
        return effect


class ReducesAgainInsteadOfCommitting(ActsOtherwise):
    replaced, by = Action.COMMIT, Action.REDUCE


class VotesAgainInsteadOfCommitting(ActsOtherwise):
    replaced, by = Action.COMMIT, Action.VOTE


class CommitsInsteadOfReducing(ActsOtherwise):
    replaced, by = Action.REDUCE, Action.COMMIT


class AbortsInsteadOfCommitting(ActsOtherwise):
    replaced, by = Action.COMMIT, Action.ABORT


class _TakesEvictedBack(Admission):
    def _hello_with_state(self, peer: Peer, now: float) -> list[Effect]:
        current = self._state.current
        if current is not None and peer.member not in self._state.known_members:
            self._state.current = self._state.new_quorum({m.id: m for m in (*current.members, peer.address)})
        self._state.suspects.pop(peer.member, None)
        return super()._hello_with_state(peer, now)


class TakesEvictedBackAsSurvivors(SabotagedLighthouse):
    """G7 dropped: whoever still holds state counts as a survivor."""

    admission_type = _TakesEvictedBack


class _DoesNotHoldBack(Reconfigurer):
    def try_grant(self, now: float) -> list[Effect]:
        state = self._state
        if state.round is None or state.current is None or state.round.missing:
            return []
        view = RoundView(
            current=state.current, proposals=(), reports=state.round.reports, suspects=state.suspects, is_founding=False
        )
        decision = count_round(view)
        return self._grant(decision.survivors, now) if isinstance(decision, Won) else super().try_grant(now)


class GrantsToLeaversAlone(SabotagedLighthouse):
    """G3 without decisions/001."""

    changes_type = _DoesNotHoldBack


class _ProposesOnce(Reconfigurer):
    def resend_proposal(self, member: object) -> list[Effect]:
        return []


class SendsAProposalOnlyOnce(SabotagedLighthouse):
    """G6 without the proposal for who comes back."""

    changes_type = _ProposesOnce


class _SwitchesFoundersAgain(Admission):
    def _hello_without_state(self, peer: Peer, now: float) -> list[Effect]:
        state = self._state
        if state.is_founding and state.round is None and state.is_current(peer.member) and state.current is not None:
            return [Send(Switch(state.current.id, whole(state.current)), self._roster.links_of([peer.member]))]
        return super()._hello_without_state(peer, now)


class SwitchesFoundersAgain(SabotagedLighthouse):
    """A Switch without its founder, to members whose founding Switch was lost."""

    admission_type = _SwitchesFoundersAgain


class _LeavesNobodyOut(BrokenPaths):
    def judge(self, *_: object, **__: object) -> list[LeftOut]:
        return []


class ToleratesBrokenPaths(SabotagedLighthouse):
    """Rounds without end, and no step (decisions/009)."""

    paths_type = _LeavesNobodyOut


class _LetsInAtOnce(BrokenPaths):
    def pause_of(self, replica_id: str) -> None:
        return None


class FlapsOverBrokenPaths(SabotagedLighthouse):
    """Who makes way comes back at once, and makes way again."""

    paths_type = _LetsInAtOnce


class NeverOpensARoundForFailed(LighthouseMachine):
    """G1 without Failed: a broken path between two live members is nobody's death."""

    def receive(self, event: Event, now: float) -> list[Effect]:
        if isinstance(event, LinkMessage) and type(event.message).__name__ == "Failed":
            return self.tick(now)
        return super().receive(event, now)
