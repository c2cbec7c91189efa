"""Nodes that are to stay out of a job: what is remembered, and what another life of the lighthouse hears."""

from everstep.core.exclusions import EXCLUDED_MAX, REASON_CHARS_MAX, Exclusions
from everstep.core.messages import SendToNodes
from everstep.core.node import NodeMachine
from everstep.core.node_messages import ExcludedNode, ExcludeNode, NodeHello, NodeRefused, NodeSpec, NodeWelcome
from everstep.core.rendezvous import NodeMessage, RendezvousConfig, RendezvousMachine

SPEC = NodeSpec(node_id="n_77", nonce="n", machine="n")


def refused(machine: RendezvousMachine, link: int, hello: NodeHello) -> bool:
    effects = machine.receive(NodeMessage(link, hello), 0.0)
    return any(isinstance(e, SendToNodes) and isinstance(e.message, NodeRefused) for e in effects)


def test_a_bounded_number_of_nodes_is_remembered_with_reasons_of_bounded_length() -> None:
    exclusions = Exclusions()
    assert all(exclusions.add(f"n{number}", "x" * 1000) for number in range(EXCLUDED_MAX))
    assert not exclusions.add("one more", "")
    assert not exclusions.add("n" * 100_000, "")
    assert {len(node.reason) for node in exclusions.nodes} == {REASON_CHARS_MAX}
    assert exclusions.admit("n0")
    assert exclusions.add("one more", "")


def test_a_machine_is_excluded_from_every_group_of_the_job_whatever_its_node_is_called() -> None:
    shared = Exclusions()
    one = RendezvousMachine(RendezvousConfig(job_id="job", group="one", life="life1"), shared)
    other = RendezvousMachine(RendezvousConfig(job_id="job", group="other", life="life2"), shared)
    assert not refused(one, 1, NodeHello(group="one", node=SPEC))
    one.receive(NodeMessage(1, ExcludeNode("a broken GPU")), 0.0)
    again = NodeSpec(node_id="n_78", nonce="m", machine="n")
    assert refused(other, 2, NodeHello(group="other", node=again, is_joining=True))
    assert not refused(other, 3, NodeHello(group="other", node=NodeSpec(node_id="o", nonce="o"), is_joining=True))


def test_what_a_node_knows_counts_for_another_life_of_the_lighthouse_and_not_for_the_one_that_knows_better() -> None:
    machine = RendezvousMachine(RendezvousConfig(job_id="job", group="", life="now"))
    known = (ExcludedNode("n", "a broken GPU"),)
    other = NodeSpec(node_id="o", nonce="o")
    machine.receive(NodeMessage(1, NodeHello(group="", node=other, lighthouse="now", excluded=known)), 0.0)
    assert not refused(machine, 2, NodeHello(group="", node=SPEC, is_joining=True))
    machine.receive(NodeMessage(1, NodeHello(group="", node=other, lighthouse="before", excluded=known)), 0.0)
    assert refused(machine, 3, NodeHello(group="", node=SPEC, is_joining=True))


def test_a_node_asks_to_be_excluded_when_the_lighthouse_is_back() -> None:
    node = NodeMachine("g", SPEC)
    assert node.exclude("a broken GPU") == []
    node.link_up()
    assert node.receive(NodeWelcome("life", 1.0, 6.0)) == [ExcludeNode("a broken GPU")]
    assert node.exclude("again") == [ExcludeNode("again")]
