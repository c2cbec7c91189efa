"""What a joiner asks for, and of whom."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from everstep.errors import ConfigError, LocalProtocolError
from everstep.recovery.auth import TransferAuth
from everstep.recovery.connection import Dial
from everstep.recovery.http import KEY_CHARS_MAX
from everstep.recovery.manifest import Limits

Progress = Callable[[int, int], None]
SAME_KEYS_UNDER = frozenset({"model"})  # where a name too few or too many is a mistake


@dataclass(frozen=True, kw_only=True)
class FetchRequest:
    """What to fetch and from whom.

    `other_urls`: more sources of the same state; the first one that answers says what the state is. A source whose
    connection fails more often than there are entries in `retry_after_s`, with no chunk between, is given up.
    `may_read_memory`: a source's on this host, instead of HTTP, where the system allows it.
    `dial`: how to connect to a source, if not over HTTP. Then a slow one is not cut off for others to help.

    `expected`: this member's own state, to compare names, shapes and dtypes with; the names below `same_keys_under`
    must be equal. `deadline`: an instant of time.monotonic() (math.inf: only `stall_timeout_s` without a byte ends it).
    """

    source_url: str
    key: str
    deadline: float
    expected: Mapping[str, object] | None = None
    same_keys_under: frozenset[str] = SAME_KEYS_UNDER
    auth: TransferAuth | None = None
    other_urls: tuple[str, ...] = ()
    may_read_memory: bool = True
    dial: Dial | None = None
    retry_after_s: tuple[float, ...] = (0.0, 0.05, 0.2)
    stall_timeout_s: float = 15.0
    limits: Limits = field(default_factory=Limits)

    @property
    def urls(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.source_url, *self.other_urls)))

    def __post_init__(self) -> None:
        if math.isnan(self.deadline) or not 0 < self.stall_timeout_s < math.inf:
            raise ConfigError(f"deadline={self.deadline}, stall_timeout_s={self.stall_timeout_s}; use positive seconds")
        if not 0 < len(self.key) <= KEY_CHARS_MAX:
            raise LocalProtocolError(f"a key of {len(self.key)} characters; use 1 to {KEY_CHARS_MAX}")
