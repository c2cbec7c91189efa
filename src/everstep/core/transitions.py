"""Every way from one phase of a step to another: the table that a member's machine follows (as h11 does).

A pair that is not in it is our own bug: LocalProtocolError, and nothing has changed. A freeze (Notice) is no turn: the
phase stays what it was, so that Ready can tell it, and until the Grant only turns of L2 and L5 happen.
docs/protocol.md shows this table.
"""

import enum

from everstep.core.types import LocalProtocolError, Phase


class Turn(enum.Enum):
    """What moves a member on; the value says when, with the rule of DESIGN 4.4."""

    STATE_TAKEN = "T1, L4: a member without state enters a quorum, or has recovered the state"
    GRADIENTS_REDUCED = "T2: all reductions of the step completed in this quorum"
    MORE_REDUCTIONS = "T2: the script reduces something more before the vote"
    VOTE_CAST = "T3: the vote is issued, and is a promise from here on"
    COMMITTED = "T4: everybody voted ok; L2: COMMIT, or the others committed already (late commit)"
    ABORTED = "T4: somebody voted no; L2: ABORT, or the others aborted already (late abort)"
    GRANTED_VOTE = "L2: VOTE; tag and vote are kept, and the vote is taken in the new quorum"
    GRANTED_REDUCE = "L2: REDUCE; tag and vote are dropped, the local gradients are kept"
    EVICTED = "L5: left out of the quorum; the state counts no more"


TRANSITIONS: dict[tuple[Phase, Turn], Phase] = {
    (Phase.RUNNING, Turn.STATE_TAKEN): Phase.RUNNING,
    (Phase.RUNNING, Turn.GRADIENTS_REDUCED): Phase.REDUCED,
    (Phase.RUNNING, Turn.ABORTED): Phase.RUNNING,
    (Phase.RUNNING, Turn.GRANTED_REDUCE): Phase.RUNNING,
    (Phase.RUNNING, Turn.EVICTED): Phase.RUNNING,
    (Phase.REDUCED, Turn.MORE_REDUCTIONS): Phase.RUNNING,
    (Phase.REDUCED, Turn.VOTE_CAST): Phase.VOTING,
    (Phase.REDUCED, Turn.ABORTED): Phase.RUNNING,
    (Phase.REDUCED, Turn.GRANTED_VOTE): Phase.REDUCED,
    (Phase.REDUCED, Turn.GRANTED_REDUCE): Phase.RUNNING,
    (Phase.REDUCED, Turn.EVICTED): Phase.RUNNING,
    (Phase.VOTING, Turn.COMMITTED): Phase.RUNNING,
    (Phase.VOTING, Turn.ABORTED): Phase.RUNNING,
    (Phase.VOTING, Turn.GRANTED_VOTE): Phase.REDUCED,
    (Phase.VOTING, Turn.GRANTED_REDUCE): Phase.RUNNING,
    (Phase.VOTING, Turn.EVICTED): Phase.RUNNING,
}


def after(phase: Phase, turn: Turn) -> Phase:
    """The phase that `turn` leads to; raises LocalProtocolError where it cannot happen."""
    try:
        return TRANSITIONS[phase, turn]
    except KeyError:
        raise LocalProtocolError(f"{turn.name} cannot happen in phase {phase.name}") from None
