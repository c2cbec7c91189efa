"""What an operation of a Gloo group holds on to after it has failed."""

import contextlib
import gc
import threading
import weakref

import pytest
import torch

from everstep.collectives.gloo import GlooProcessGroup
from everstep.collectives.process_group import Membership
from everstep.collectives.store import host_store
from everstep.core.types import QuorumId
from everstep.errors import StepInterrupted
from tests.collectives.members import DEADLINE_S


class Loss:
    """Stands for what a training step holds while it waits."""


def test_a_failed_operation_keeps_nothing_alive_of_the_step_that_waited_for_it() -> None:
    def configured(group: GlooProcessGroup, rank: int) -> None:
        group.configure(
            Membership(quorum_id=QuorumId(1, 1), rank=rank, size=2, store=hosted.address, timeout_s=DEADLINE_S)
        )

    def step(loss: Loss) -> None:
        work.wait()

    hosted = host_store()
    mine, peers = GlooProcessGroup(), GlooProcessGroup()
    peer = threading.Thread(target=configured, args=(peers, 1))
    peer.start()
    configured(mine, 0)
    peer.join(DEADLINE_S)
    gc.disable()  # a cycle would be collected some time, but a model's memory has grown by then
    try:
        work = mine.allreduce(torch.ones(4))
        peers.close()
        loss = Loss()
        held = weakref.ref(loss)
        with contextlib.suppress(StepInterrupted):  # not pytest.raises: it keeps the exception
            step(loss)
            pytest.fail("the peer is gone")
        del loss
        assert held() is None
    finally:
        gc.enable()
        mine.close()
        peers.close()
        hosted.close()
