"""What the training thread does for the Manager, as sections: the rank monitor watches a script that adds nothing.

While the script computes no section of ours is open: that time is "outside of sections", unless the script has
sections of its own.
"""

import contextlib
from collections.abc import Iterator

from everstep.core.messages import Activity
from everstep.errors import ConfigError
from everstep.monitor.attach import here
from everstep.monitor.beats import Beats

WAITING, REDUCTION, VOTE = "everstep:waiting", "everstep:reduction", "everstep:vote"  # for other ranks
RECOVERY = "everstep:recovery"
BY_ACTIVITY = {Activity.WAITING: WAITING, Activity.RECOVERING: RECOVERY}


class Phases:
    """Training thread. At most one of the Manager's own sections is open."""

    def __init__(self, beats: Beats = here) -> None:
        self._beats = beats
        self._open = ""
        for name in (REDUCTION, VOTE):
            beats.describe(name, waits=True)
        beats.describe(WAITING, waits=True, is_mixed=True)  # for groups that start again, however long that takes them
        beats.describe(RECOVERY, is_mixed=True)

    def mark(self, activity: Activity) -> None:
        self.enter(BY_ACTIVITY.get(activity, ""))

    def enter(self, name: str) -> None:
        """Leave the section that is open for this one; "": for none."""
        if name == self._open:
            return
        if self._open:
            self._beats.end(self._open)
        self._open = ""
        if name:
            with contextlib.suppress(ConfigError):  # that of another Manager in this thread
                self._beats.start(name)
                self._open = name

    def step_ended(self) -> None:
        self._beats.heartbeat()

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        """One of the script's, by `Manager.section`: it may be open already, and has any name."""
        self._beats.describe(name, is_mixed=True)
        is_ours = False
        with contextlib.suppress(ConfigError):
            self._beats.start(name)
            is_ours = True
        try:
            yield
        finally:
            if is_ours:
                self._beats.end(name)

    def end(self) -> None:
        """What the script does from now on is no business of the Manager's."""
        with contextlib.suppress(ConfigError):
            self.enter("")
        self._beats.put_away((WAITING, REDUCTION, VOTE, RECOVERY))
