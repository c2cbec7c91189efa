"""Explicit schedules and budgets: the fault budgets of the executable model, and its scripted counterexamples."""

from everstep.sim.budgets import CLIMATES, Climate, Faults, Trigger
from everstep.sim.network import Delays

LAN = CLIMATES[0]
HASTY = next(climate for climate in CLIMATES if climate.name == "hasty")
HEAVY = next(climate for climate in CLIMATES if climate.name == "heavy")
SLUGGISH = next(climate for climate in CLIMATES if climate.name == "sluggish")
SLOW_DISK = Climate(name="slow-disk", delays=Delays(fsync=(0.5, 0.5)), link_grace_s=0.0)


def at(point: str, fault: str, victim: str = "self", *, nth: int = 1, by: str | None = None, **more: float) -> Trigger:
    return Trigger(
        point=point,
        fault=fault,
        victim=victim,
        nth=nth,
        by=by,
        after_s=more.get("after_s", 0.0),
        seconds=more.get("seconds"),
    )


# The model's CFG and tgt.py's T, with this world's words: err = error, suspect = a stalled link, deadline = a process
# that is stopped for longer than a round waits, lhcrash = lighthouse, restart comes with every kill.
MODEL_BUDGETS: dict[str, tuple[int, Faults]] = {
    "rnd3": (3, Faults(error=2, kill=1)),
    "stk2": (2, Faults(veto=1, kill=1)),
    "fork2": (2, Faults(link=2, stall=1, lighthouse=1, stop=1)),
    "fork3": (3, Faults(stall=2, lighthouse=1)),
    "ep2": (2, Faults(lighthouse=2, error=1)),
    "ep3": (3, Faults(lighthouse=2, stall=1)),
    "crash2": (2, Faults(kill=1)),
    "crash3b": (3, Faults(kill=2)),
    "susp2b": (2, Faults(stall=2)),
    "susp3": (3, Faults(stall=1, kill=1)),
    "link2": (2, Faults(link=1, stall=1)),
    "veto2e": (2, Faults(veto=1, error=1)),
    "veto3": (3, Faults(veto=1, kill=1)),
    "join1": (1, Faults(join=1, kill=1)),
    "join1e": (1, Faults(join=1, error=1, kill=1)),
    "join1l": (1, Faults(join=1, link=1, stall=1)),
    "join2": (2, Faults(join=1, kill=1)),
    "join3": (2, Faults(join=2)),
    "joinlh": (1, Faults(join=1, lighthouse=1)),
    "lh2d": (2, Faults(lighthouse=1, stall=1, stop=1)),
    "lh3": (3, Faults(lighthouse=1, stall=2)),
    "lhlh3": (3, Faults(lighthouse=2, kill=1)),
    "errs3": (3, Faults(error=1, stall=1)),
    "drain2": (2, Faults(drain=1, kill=1)),
    "t-round": (3, Faults(error=2, stall=1, kill=1)),
    "t-journal": (3, Faults(stall=3, lighthouse=1)),
    "t-epoch": (3, Faults(lighthouse=2, stop=2, error=1)),
    "t-gtag": (3, Faults(error=2, stall=1, link=1)),
    "t-evict": (3, Faults(error=1, stall=2, kill=1, link=1)),
    "t-switch": (2, Faults(join=1, error=1, kill=1, link=1)),
    "t-hresend": (2, Faults(error=1, link=1)),
    "t-joinN": (2, Faults(join=1, kill=1, error=1)),
    "t-minmax": (3, Faults(join=1, drain=1, kill=1)),
    "held-back": (3, Faults(drain=1, link=1, stall=1)),
}

# A drained member votes for a quorum without itself, its result is lost, the others go on and cannot be heard.
LEAVER_LEFT_ALONE = (
    at("VoteEnded", "drain", by="g0", nth=3),
    at("Proposal", "stall", by="g1", seconds=6.0),
    at("Proposal", "stall", by="g2", seconds=6.0),
    at("VoteCast", "error", by="g0", nth=4),
)
# g2 is left out while it is away; the record of that Grant is still being written when the lighthouse dies.
GRANT_NOT_ON_DISK = (
    at("VoteEnded", "link", by="g2", nth=3, seconds=1.0),
    at("lighthouse:Persist", "lighthouse", nth=4, after_s=0.3, seconds=0.01),
)
# The first who sees a vote's result dies of it.
WHO_COMMITS_FIRST_DIES = tuple(at("VoteEnded", "kill", nth=n) for n in (4, 9, 14, 19, 24))
# g0 comes back, and g1, the only holder of the state, dies when one of g0's followers has its part of it.
DIES_WHILE_RANKS_RECOVER = (
    at("VoteEnded", "kill", by="g0", nth=3),
    at("RankRecovered", "kill", "g1", by="g0"),
)
# A round while some ranks have come to the vote and others are on their way; while some have a reduction to add.
FAILS_AS_RANKS_DECIDE = tuple(at("Deciding", "error", nth=n) for n in (8, 15, 22))
FAILS_AS_RANKS_REDUCE = tuple(at("RankReduced", "error", nth=n, after_s=0.001) for n in (6, 13, 20))
# Everybody is frozen and answers; nobody is dead; the lighthouse forgets the round.
ROUND_FORGOTTEN = (at("lighthouse:Ready", "lighthouse", seconds=0.01),)

# g2 is left out while its link is down, and the others go on.
LEFT_OUT_WHILE_AWAY = (at("VoteEnded", "link", by="g2", nth=3, seconds=1.0),)
# A proposal misses the member whose link is just then down for a moment.
PROPOSAL_MISSED = (
    at("VoteEnded", "join", nth=4),
    at("Proposal", "link", by="g0", seconds=0.005),
    at("lighthouse:Persisted", "link", "g0", nth=4, seconds=0.005),
)
# Two proposals under way, and each of two members has another one of them.
PROPOSALS_APART = (
    at("VoteEnded", "join", nth=4),
    at("lighthouse:Persisted", "link", "g1", nth=4, seconds=0.005),
    at("Proposal", "stall_down", by="g0", seconds=1.0),
    at("Proposal", "join", by="g0"),
)
# The lighthouse dies between the record of the first quorum and its Switch.
FOUNDING_NOT_SENT = (at("lighthouse:Persisted", "lighthouse", nth=3, seconds=0.5),)

# scripted.py and FINDINGS.md, as far as FIFO links let them happen; name -> (groups, triggers).
SCRIPTED: dict[str, tuple[int, tuple[Trigger, ...]]] = {
    "H1: who commits first is cut off": (2, (at("VoteEnded", "link", nth=4, seconds=0.5),)),
    "H2: who commits first dies, the others may not change their vote": (3, WHO_COMMITS_FIRST_DIES),
    "H3: an abort seen by one, then a round": (2, (at("VoteEnded", "error", nth=3),)),
    "H4: two rounds in a row, the first to commit dies in between": (
        2,
        (at("VoteCast", "error", by="g0", nth=2), at("VoteEnded", "kill", by="g1", nth=3)),
    ),
    "H5: the Grant is lost with the link": (
        2,
        (at("VoteCast", "error", nth=5), at("Notice", "link", by="g0", after_s=0.001, seconds=0.05)),
    ),
    "H7: a minority goes on, the lighthouse restarts, the majority comes back": (
        3,
        (
            at("VoteEnded", "stall", by="g1", nth=2, seconds=4.0),
            at("VoteEnded", "stall", by="g2", nth=2, seconds=4.0),
            at("Grant", "lighthouse", by="g0", after_s=0.05, seconds=0.5),
        ),
    ),
    "H8: a fresh process while the quorum is cut off from a new lighthouse": (
        2,
        (at("VoteEnded", "stall", by="g0", nth=3, seconds=3.0), at("VoteEnded", "lighthouse", by="g1", nth=4)),
    ),
    "H9: the lighthouse dies between a record and its Grant": (
        3,
        (at("VoteEnded", "kill", by="g2", nth=3), at("lighthouse:Persisted", "lighthouse", nth=5, seconds=0.01)),
    ),
    "H12: the joiner dies as it is switched in": (2, (at("VoteEnded", "join", nth=4), at("Switch", "kill", nth=3))),
    "H12f: a joiner's link is lost as it is switched in": (
        2,
        (at("VoteEnded", "join", nth=4), at("Switch", "link", nth=3, seconds=0.01)),
    ),
    "H13: a drained member never sees the vote's result": (3, LEAVER_LEFT_ALONE),
    "H15: the round dies with the lighthouse": (3, (at("VoteCast", "error", nth=5), *ROUND_FORGOTTEN)),
    "H16: killed between Notice and Ready": (3, (at("VoteCast", "error", nth=5), at("Notice", "kill"))),
    "the founder stalls while founding": (3, (at("Switch", "stop", seconds=3.0),)),
    "the founding Switch is lost": (5, FOUNDING_NOT_SENT),
    "a proposal misses a member": (3, PROPOSAL_MISSED),
    "H12b: two proposals, each known to one member": (2, PROPOSALS_APART),
    "a replacement starts before its predecessor's death is noticed": (
        3,
        (at("VoteEnded", "kill_unnoticed", nth=5, seconds=0.0),),
    ),
    "a member leaves in the middle of a round": (
        3,
        (at("VoteCast", "error", nth=5), at("Notice", "leave", by="g1"), at("Notice", "stall_down", by="g2")),
    ),
    "two joiners in one round": (
        2,
        (at("VoteCast", "error", nth=5), at("Notice", "join"), at("Notice", "join", nth=2)),
    ),
}

# ---- live state is lent: g0 comes back, without state, and reads that of the others

_G0_RETURNS = at("VoteEnded", "kill", by="g0", nth=3, seconds=0.0)


def _in_the_middle(fault: str, victim: str = "self", **more: float) -> Trigger:
    return at("Landed", fault, victim, by="g0", nth=2, **more)


ONE_DONOR_DIES = (_G0_RETURNS, _in_the_middle("kill", "g1"))
ALL_DONORS_DIE = (*ONE_DONOR_DIES, _in_the_middle("kill", "g2"))
# A rank of g0 has let go of those that lent it the state, who go on; the other has yet to let go of those that lent it.
DIES_AS_IT_LETS_GO = (_G0_RETURNS, at("Apply", "kill", by="g0"))
UNHEARD_ROUND = (_G0_RETURNS, _in_the_middle("link", after_s=0.3, seconds=8.0))
LOANS: dict[str, tuple[int, tuple[Trigger, ...]]] = {
    "nothing happens": (3, (_G0_RETURNS,)),
    "one donor dies": (3, ONE_DONOR_DIES),
    "all donors but one die": (4, ALL_DONORS_DIE),
    "all donors die": (3, ALL_DONORS_DIE),
    "the only donor dies": (2, ONE_DONOR_DIES),
    "a donor dies as it lends": (3, (_G0_RETURNS, at("Lent", "kill", by="g1"))),
    "a donor's death is not noticed": (3, (_G0_RETURNS, _in_the_middle("kill_unnoticed", "g1"))),
    "the joiner dies": (3, (_G0_RETURNS, _in_the_middle("kill"))),
    "the joiner dies when it has everything": (3, (_G0_RETURNS, at("Fetched", "kill", by="g0"))),
    "the joiner's death is not noticed": (3, (_G0_RETURNS, _in_the_middle("kill_unnoticed"))),
    "the joiner hears nothing of a round": (3, UNHEARD_ROUND),
    "the joiner hears nothing for a while": (3, (*ONE_DONOR_DIES, _in_the_middle("stall_down", seconds=8.0))),
    "the joiner's link is lost": (3, (_G0_RETURNS, _in_the_middle("link", seconds=1.0))),
    "the joiner stands still": (3, (_G0_RETURNS, _in_the_middle("stop", seconds=1.0))),
    "the joiner stands still for too long": (3, (_G0_RETURNS, _in_the_middle("stop", seconds=6.0))),
    "the joiner is late": (3, (_G0_RETURNS, at("Recover", "stop", by="g0", seconds=1.0))),
    "the joiner's transfer fails": (3, (_G0_RETURNS, _in_the_middle("error"))),
    "a donor stands still": (3, (_G0_RETURNS, _in_the_middle("stop", "g1", seconds=1.0))),
    "a donor stands still for too long": (3, (_G0_RETURNS, _in_the_middle("stop", "g1", seconds=6.0))),
    "a donor is left out": (3, (_G0_RETURNS, _in_the_middle("stall", "g1", seconds=6.0))),
    "a donor is asked to leave": (3, (_G0_RETURNS, at("Lent", "drain", by="g1"))),
    "a donor is asked to leave, and left out": (
        4,
        (_G0_RETURNS, at("Lent", "drain", by="g1"), _in_the_middle("link", "g1", seconds=1.0)),
    ),
    "the joiner is asked to leave, and left out": (
        3,
        (_G0_RETURNS, at("Recover", "drain", by="g0"), _in_the_middle("link", seconds=1.0)),
    ),
    "a donor leaves": (3, (_G0_RETURNS, at("Lent", "leave", by="g1"))),
    "the joiner is asked to leave": (3, (_G0_RETURNS, _in_the_middle("drain"))),
    "the meeting fails for a donor": (3, (_G0_RETURNS, at("Lent", "error", by="g1", after_s=0.1))),
    "the meeting fails for the joiner": (3, (_G0_RETURNS, at("Fetched", "error", by="g0"))),
    "another one joins": (3, (_G0_RETURNS, _in_the_middle("join"))),
    "two join, and one dies": (3, (_G0_RETURNS, at("VoteEnded", "join", nth=8), _in_the_middle("kill"))),
    "it joins during a failure": (3, (at("VoteCast", "error", nth=5), at("Notice", "join"), at("Lent", "error"))),
    "the lighthouse dies": (3, (_G0_RETURNS, _in_the_middle("lighthouse", seconds=0.5))),
    "the lighthouse and a donor die": (3, (*ONE_DONOR_DIES, _in_the_middle("lighthouse", seconds=0.5))),
}
MOVING_STATE = Faults(
    kill=2, kill_unnoticed=1, join=2, link=1, stall=1, stall_down=1, stop=2, error=2, veto=1, lighthouse=1, at_points=6
)
