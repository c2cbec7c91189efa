"""How many steps this process has committed, and which the last one was, where its agent reads it after the process's
end: in a file of 16 bytes.

The agent gives restarts back to a group that makes progress (core/restart_budget.py).
"""

import contextlib
import logging
import os
import struct

STEPS = struct.Struct("<QQ")

log = logging.getLogger("everstep.train")


class StepsFile:
    """`path` "": no agent, nothing is written. A write costs a microsecond; one that fails is the last."""

    def __init__(self, path: str) -> None:
        self._steps = 0
        self._path = path
        self._fd = -1

    def open(self) -> None:
        if self._path and self._fd < 0:
            try:
                self._fd = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
            except OSError as error:
                log.warning("the agent cannot see this process's progress: %s", error)

    def count(self, step: int) -> None:
        """One more step is committed; it is the job's `step`th."""
        self._steps += 1
        if self._fd >= 0:
            try:
                os.pwrite(self._fd, STEPS.pack(self._steps, step), 0)
            except OSError:
                self.close()

    def close(self) -> None:
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = -1
