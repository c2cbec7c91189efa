"""Live state of this member: what is registered, how it is offered to joiners, and how a joiner takes it over."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from everstep.core.moves import Recover
from everstep.core.recovery_plan import RecoveryPlan
from everstep.core.types import Lineage, MemberId, Quorum, QuorumId
from everstep.errors import ConfigError, RecoveryFailed, RemoteProtocolError
from everstep.recovery import Fetch, FetchRequest, Snapshot
from everstep.train.presence import Presence


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
    fetch_ms: float


class Recovery:
    """Offers and fetches on the training thread; the bytes travel on the recovery server's own threads."""

    def __init__(self, presence: Presence, state: LiveState) -> None:
        self._presence = presence
        self._state = state
        self._offered: str | None = None
        self._fetched: Fetched | None = None

    def offer(self, quorum: Quorum, plan: RecoveryPlan, rank: int) -> None:
        """At a step boundary, when the plan makes this member a source: a snapshot for its receivers."""
        receivers = plan.receivers_of(rank)
        if not receivers:
            return
        started_at = time.monotonic()
        snapshot = Snapshot.take(self._state.save())
        self._offered = _key(quorum.id, plan.lineage)
        assert self._presence.server is not None
        self._presence.server.offer(self._offered, snapshot)
        names = ",".join(str(quorum.members[receiver].id) for receiver in receivers)
        self._presence.log.info(
            "offering step=%d to=%s bytes=%d snapshot_ms=%.1f",
            plan.lineage.step,
            names,
            snapshot.total_bytes,
            (time.monotonic() - started_at) * 1e3,
        )

    def withdraw(self) -> None:
        """The step has moved on: whoever needed the snapshot has it."""
        if self._offered is not None:
            assert self._presence.server is not None
            self._presence.server.withdraw(self._offered)
            self._offered = None

    def fetch(self, move: Recover, source_url: str) -> None:
        """Fetch from the source at this URL, verify, keep for `apply`.

        Raises StepInterrupted, RecoveryFailed or, for good, ConfigError.
        """
        source = move.quorum.members[move.source]
        started_at = time.monotonic()
        request = FetchRequest(
            source_url=source_url,
            key=_key(move.quorum.id, move.lineage),
            deadline=math.inf,  # a failure of the source aborts it; a slow one is waited for
            expected=self._state.save(),
            auth=self._presence.auth,
        )
        try:
            with self._presence.fetching(Fetch(request)) as fetch:
                state = fetch.run()
        except RemoteProtocolError as error:  # from something else at that address, or a broken peer: ask again
            raise RecoveryFailed(f"{source_url} sent what no source sends: {error}") from error
        self._state.check(state)
        fetch_ms = (time.monotonic() - started_at) * 1e3
        self._fetched = Fetched(state=state, step=move.lineage.step, source=source.id, fetch_ms=fetch_ms)

    def apply(self) -> None:
        """Put the state fetched last in place."""
        fetched, self._fetched = self._fetched, None
        assert fetched is not None
        started_at = time.monotonic()
        self._state.load(fetched.state)
        self._presence.log.info(
            "recovered step=%d from=%s fetch_ms=%.1f apply_ms=%.1f",
            fetched.step,
            fetched.source,
            fetched.fetch_ms,
            (time.monotonic() - started_at) * 1e3,
        )


def _key(quorum_id: QuorumId, lineage: Lineage) -> str:
    return f"{quorum_id}/{lineage.step}/{lineage.digest.hex()}"
