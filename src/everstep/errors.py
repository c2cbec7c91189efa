"""What can go wrong, sorted by who must react.

EverstepError
├── ConfigError                 the operator or the script: the message says what to change
│   └── StateMismatch           a peer's state does not fit this member's model
├── LighthouseRefused           the lighthouse turned this process away; `code` and the message say why
├── LighthouseUnreachable       nothing answers at the configured address
├── GroupFailed                 another rank of this replica group ended: so does this process
├── RendezvousEnded             closed by a node, for all; `was_spare` where this one was not needed
├── RendezvousTimedOut          too few nodes came in time; trying again at once would not help
├── NodeEvicted                 this node was silent too long in its round; it may join as a newcomer
├── RoundStoreError             an operation on a round's store failed; `is_over`: the round has ended
│   └── RoundStoreTimeout       … in that its keys did not come in time
├── StepInterrupted             a peer or the network: this collective is over, the job goes on
│   └── PeerLost                … and the error names (or suspects) one peer
└── RecoveryFailed              live state could not be fetched this time; the member starts over

GroupDrained (a SystemExit, code 0) unwinds the script of a group that was asked to leave and has left.
LocalProtocolError (our bug) and RemoteProtocolError (illegal bytes from the other side) stand apart, as in h11.
"""

from everstep.core.types import LocalProtocolError, RefusalCode, RemoteProtocolError

__all__ = [
    "ConfigError",
    "EverstepError",
    "GroupDrained",
    "GroupFailed",
    "LighthouseRefused",
    "LighthouseUnreachable",
    "LocalProtocolError",
    "NodeEvicted",
    "PeerLost",
    "RecoveryFailed",
    "RemoteProtocolError",
    "RendezvousEnded",
    "RendezvousTimedOut",
    "RoundStoreError",
    "RoundStoreTimeout",
    "StateMismatch",
    "StepInterrupted",
]


class EverstepError(Exception):
    """Everything that Everstep raises on purpose."""


class ConfigError(EverstepError):
    """An argument, a setting or the script is wrong; the message says what and how to mend it."""


class StateMismatch(ConfigError):
    """A peer's live state has other names, shapes or dtypes than this member's own; nothing was applied."""


class LighthouseRefused(EverstepError):
    """The lighthouse turned this process away for good."""

    def __init__(self, code: RefusalCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class LighthouseUnreachable(EverstepError):
    """No lighthouse answered at the address within the connect timeout."""


class GroupFailed(EverstepError):
    """Another rank of this replica group ended, so the group has failed as a whole; what started it starts it again."""


class RendezvousEnded(EverstepError):
    """A node closed the rendezvous for all. `was_spare`: this one waited beside a full round, and was not needed."""

    def __init__(self, message: str, was_spare: bool = False) -> None:
        super().__init__(message)
        self.was_spare = was_spare


class RendezvousTimedOut(EverstepError):
    """`min_nodes` did not come together in time; every node that waited gets this, and none should try on."""


class NodeExcluded(EverstepError):
    """A script asked that this node be left out of the job; `everstep nodes admit` lets it in again."""


class NodeEvicted(EverstepError):
    """Nothing was heard of this node for so long that its round went on without it. Raised once; then it may join."""


class RoundStoreError(EverstepError):
    """An operation on the store of a rendezvous round failed. `is_over`: the round has ended, and its store with it."""

    def __init__(self, message: str, is_over: bool = False) -> None:
        super().__init__(message)
        self.is_over = is_over


class RoundStoreTimeout(RoundStoreError):
    """The keys that it waited for did not come in time."""


class StepInterrupted(EverstepError):
    """A collective of this step ended early; its result counts for nothing. Not an error of the job."""


class PeerLost(StepInterrupted):
    """A collective failed because of a peer. `peer` is its rank in the quorum where the error names it."""

    def __init__(self, message: str, peer: int | None = None) -> None:
        super().__init__(message)
        self.peer = peer


class RecoveryFailed(EverstepError):
    """Live state could not be fetched from this source; nothing was applied."""


class GroupDrained(SystemExit):
    """This group was asked to leave (SIGTERM, `everstep drain`) and has left; raised where its next step would begin.

    A SystemExit, so that the script ends with exit code 0 and its `finally` blocks run, without a change to its loop.
    """

    def __init__(self) -> None:
        super().__init__(0)

    def __str__(self) -> str:
        return "this group has left the job, as it was asked to"
