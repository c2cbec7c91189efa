"""What the exit status of a process of ours says: docs/exit-codes.md has the same table."""

import enum


class ExitCode(enum.IntEnum):
    """Of `everstep` commands, and of workers that Everstep ends. 128+n: signal n ended it, as in a shell."""

    OK = 0  # done; or the group has left, as it was asked to
    USER_CODE = 1  # the script failed, for a reason of its own; or what the command was asked for is not so
    USAGE = 2  # an option that does not exist, or lacks its value
    CONFIGURATION = 90  # an argument, a variable or the machine's set-up is wrong; starting again would not help
    LIGHTHOUSE_UNREACHABLE = 91  # nothing answered at the lighthouse's address in time
    DRAINED = 92  # this node was told to leave (SIGTERM) and has left; start it elsewhere, or not at all
    DO_NOT_RESTART = 93  # what failed would fail again: a crash loop, no restarts left, a job that others have ended
    EVICTED = 94  # reserved: the others went on without it. Today what was evicted comes back by itself
    STUCK = 95  # the training thread stood still; every thread's stack is on stderr

    @property
    def should_restart(self) -> bool:
        """Whether whoever started the process does well to start it again."""
        return self in (ExitCode.USER_CODE, ExitCode.LIGHTHOUSE_UNREACHABLE, ExitCode.EVICTED, ExitCode.STUCK)


def of_signal(number: int) -> int:
    """The exit code of a program that signal `number` ended."""
    return 128 + number
