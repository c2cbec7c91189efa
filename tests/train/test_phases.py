"""The Manager's own sections and heartbeats: a script that adds nothing is watched."""

import threading

import pytest
import torch

import everstep as es
from everstep.core.limits import HEARTBEAT, OUTSIDE
from everstep.monitor.attach import here
from everstep.monitor.view import PageReader
from everstep.train.phases import REDUCTION, VOTE, WAITING
from tests.monitor.agent import Agent, limits
from tests.monitor.test_hangs import hung
from tests.support.processes import Spawner

STEPS = 8
SCRIPT = """
import threading, torch
import everstep as es
torch.set_num_threads(1)
with es.Manager() as manager:
    model = es.DistributedDataParallel(manager, torch.nn.Linear(2, 1))
    optimizer = es.Optimizer(manager, torch.optim.SGD(model.parameters(), lr=0.1))
    def stuck_layer(): threading.Event().wait()
    for step in range(4):
        optimizer.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    stuck_layer()
"""


def test_steps_beat_and_open_sections_that_end_with_the_manager() -> None:
    seen: list[list[str]] = []
    with es.Manager() as manager:
        for _ in range(STEPS):
            manager.allreduce(torch.ones(2)).wait()
            with manager.section("validation"), manager.section("validation"):
                seen.append(here.open_sections())
            assert manager.should_commit()
        view = PageReader(here.words).read()
        assert view.outside_since is not None
        assert view.heartbeat_at is not None
        assert not view.sections
    assert seen == [["validation"]] * STEPS
    assert {HEARTBEAT, OUTSIDE, REDUCTION, VOTE, WAITING} <= set(here.observed())
    view = PageReader(here.words).read()
    assert "everstep" not in str(view.sections)
    assert view.passed_at is None


def test_a_manager_in_another_thread_does_not_stand_in_this_ones_way() -> None:
    errors: list[BaseException] = []

    def train() -> None:
        try:
            with es.Manager() as manager:
                assert manager.should_commit()
        except BaseException as error:
            errors.append(error)

    with es.Manager() as manager:
        thread = threading.Thread(target=train)
        thread.start()
        assert manager.should_commit()
        thread.join(20.0)
    assert not errors


@pytest.mark.soak
def test_a_script_that_adds_nothing_is_found_when_it_hangs_between_steps(spawn: Spawner) -> None:
    with Agent(spawn, limits(outside=2.5)) as agent:
        agent.start(0, SCRIPT)
        event = hung(agent)
    assert event.mechanism == "out-of-section"
    assert "in stuck_layer" in event.stacks[0]
