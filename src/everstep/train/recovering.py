"""Live state of this member: what is registered, how it is offered to joiners, and how a joiner takes it over."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from everstep.core.moves import Recover
from everstep.core.recovery_plan import RecoveryPlan
from everstep.core.recovery_report import RecoveryReport
from everstep.core.types import MemberId
from everstep.errors import ConfigError, RecoveryFailed, RemoteProtocolError
from everstep.recovery import Arrival, Fetching, FetchReport, InPlace, Landing, Snapshot, Transfer
from everstep.train.presence import Presence
from everstep.train.recovery_watch import RecoveryWatch
from everstep.train.transports import Roll


class Stateful(Protocol):
    """torch's modules, optimizers, schedulers, scalers and the like."""

    def state_dict(self) -> dict[str, object]: ...

    def load_state_dict(self, state_dict: dict[str, object], /) -> object: ...


Save = Callable[[], Mapping[str, object]]
Load = Callable[[dict[str, object]], object]


class LiveState:
    """Everything that a joiner copies, by name. The training thread's own."""

    def __init__(self) -> None:
        self._parts: dict[str, tuple[Save, Load]] = {}

    def register(self, name: str, save: Save, load: Load) -> None:
        if name in self._parts:
            raise ConfigError(f"{name!r} is registered already; give the second object a name of its own")
        self._parts[name] = (save, load)

    def save(self) -> dict[str, object]:
        return {name: dict(save()) for name, (save, _) in self._parts.items()}

    def check(self, state: dict[str, object]) -> None:
        """Raises ConfigError for parts that only one side has."""
        missing = [name for name in self._parts if name not in state]
        unknown = [name for name in state if name not in self._parts]
        if missing or unknown:
            raise ConfigError(
                f"this script registers other state than its peers (only here: {missing or 'none'}, only there: "
                f"{unknown or 'none'}); every replica group must run the same script"
            )

    def load(self, state: dict[str, object]) -> None:
        """Apply a state whose every byte is verified, and that was checked."""
        for name, (_, load) in self._parts.items():
            part = state[name]
            assert isinstance(part, dict)
            load(part)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fetched:
    """A state that waits to be applied."""

    state: dict[str, object]
    step: int
    source: MemberId
    prepare_ms: float  # a part of fetch_ms: until bytes could move
    fetch_ms: float
    report: FetchReport


class Recovery:
    """Offers and fetches on the training thread; the bytes travel on the transport's own threads."""

    def __init__(self, presence: Presence, state: LiveState) -> None:
        self._presence = presence
        self._state = state
        self._offered: tuple[str, Snapshot] | None = None
        self._offer_said = ""  # of the offer: which step, to whom
        self._fetched: Fetched | None = None
        self._is_torn = False  # this member's own tensors hold neither the old state nor a new one

    def offer(self, roll: Roll, plan: RecoveryPlan, *, is_lent: bool) -> None:
        """At a step boundary, when the plan makes this member a source: a snapshot for its receivers.

        `is_lent`: `await_joiners` follows, before anything changes; otherwise they get a copy.
        """
        self._offer_said = ""
        transfers = roll.donations(plan)
        if not transfers:
            return
        started_at = time.monotonic()
        snapshot = (Snapshot.lend if is_lent else Snapshot.take)(self._state.save())
        self._offered = transfers[0].key, snapshot
        self._presence.transport.offer(snapshot, transfers)
        names = ",".join(transfer.joiner.name for transfer in transfers)
        self._offer_said = f"step={plan.lineage.step} to={names} bytes={snapshot.total_bytes}"
        self._presence.log.info("offering %s snapshot_ms=%.1f", self._offer_said, (time.monotonic() - started_at) * 1e3)

    def await_joiners(self) -> None:
        """Keep still until they have the state: what they read are the live tensors.

        It costs no step any time: the step at hand cannot commit before they have it and contribute. Raises as a
        collective does; then, too, nobody reads any more what may change from here on.
        """
        started_at = time.monotonic()
        with self._presence.changed:
            replica = self._presence.replica
            replica.book(replica.next_move(), started_at)
        try:
            self.meet()
        finally:
            self.withdraw()
        if self._offer_said:
            self._presence.log.info("sent %s send_ms=%.1f", self._offer_said, (time.monotonic() - started_at) * 1e3)

    def meet(self) -> None:
        """Of donors and joiners. However long: who dies ends it, or the notice of his death, where it is heeded."""
        self._presence.group.meet(is_patient=self._presence.replica.config.freezes_on_notice)

    def check_whole(self) -> None:
        """Raises RecoveryFailed where this member is said to hold the state, and its own is half overwritten."""
        if self._is_torn:
            raise RecoveryFailed(
                "a new history was to begin with this process's weights, but a transfer of live state that did not end "
                "has overwritten a part of them: start this replica group again"
            )

    def withdraw(self) -> None:
        """The step has moved on: whoever needed the snapshot has it."""
        if self._offered is not None:
            key, snapshot = self._offered
            snapshot.revoke()
            self._presence.transport.withdraw(key)
            self._offered = None

    def fetch(self, move: Recover, roll: Roll) -> None:
        """Fetch from the donors, verify, keep for `apply`.

        Raises StepInterrupted, RecoveryFailed or, for good, ConfigError.
        """
        source = move.quorum.members[move.source]
        started_at = time.monotonic()
        own = self._state.save()
        others = [rank for rank in move.donors if rank != move.source]
        transfer = roll.transfer(move.lineage, roll.rank, (move.source, *others))
        names = ",".join(donor.name for donor in transfer.donors)
        self._presence.log.info("recovering step=%d from=%s", move.lineage.step, names)
        is_in_place = self._may_overwrite(move)
        arrival = Arrival(own, InPlace(own) if is_in_place else Landing())
        fetch = self._presence.transport.fetch(transfer, arrival)
        try:
            with self._presence.fetching(fetch, move.quorum.id), self._shown(), self._watch(move, transfer, fetch):
                self._is_torn |= is_in_place
                state = fetch.run()
        except RemoteProtocolError as error:  # from something else at that address, or a broken peer: ask again
            raise RecoveryFailed(f"{names} sent what no source sends: {error}") from error
        self._state.check(state)
        fetch_ms = (time.monotonic() - started_at) * 1e3
        self._fetched = Fetched(
            state=state,
            step=move.lineage.step,
            source=source.id,
            prepare_ms=max(0.0, fetch.report.prepared_at - started_at) * 1e3,
            fetch_ms=fetch_ms,
            report=fetch.report,
        )

    def _may_overwrite(self, move: Recover) -> bool:
        """The state may land in this process's own tensors, and be lost when the transfer fails.

        Not where other ranks must apply theirs together with it; not over a state that was the job's once, which may
        be the last one; not at the beginning of a history, when the founder's death makes founders of the others.
        """
        replica = self._presence.replica
        is_first = move.lineage.step <= replica.config.start_step
        return self._presence.group_size == 1 and replica.evictions == 0 and not is_first

    @contextlib.contextmanager
    def _shown(self) -> Iterator[None]:
        """In the heartbeats, as the section that this member is in."""
        replica = self._presence.replica
        replica.open_section("state")
        try:
            yield
        finally:
            replica.close_section(time.monotonic())

    def _watch(self, move: Recover, transfer: Transfer, fetch: Fetching) -> RecoveryWatch:
        return RecoveryWatch(
            first=RecoveryReport(quorum_id=move.quorum.id, step=move.lineage.step),
            names={donor.address or donor.name: donor.name for donor in transfer.donors},
            transport=self._presence.transport.name,
            fetch=fetch.report,
            show=self._show,
        )

    def _show(self, report: RecoveryReport, is_line: bool) -> None:
        """In the heartbeats, and in the log of a long one."""
        presence = self._presence
        presence.run(lambda now: presence.replica.show_recovery(report, now))
        if is_line:
            presence.log.info(
                "recovering step=%d bytes=%d of=%d mb_s=%.1f from=%s seconds=%.1f retries=%d digest_errors=%d",
                report.step,
                report.done_bytes,
                report.total_bytes,
                report.bytes_per_s / 1e6,
                ",".join(report.donors) or "nobody",
                report.seconds,
                report.retries,
                report.digest_errors,
            )

    def apply(self) -> None:
        """Put the state fetched last in place."""
        fetched, self._fetched = self._fetched, None
        assert fetched is not None
        started_at = time.monotonic()
        self._state.load(fetched.state)
        self._is_torn = False
        report = fetched.report
        self._presence.log.info(
            "recovered step=%d from=%s prepare_ms=%.1f fetch_ms=%.1f apply_ms=%.1f bytes=%d donors=%d retries=%d "
            "digest_errors=%d",
            fetched.step,
            fetched.source,
            fetched.prepare_ms,
            fetched.fetch_ms,
            (time.monotonic() - started_at) * 1e3,
            report.total_bytes,
            len(report.bytes_from) or 1,
            report.retries,
            report.digest_errors,
        )
