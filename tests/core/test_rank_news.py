"""What becomes of a monitor's reports: their bounds, at the node and at the lighthouse."""

from everstep.core.messages import Publish, SendToNodes
from everstep.core.node import REPORTS_KEPT_MAX, NodeMachine
from everstep.core.node_messages import NodeHello, NodeSpec, NodeWelcome, RankNews, RankReport
from everstep.core.rank_news import BURST, INTERVAL_S, STACKS_CHARS_MAX, WAITING_MAX, Allowance, event_of
from everstep.core.rendezvous import NodeMessage, RendezvousConfig, RendezvousMachine
from everstep.core.stacks import cut

SPEC = NodeSpec(node_id="n", nonce="n")
HUNG = RankReport(news=RankNews.HUNG, rank="rank 3", detail="it hangs")
STACKS = """Thread 0x1 (most recent call first):
  File "pin_memory.py", line 1 in idle
Current thread 0x2 (most recent call first):
  File "train.py", line 2 in slow_layer
  File "train.py", line 9 in <module>
"""


def test_a_node_keeps_the_newest_reports_for_a_lighthouse_that_is_away_and_says_them_once() -> None:
    node = NodeMachine("g", SPEC)
    node.link_up()
    for n in range(REPORTS_KEPT_MAX + 5):
        assert node.report_rank(RankReport(news=RankNews.HUNG, rank=f"rank {n}", detail="")) == []
    said = node.receive(NodeWelcome("life", 1.0, 6.0))
    assert [m.rank for m in said if isinstance(m, RankReport)] == [f"rank {n}" for n in range(5, REPORTS_KEPT_MAX + 5)]
    node.link_down()
    node.link_up()
    assert node.receive(NodeWelcome("life", 1.0, 6.0)) == []


def test_a_node_is_heard_for_a_burst_and_then_for_so_many_a_second() -> None:
    allowance = Allowance()
    assert [allowance.take(100.0) for _ in range(BURST + 3)].count(True) == BURST
    assert not allowance.take(100.0 + INTERVAL_S / 2)
    assert allowance.take(100.0 + INTERVAL_S)


def test_a_report_of_any_size_becomes_an_event_within_bounds() -> None:
    long = "x" * 1_000_000
    report = RankReport(
        news=RankNews.HUNG, rank=long, detail=long, section=long, culprit=long, waiting=(long,) * 100, stacks=long
    )
    event = event_of(report, "n", "g").event
    assert len(event.stacks) == STACKS_CHARS_MAX
    assert len(event.waiting) == WAITING_MAX
    assert sum(len(text) for text in (event.rank, event.evidence, event.section, event.culprit)) < 2000


def test_stacks_that_are_cut_begin_with_what_the_main_thread_does() -> None:
    assert cut(STACKS, 1000) == STACKS
    many = (
        STACKS.replace("  File", '  File "deep.py", line 1 in f\n' * 50 + "  File", 1) + "\nProcess 7, a child of it:\n"
    )
    shown = cut(many, 120)
    assert shown.startswith("Current thread")
    assert "in slow_layer" in shown
    assert len(shown) <= 120


def test_a_flood_of_reports_leaves_a_bounded_number_of_events() -> None:
    machine = RendezvousMachine(RendezvousConfig(job_id="job", group="", life="life"))
    machine.start(0.0)
    welcome = machine.receive(NodeMessage(1, NodeHello(group="", node=SPEC)), 0.0)
    assert any(isinstance(effect, SendToNodes) for effect in welcome)
    effects = [effect for _ in range(1000) for effect in machine.receive(NodeMessage(1, HUNG), 0.0)]
    assert sum(isinstance(effect, Publish) for effect in effects) == BURST
