"""Learned intervals on their way between nodes: bounds, when it is worth a message, what a lighthouse remembers."""

import math

from everstep.core.learned import KINDS_MAX, LONGEST_MAX_S, JobIntervals, as_observed
from everstep.core.limits import ENOUGH, HEARTBEAT, NEWS_S, LimitPolicy, Limits, Observed
from everstep.core.messages import SendToNodes
from everstep.core.node_messages import IntervalsLargest, IntervalsSeen, NodeHello, NodeSpec, SeenInterval
from everstep.core.rendezvous import NodeMessage, RendezvousConfig, RendezvousMachine


def largest(intervals: JobIntervals) -> dict[str, float]:
    return {one.key: one.longest_s for one in intervals.largest}


def test_whatever_a_node_sends_the_lighthouse_keeps_within_its_bounds() -> None:
    intervals = JobIntervals()
    bad = [SeenInterval("", 1.0), SeenInterval("x" * 81, 1.0), SeenInterval("a", math.inf), SeenInterval("a", -1.0)]
    intervals.hear(("", "n"), [*bad, SeenInterval("a", math.nan), SeenInterval("a", LONGEST_MAX_S * 2)], 0.0)
    assert largest(intervals) == {}
    for node in range(3):
        many = [SeenInterval(f"{node}.{number}", 1.0) for number in range(1000)]
        intervals.hear(("", str(node)), many, 0.0)
    assert len(intervals.largest) == KINDS_MAX


def test_the_largest_is_that_of_all_nodes_at_any_time() -> None:
    intervals = JobIntervals()
    intervals.hear(("", "a"), [SeenInterval("step", 2.0), SeenInterval("save", 9.0)], 0.0)
    intervals.hear(("", "b"), [SeenInterval("step", 3.0)], 0.0)
    assert largest(intervals) == {"step": 3.0, "save": 9.0}
    intervals.hear(("", "b"), [SeenInterval("step", 1.0)], 0.0)
    assert largest(intervals) == {"step": 2.0, "save": 9.0}
    version = intervals.version
    intervals.forget(("", "a"), 0.0)
    assert intervals.version == version
    intervals.fade(900.0)
    assert largest(intervals) == {"step": 1.0, "save": 4.5}
    assert intervals.version > version


def test_a_node_says_what_limits_are_learned_of_once_and_again_when_one_would_change() -> None:
    limits = Limits(LimitPolicy(given={"given": 1.0}))
    limits.note(0, {"step": Observed(ENOUGH - 1, 9.0)}, 0.0)
    assert limits.news(0.0) is None
    seen = {"step": Observed(ENOUGH, 9.0), "given": Observed(ENOUGH, 9.0), HEARTBEAT: Observed(ENOUGH, 9.0)}
    limits.note(0, seen, 5.0)
    assert limits.news(5.0) == {"step": 9.0, HEARTBEAT: 9.0}
    limits.note(0, {**seen, "step": Observed(ENOUGH, 20.0)}, 6.0)
    assert limits.news(4.9 + NEWS_S) is None
    limits.note(0, seen, 6.0)
    assert limits.news(5.0 + NEWS_S) is None
    limits.note(0, {**seen, HEARTBEAT: Observed(ENOUGH, 50.0)}, 30.0)  # within its floor
    assert limits.news(30.0) is None
    limits.note(0, {**seen, "step": Observed(ENOUGH, 12.0)}, 40.0)
    assert limits.news(40.0) == {"step": 12.0, HEARTBEAT: 9.0}


def test_what_is_heard_of_other_nodes_is_not_said_as_of_this_one() -> None:
    limits = Limits(LimitPolicy())
    limits.hear(as_observed([("step", 40.0)]), 0.0)
    assert limits.limit("step") == 200.0
    assert not limits.news(100.0)
    limits.note(0, {"step": Observed(ENOUGH, 4.0)}, 100.0)
    assert limits.news(200.0) == {"step": 4.0}


def test_nothing_is_learned_or_said_where_limits_are_only_given() -> None:
    limits = Limits(LimitPolicy(learns=False))
    limits.hear(as_observed([("step", 40.0)]), 0.0)
    limits.note(0, {"step": Observed(ENOUGH, 4.0)}, 0.0)
    assert limits.limit("step") is None
    assert limits.news(100.0) is None


def test_groups_of_a_job_learn_from_each_other() -> None:
    shared = JobIntervals()
    one = RendezvousMachine(RendezvousConfig(job_id="job", group="one", life="life1"), intervals=shared)
    other = RendezvousMachine(RendezvousConfig(job_id="job", group="other", life="life2"), intervals=shared)
    for machine, group in ((one, "one"), (other, "other")):
        machine.receive(NodeMessage(1, NodeHello(group=group, node=NodeSpec(node_id="n", nonce="n"))), 0.0)
    one.receive(NodeMessage(1, IntervalsSeen((SeenInterval("step", 2.0),))), 0.0)
    deadline = other.next_deadline()
    assert deadline is not None
    told = [e.message for e in other.tick(max(0.0, deadline)) if isinstance(e, SendToNodes)]
    assert IntervalsLargest((SeenInterval("step", 2.0),)) in told
