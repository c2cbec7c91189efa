"""A member's machine for tests, and shortcuts to each phase of a step."""

import copy

from everstep.core.messages import (
    Effect,
    Grant,
    Proposal,
    Send,
    Switch,
    ToMember,
    Welcome,
    whole,
)
from everstep.core.moves import (
    BarrierEnded,
    GradientsReduced,
    LinkUp,
    ReadyToJoin,
    ReplicaConfig,
    ReplicaEvent,
)
from everstep.core.recovery_plan import Claim
from everstep.core.replica import Replica
from everstep.core.types import (
    Action,
    FailureRound,
    Member,
    MemberId,
    Quorum,
    QuorumId,
    genesis,
)

A, B, C = MemberId("a", 1), MemberId("b", 2), MemberId("c", 3)
FIRST = Quorum(QuorumId(1, 1), (Member(A), Member(B)), "s")
LATER = Quorum(QuorumId(1, 2), (Member(A),), "s")
GROWN = Quorum(QuorumId(1, 3), (Member(A), Member(B), Member(C)), "s")
WITHOUT_A = Quorum(QuorumId(1, 4), (Member(B),), "s")
ROUND = FailureRound(1, 1)


def welcome(member: MemberId = A) -> Welcome:
    return Welcome(member, "lh", 0.5, 2.0)


def grant(
    action: Action, *, step: int = 0, attempt: int = 0, quorum: Quorum = LATER, round_: FailureRound = ROUND
) -> Grant:
    return Grant(round_, quorum.id, whole(quorum), step, attempt, action)


def proposal(quorum: Quorum) -> Proposal:
    return Proposal(quorum.id, whole(quorum))


def sent(effects: list[Effect]) -> list[object]:
    return [effect.message for effect in effects if isinstance(effect, Send)]


class Driver(Replica):
    """A replica with a clock that stands still."""

    def __init__(self, **settings: object) -> None:
        super().__init__(ReplicaConfig(replica_id="a", nonce="n", **settings))  # type: ignore[arg-type]

    def tell(self, *events: ToMember | ReplicaEvent) -> list[Effect]:
        out: list[Effect] = []
        for event in events:
            out += self.receive(event, 1.0)
        return out


def joined(**settings: object) -> Driver:
    replica = Driver(**settings)
    replica.tell(ReadyToJoin(), LinkUp(), welcome())
    return replica


def settled(**settings: object) -> Driver:
    """A founding member at step 0, past the barrier."""
    replica = joined(**settings)
    replica.tell(Switch(FIRST.id, whole(FIRST), genesis("h"), A))
    replica.tell(BarrierEnded(FIRST.id, (Claim(genesis("h"), 0), Claim(None, 0))))
    return replica


def reduced(**settings: object) -> Driver:
    replica = settled(**settings)
    replica.tell(GradientsReduced(FIRST.id, 2, b"s"))
    return replica


def voting(is_ok: bool = True) -> Driver:
    replica = reduced()
    assert replica.cast_vote(is_ok) is not None
    return replica


def told(replica: Driver, event: ToMember | ReplicaEvent) -> bool:
    """Whether `event` changed anything."""
    before = copy.deepcopy(vars(replica))
    effects = replica.tell(event)
    return bool(effects) or vars(replica) != before
