"""What a node says of its workers on each link, what is kept of workers, and when a silent member is asked about."""

import pytest

from everstep.core.failure_detector import DetectorPolicy, Doubt, FailureDetector, Suspicion
from everstep.core.lighthouse import AgentMessage, JobConfig, LighthouseMachine
from everstep.core.messages import Cause, Close
from everstep.core.node import ENDED_KEPT_MAX, NodeMachine
from everstep.core.node_messages import NodeHello, NodeSpec, WorkerEnded, WorkersRunning
from everstep.core.types import MemberId
from everstep.core.worker_book import KEPT_MAX, WORKERS_MAX, WorkerBook

A = MemberId("a", 1)


def node() -> NodeMachine:
    return NodeMachine("g", NodeSpec(node_id="n", nonce="n"))


def test_a_node_says_on_each_link_which_workers_run_and_which_have_ended() -> None:
    machine = node()
    machine.worker_started("w1")
    machine.worker_started("w2")
    report = WorkerEnded("w1", "SIGKILL")
    assert machine.worker_ended(report) == [report]
    for _ in range(2):
        hello, *rest = machine.link_up()
        assert isinstance(hello, NodeHello)
        assert rest == [report, WorkersRunning(("w2",))]


def test_a_node_says_nothing_of_a_worker_that_it_did_not_start_or_that_has_ended() -> None:
    machine = node()
    machine.worker_started("w1")
    assert machine.worker_ended(WorkerEnded("w2")) == []
    assert machine.worker_ended(WorkerEnded("w1")) != []
    assert machine.worker_ended(WorkerEnded("w1")) == []


def test_a_node_keeps_a_bounded_number_of_ends() -> None:
    machine = node()
    for n in range(2 * ENDED_KEPT_MAX):
        machine.worker_started(f"w{n}")
        machine.worker_ended(WorkerEnded(f"w{n}"))
    said = [message.worker for message in machine.link_up() if isinstance(message, WorkerEnded)]
    assert said == [f"w{n}" for n in range(ENDED_KEPT_MAX, 2 * ENDED_KEPT_MAX)]


def test_the_lighthouse_keeps_a_bounded_number_of_ends_and_fences() -> None:
    book = WorkerBook()
    for n in range(KEPT_MAX + 10):
        book.condemn([f"c{n}"])
        assert book.ended(f"w{n}", "SIGKILL")
    assert book.why_ended(["w0"]) == ""
    assert book.why_ended([f"w{KEPT_MAX + 9}"]) == "SIGKILL"
    assert book.to_fence(["c0", f"c{KEPT_MAX + 9}"]) == [f"c{KEPT_MAX + 9}"]


def test_a_worker_whose_agent_is_back_on_another_link_outlives_the_end_of_the_first() -> None:
    book = WorkerBook()
    book.runs(1, ("w",))
    book.runs(2, ("w",))
    book.agent_gone(1)
    assert book.agent_of("w") == 2


@pytest.mark.parametrize(
    "said",
    [
        WorkersRunning(tuple(f"w{n}" for n in range(WORKERS_MAX + 1))),
        WorkersRunning(("w" * 201,)),
        WorkerEnded("w" * 201),
    ],
    ids=["workers", "name", "name of one that ended"],
)
def test_an_agent_beyond_the_bounds_loses_its_link(said: WorkersRunning | WorkerEnded) -> None:
    machine = LighthouseMachine(JobConfig(job_id="job", lighthouse="lh", history="h"))
    machine.start(0.0)
    effects = machine.receive(AgentMessage(7, said), 0.0)
    assert [effect.link for effect in effects if isinstance(effect, Close)] == [7]


def detector() -> FailureDetector:
    found = FailureDetector(DetectorPolicy(heartbeat_timeout_s=2.0, link_grace_s=0.02, ask_before_s=0.25))
    found.watch(A, 0.0)
    return found


def test_silence_is_a_doubt_first_and_a_suspicion_at_the_timeout() -> None:
    watched = detector()
    assert watched.next_deadline() == 1.75
    assert watched.expire(1.75) == [Doubt(A)]
    assert watched.is_doubted(A)
    assert watched.next_deadline() == 2.0
    assert watched.expire(2.0) == [Suspicion(A, Cause.SILENT, "nothing heard for 2 s")]
    assert not watched.is_doubted(A)


def test_a_word_clears_a_doubt() -> None:
    watched = detector()
    watched.expire(1.75)
    watched.heard(A, 1.8)
    assert not watched.is_doubted(A)
    assert watched.expire(2.1) == []
    assert watched.expire(3.55) == [Doubt(A)]


def test_a_link_that_closes_needs_no_doubt() -> None:
    watched = detector()
    watched.link_closed(A, "gone", 1.0)
    assert watched.expire(1.02) == [Suspicion(A, Cause.LINK_CLOSED, "gone")]
