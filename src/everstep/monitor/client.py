"""RankMonitorClient: the method names that users of NVIDIA's resiliency extension know.

Differences, all on purpose: it works without a monitor (it says so once), never blocks and never raises because of one;
every open section counts; limits are learned without a call. What is calculated is the same on all ranks of the default
process group, if there is one (monitor/maximum.py).
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from everstep.core.limits import HEARTBEAT, OUTSIDE, LimitPolicy, Observed, merge
from everstep.errors import EverstepError
from everstep.monitor.attach import attach, here, say
from everstep.monitor.beats import Beats
from everstep.monitor.control import REASON_CHARS_MAX, WorkloadControlRequest
from everstep.monitor.maximum import over_ranks

STATE_VERSION = 1
NVIDIA_STATE = "current_timeouts"  # what its client's state has instead of a version
REQUESTS_KEPT = 8
MAXIMUM_TIMEOUT_S = 60.0  # for all ranks to come to a calculation
Maximum = Callable[[Sequence[float]], Sequence[float]]


class RankMonitorClientError(EverstepError):
    """It was used in a wrong order, or there are too few intervals to calculate from."""


@dataclasses.dataclass(frozen=True)
class HeartbeatTimeouts:
    """Seconds; None: no limit, or not calculated."""

    initial: float | None = None
    subsequent: float | None = None
    were_calculated: bool = False

    @property
    def are_valid(self) -> bool:
        return self.subsequent is not None


@dataclasses.dataclass(frozen=True)
class SectionTimeouts:
    section: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    out_of_section: float | None = None
    calculated_sections: frozenset[str] = frozenset()
    is_out_of_section_calculated: bool = False

    @property
    def were_calculated(self) -> bool:
        return self.calculated_sections == frozenset(self.section) and self.is_out_of_section_calculated


class RankMonitorClient:
    """`maximum` takes this rank's numbers and returns the largest of all ranks, instead of a reduction over
    torch.distributed's default group. `safety_factor`: by default that of the agent's settings.

    Of what the ranks of a node have calculated the monitor takes the largest."""

    def __init__(
        self,
        maximum: Maximum | None = None,
        *,
        safety_factor: float | None = None,
        beats: Beats | None = None,
        maximum_timeout_s: float = MAXIMUM_TIMEOUT_S,
    ) -> None:
        self._maximum = maximum
        self._maximum_timeout_s = maximum_timeout_s
        self._factor = safety_factor
        self._beats = here if beats is None else beats
        self._timeouts: dict[str, float | None] = {}
        self._requests: list[tuple[int, str, str]] = []
        self._numbers = 0
        self.is_initialized = False

    # ---- life

    def init_workload_monitoring(self) -> None:
        if self.is_initialized:
            raise RankMonitorClientError("RankMonitorClient is already initialized")
        self.is_initialized = True
        if attach() is None:
            say("this process has no rank monitor: heartbeats and sections are noted, and nobody looks at them")
        self._beats.say_over(False)
        if self._timeouts:
            self._tell()

    def shutdown_workload_monitoring(self) -> None:
        """This rank wants to be watched no more; its open sections are closed."""
        if self.is_initialized:
            self._beats.end_all()
            self._beats.say_over(True)
            self.is_initialized = False

    # ---- beats

    def send_heartbeat(self) -> None:
        self._beats.heartbeat()

    def start_section(self, section: str) -> None:
        """Raises ConfigError when it is open on this thread already."""
        self._beats.start(section)

    def end_section(self, section: str) -> None:
        """Raises ConfigError when it is not open."""
        self._beats.end(section)

    def end_all_sections(self) -> None:
        self._beats.end_all()

    # ---- limits

    @property
    def hb_timeouts(self) -> HeartbeatTimeouts:
        return HeartbeatTimeouts(None, self._timeouts.get(HEARTBEAT), HEARTBEAT in self._timeouts)

    @property
    def section_timeouts(self) -> SectionTimeouts:
        sections = {key: limit for key, limit in self._timeouts.items() if not key.startswith("<")}
        return SectionTimeouts(sections, self._timeouts.get(OUTSIDE), frozenset(sections), OUTSIDE in self._timeouts)

    def calculate_and_set_hb_timeouts(self, skip_if_not_ready: bool = False) -> bool:
        """Collective where `maximum` is, or a default process group.

        False: too few intervals yet, and `skip_if_not_ready`."""
        return self._calculate([HEARTBEAT], skip_if_not_ready)

    def calculate_and_set_section_timeouts(
        self,
        selected_sections: Collection[str] | None = None,
        calc_out_of_section: bool = True,
        skip_if_not_ready: bool = False,
    ) -> bool:
        """As above; by default for every section that this rank has been in. With `maximum` those are to be the same on
        all ranks."""
        every = [key for key in self._beats.observed() if not key.startswith("<")]
        keys = sorted(every if selected_sections is None else selected_sections)
        return self._calculate([*keys, OUTSIDE] if calc_out_of_section else keys, skip_if_not_ready)

    def _calculate(self, keys: list[str], skip_if_not_ready: bool) -> bool:
        observed = self._beats.observed()
        own = {key: observed[key].longest_s if key in observed else 0.0 for key in keys}
        if self._maximum is not None:
            longest = self._maximum([*own.values()])
        else:
            longest = [*over_ranks(own, self._maximum_timeout_s).values()]
        missing = [key for key, seconds in zip(keys, longest, strict=True) if not seconds > 0.0]
        if missing or not keys:
            if skip_if_not_ready:
                return False
            raise RankMonitorClientError(
                f"too few intervals to calculate timeouts: {', '.join(missing) or 'no section'}"
            )
        factor = self._factor or self._beats.safety_factor or LimitPolicy().safety_factor
        for key, seconds in zip(keys, longest, strict=True):
            limit, before = factor * seconds, self._timeouts.get(key)
            self._timeouts[key] = limit if before is None else (limit + before) / 2
        self._tell()
        return True

    def _tell(self) -> None:
        attachment = attach()
        if attachment is not None:
            attachment.send(timeouts=self._timeouts)

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON: calculated timeouts, and what was seen so far."""
        observed = self._beats.observed()
        return {
            "version": STATE_VERSION,
            "timeouts": dict(self._timeouts),
            "observed": {key: {"count": one.count, "longest_s": one.longest_s} for key, one in observed.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """At any time. What it holds counts as if this process had seen it.

        One that NVIDIA's client has saved is taken over: the timeouts that it calculated."""
        if not state:
            return  # theirs, when it has calculated nothing
        if NVIDIA_STATE in state:
            state = _taken_over(state[NVIDIA_STATE])
        if state.get("version") != STATE_VERSION:
            raise RankMonitorClientError(f"this state has version {state.get('version')!r}, not {STATE_VERSION}")
        self._timeouts = dict(state["timeouts"])
        seen: dict[str, Observed] = {}
        merge(seen, [(key, Observed(int(o["count"]), float(o["longest_s"]))) for key, o in state["observed"].items()])
        self._beats.seed(seen)
        if self.is_initialized and self._timeouts:
            self._tell()

    # ---- control

    def send_workload_control_request(self, req: WorkloadControlRequest) -> bool:
        """At once. False where no launcher of ours hears it; said once."""
        attachment = attach()
        if attachment is None:
            say(f"nobody hears the request {req.action.name}: this process was not started by `everstep run`")
            return False
        self._numbers += 1
        request = (self._numbers, req.action.name, req.description[:REASON_CHARS_MAX])
        self._requests = [*self._requests, request][-REQUESTS_KEPT:]
        return attachment.send(requests=self._requests)


def _taken_over(theirs: Mapping[str, Any]) -> dict[str, Any]:
    heartbeat, sections = theirs.get("heartbeat", {}), theirs.get("section", {})
    limits = {name: sections["section"][name] for name in sections.get("calculated_sections", ())}
    if heartbeat.get("were_calculated"):
        limits[HEARTBEAT] = heartbeat["subsequent"]
    if sections.get("is_out_of_section_calculated"):
        limits[OUTSIDE] = sections["out_of_section"]
    return {"version": STATE_VERSION, "timeouts": limits, "observed": {}}
