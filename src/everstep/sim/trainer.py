"""What every training thread of the virtual world does: its collectives, and live state, lent and taken over."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from everstep.core.messages import Activity
from everstep.core.moves import BarrierEnded, CollectiveFailed, Recover, StateRecovered
from everstep.core.recovery_plan import Claim
from everstep.core.types import Lineage, MemberId, Quorum, QuorumId
from everstep.sim.checkers import TORN, Loan, Memory, Violation, Weights
from everstep.sim.network import NoAnswer, Outcome
from everstep.sim.party import Party

if TYPE_CHECKING:
    from everstep.sim.world import World

COLLECTIVE_TIMEOUT_S = 30.0  # where no notice ends them: longer than anybody computes


class Trainer(Party):
    """A party, as far as the other members of its quorum see it."""

    def __init__(self, world: "World", name: str, replica_id: str, initial: Weights) -> None:
        super().__init__(world, name, replica_id, initial)
        self._settling: QuorumId | None = None  # past its own barrier; what comes of it is next
        self.loan: Loan | None = None  # while others may believe what they read here
        self.is_torn = False  # what it trains is neither its old state nor a new one
        self._changes = 0  # of what it trains
        self._fetch: object = None  # the newest that is complete
        self.fetched_in: set[QuorumId] = set()  # all of its part of the state

    def _mark(self, activity: Activity) -> None:
        self.replica.mark(activity, self._world.now)

    def _sever(self, up_to: QuorumId) -> None:
        self._world.leave_quorums(self, up_to)
        if self._busy is not None and self._busy[0] != "compute":
            self._busy = None

    def wait_for(self, what: tuple[str, ...], delay: float, then: Callable[[], None]) -> None:
        self._busy = what

        def woken() -> None:
            if not self.is_alive or self._busy is not what:
                return
            if self._world.now < self.frozen_until:
                self._world.at(self.frozen_until, woken)
                return
            self._busy = None
            then()
            self._advance()

        self._world.after(delay, woken)

    def _issue(self, quorum: Quorum, kind: str, value: object, then: Callable[[Sequence[object]], None]) -> None:
        token = (kind, str(quorum.id))
        self._busy = token
        if kind != "meet" or self.loan is not None:  # a joiner is recovering until then
            self._mark(Activity.WAITING)

        def done(values: Outcome) -> None:
            if not self.is_alive:
                return
            if self._world.now < self.frozen_until:
                self._world.at(self.frozen_until, lambda: done(values))
                return
            if self._busy is token:
                self._busy = None
                if isinstance(values, NoAnswer):
                    rank = quorum.rank_of(values.peer)
                    self._report(CollectiveFailed(quorum.id, rank, f"no answer: {kind}", is_unreachable=True))
                elif values is None:
                    self._report(CollectiveFailed(quorum.id, None, kind))
                else:
                    then(values)
            elif values is not None and not isinstance(values, NoAnswer):
                then(values)  # it raced with a freeze, or an error of another path: the machine must ignore it

        if not self.replica.config.freezes_on_notice:

            def expired() -> None:
                if self._busy is token:
                    done(None)

            self._world.after(COLLECTIVE_TIMEOUT_S, expired)
        self._world.joined(self, quorum.id)
        collectives = self._world.collectives_of(self.rank)
        members = (quorum.id, quorum.member_ids)
        collectives.issue(members, self.replica.member, kind, value, done)
        if collectives.mixed:
            raise Violation(collectives.mixed)

    def _is_let_go(self) -> bool:
        """The others go on without it: in the end they close what it waits in; but not for one that they cannot reach.

        Most collectives have a deadline of their own for that. A transfer, and the meeting after it, have none.
        """
        assert self._busy is not None
        return self.replica.has_left and self._busy[0] not in ("meet", "transfer")

    def _built(self, quorum: Quorum, values: Sequence[object]) -> None:
        self._settling = quorum.id
        claims = tuple(v for v in values if isinstance(v, Claim))
        self._report(BarrierEnded(quorum.id, claims))

    def _recover(self, move: Recover) -> None:
        self._mark(Activity.RECOVERING)
        if self._world.lends:
            self._world.transfer_type(self, self._world, move, lambda weights: self._fetched_all(move, weights)).start()
        else:
            self._copy(move.quorum, move.source, move.lineage)

    def _fetched_all(self, move: Recover, fetched: Weights) -> None:
        """Let go of those who lent it, and go on with it."""
        self._has_fetched(move.quorum)
        newest = self._fetch = object()

        def met() -> None:
            # Where the end of the meeting raced with a freeze, its thread may be elsewhere by now.
            if self._busy is None and self._fetch is newest and self.replica.lineage is None:
                self._take(move.lineage, fetched)
                self._report(StateRecovered(move.quorum.id))

        self._issue(move.quorum, "meet", None, lambda _: met())

    def _has_fetched(self, quorum: Quorum) -> None:
        self.fetched_in.add(quorum.id)
        self._world.faults.reached("Fetched", self)

    def fail_fetch(self, move: Recover, why: str) -> None:
        self._report(CollectiveFailed(move.quorum.id, move.source, f"recovery: {why}"))

    def may_overwrite(self, lineage: Lineage) -> bool:
        """As `train/recovering.py`: a fresh process of a group of one rank, and not at the beginning of a history."""
        replica = self.replica
        return self._world.ranks == 1 and replica.evictions == 0 and lineage.step > replica.config.start_step

    def tear(self) -> None:
        """The first chunk lands in what it trains."""
        self.is_torn = True
        self.weights = Weights(TORN, TORN)

    # ---- a donor

    @property
    def memory(self) -> Memory:
        return Memory(self.weights.value, self.weights.step, self._changes)

    def _lends(self) -> bool:
        """After a barrier, before anything changes: where others need the state it keeps still until they have it."""
        quorum_id, self._settling = self._settling, None
        replica = self.replica
        quorum, plan = replica.quorum, replica.plan
        if quorum is None or quorum.id != quorum_id or plan is None or replica.is_frozen or not self._world.lends:
            return False
        if not plan.source_of or replica.rank in plan.source_of:
            return False
        self.loan = Loan(quorum.id, self.memory)
        self._world.checkers.lent(self.name, plan.lineage, self.weights)
        self._world.faults.reached("Lent", self)
        replica.book(replica.next_move(), self._world.now)
        return self._keep_still(quorum, [quorum.members[rank].id for rank in plan.source_of])

    def _keep_still(self, quorum: Quorum, joiners: Sequence[MemberId]) -> bool:
        def let_go() -> None:
            ranks = range(self._world.ranks)
            parties = [self._world.process_of(joiner, rank) for joiner in joiners for rank in ranks]
            have_all = all(party is not None and quorum.id in party.fetched_in for party in parties)
            self._world.checkers.let_go(self.name, quorum.id, have_all=have_all)
            self._advance()

        self._issue(quorum, "meet", None, lambda _: let_go())
        return True

    def _revoke(self) -> None:
        """The training thread goes on, for whatever reason."""
        if self.loan is not None:
            self.loan.is_revoked, self.loan = True, None

    def _change(self) -> None:
        """What it trains is about to change: by a forward pass (running means), an optimizer, or a state taken over."""
        self._world.checkers.changes(self.name, self.loan)
        self._changes += 1

    # ---- without loans: the donors copy, for members of an older version

    def _copy(self, quorum: Quorum, source: int, lineage: Lineage) -> None:
        member = quorum.members[source].id

        def fetched() -> None:
            donor = self._world.process_of(member, self.rank)
            if not self._world.collectives_of(self.rank).has_path(member.replica_id, self.replica_id):
                self._report(CollectiveFailed(quorum.id, source, "no answer: source", is_unreachable=True))
                return
            if donor is None or not donor.is_alive or donor.replica.lineage != lineage:
                self._report(CollectiveFailed(quorum.id, source, "its source is gone, or went on"))
                return
            if donor.weights.step != lineage.step:  # its optimizer has not run yet
                self.wait_for(("transfer",), self._world.draw("message"), fetched)
                return
            self._take(lineage, donor.weights)
            self._report(StateRecovered(quorum.id))

        self.wait_for(("transfer",), self._world.draw("transfer"), fetched)

    def _take(self, lineage: Lineage, weights: Weights) -> None:
        self._change()
        self.weights, self.is_torn = weights, False
        self._applied_step, self._history = lineage.step, lineage.history
        self._world.checkers.recovered(self.name, lineage, weights)
