"""What the agent's monitor needs to know. Apart from the monitor, so that a command line is read without it."""

import dataclasses
import logging
import signal

from everstep.core.hang import HangPolicy


@dataclasses.dataclass(frozen=True, kw_only=True)
class MonitorSettings:
    """`termination_signal` goes to a hung rank's process group; SIGKILL follows after `kill_after_s`."""

    hang: HangPolicy = dataclasses.field(default_factory=HangPolicy)
    termination_signal: int = signal.SIGKILL
    kill_after_s: float = 10.0
    log_level: int = logging.INFO
