"""Groups that die again and again at the same place: let in with growing pauses, and then left out.

A death counts when the next process of a group says Hello and the one before never said Goodbye. It is one "at the same
place" when that process had not come past the step that its predecessor died at, or had made hardly a step at all. Each
entry and each death of such a group costs all others a reconfiguration, and none of it brings the job on. Steps are
known from heartbeats, so "the same step" is as exact as those are frequent.

A process that was only cut off comes back under its own nonce, and is no death. Idea: Kubernetes' CrashLoopBackOff;
counting by progress instead of by time is from NVIDIA's resiliency extension (`max_no_progress_cycles`).
"""

import dataclasses

STEPS_OF_PROGRESS = 10  # committed in one process, or beyond its predecessor's death
GROUPS_MAX = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrashPolicy:
    """After `free` deaths in a row at one place pauses begin; with `limit` the group is left out. 0 turns both off."""

    free: int = 2
    pause_s: float = 1.0
    pause_max_s: float = 60.0
    limit: int = 8
    forget_s: float = 600.0  # after the last death


@dataclasses.dataclass(frozen=True)
class Verdict:
    """On a process that starts: held until then (an instant in the past: not at all), or turned away."""

    held_until: float
    is_left_out: bool


@dataclasses.dataclass
class _Record:
    nonce: str
    steps: int = 0  # committed by the process at hand
    step: int = -1  # that the job had reached by its word; -1: it never held the state
    stride: int = 0  # steps between its last two heartbeats
    has_left: bool = False  # said Goodbye
    deaths: int = 0  # in a row, at one place
    died_at_step: int = -1
    is_step_same: bool = False  # all of them at one step
    died_at: float = 0.0
    pause_until: float = 0.0


class CrashDesk:
    """One job's. Bounded; O(1) a message."""

    def __init__(self, policy: CrashPolicy) -> None:
        self._policy = policy
        self._records: dict[str, _Record] = {}

    def started(self, replica_id: str, nonce: str, now: float) -> Verdict:
        """A process said Hello; asked again for the same one, the answer is the same."""
        record = self._records.get(replica_id)
        if record is None:
            if len(self._records) >= GROUPS_MAX:
                del self._records[next(iter(self._records))]
            record = self._records[replica_id] = _Record(nonce)
        if record.nonce != nonce:
            self._count(record, now)
            record.nonce, record.steps, record.step, record.stride, record.has_left = nonce, 0, -1, 0, False
            extra = record.deaths - self._policy.free
            pause_s = min(self._policy.pause_max_s, self._policy.pause_s * 2.0 ** min(extra - 1, 30))
            record.pause_until = now + pause_s if extra > 0 and self._policy.limit > 0 else 0.0
        return Verdict(record.pause_until, 0 < self._policy.limit <= record.deaths)

    def _count(self, record: _Record, now: float) -> None:
        if record.has_left or now - record.died_at > self._policy.forget_s:
            record.deaths, record.died_at_step = 0, -1
        if record.has_left:
            return
        is_same = record.step >= 0 and abs(record.step - record.died_at_step) <= record.stride
        beyond = record.step - record.died_at_step
        is_first = record.deaths == 0
        if record.steps < STEPS_OF_PROGRESS or (not is_first and beyond <= max(STEPS_OF_PROGRESS, 2 * record.stride)):
            record.is_step_same = is_same and (record.is_step_same or record.deaths == 1)
            record.deaths, record.died_at_step = record.deaths + 1, max(record.died_at_step, record.step)
        else:
            record.deaths, record.died_at_step, record.is_step_same = 1, record.step, False
        record.died_at = now

    def heard(self, replica_id: str, nonce: str, steps: int, step: int) -> None:
        record = self._records.get(replica_id)
        if record is not None and record.nonce == nonce:
            record.stride = max(0, step - record.step) if record.step >= 0 else 0
            record.steps, record.step = steps, step

    def left(self, replica_id: str) -> None:
        if replica_id in self._records:
            self._records[replica_id].has_left = True

    def pardon(self, replica_id: str) -> bool:
        """The operator says that it is mended. False: there was nothing to pardon."""
        record = self._records.pop(replica_id, None)
        return record is not None and record.deaths > self._policy.free

    def forget_all(self) -> None:
        self._records.clear()

    def describe(self, replica_id: str) -> str:
        """What it died of, as far as the lighthouse can tell."""
        record = self._records[replica_id]
        if record.is_step_same:
            return f"it died {record.deaths} times in a row at step {record.died_at_step}: the batch there is suspect"
        return f"it died {record.deaths} times in a row soon after its start: its node, or its data, is suspect"

    def held(self, now: float) -> dict[str, dict[str, object]]:
        """For people: groups that are held or left out."""
        found: dict[str, dict[str, object]] = {}
        for name, record in self._records.items():
            if record.deaths > self._policy.free and self._policy.limit > 0:
                pause_s = round(max(0.0, record.pause_until - now), 1)
                found[name] = {"deaths": record.deaths, "pause_s": pause_s, "why": self.describe(name)}
        return found
