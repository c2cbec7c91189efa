"""LocalProcessGroup and the value types."""

import pytest
import torch

from everstep.collectives.local import LocalProcessGroup
from everstep.collectives.process_group import Membership
from everstep.core.types import LocalProtocolError, QuorumId
from everstep.errors import StepInterrupted


def alone(seq: int) -> Membership:
    return Membership(quorum_id=QuorumId(1, seq), rank=0, size=1)


def test_every_operation_of_one_member_is_the_identity() -> None:
    with LocalProcessGroup() as group:
        group.configure(alone(1))
        tensor = torch.tensor([1.0, 2.0])
        work = group.allreduce(tensor)
        work.wait()
        assert work.is_completed()
        assert tensor.tolist() == [1.0, 2.0]
        assert group.allgather(tensor).tolist() == [[1.0, 2.0]]
        assert (group.quorum_id, group.rank, group.size) == (QuorumId(1, 1), 0, 1)


def test_aborted_and_past_quorums_are_refused() -> None:
    with LocalProcessGroup() as group:
        group.abort(QuorumId(1, 2))
        with pytest.raises(StepInterrupted):
            group.configure(alone(2))
        group.configure(alone(3))
        group.abort(QuorumId(1, 1))
        group.allreduce(torch.ones(1)).wait()
        with pytest.raises(LocalProtocolError):
            group.configure(alone(3))
        group.abort(QuorumId(1, 3))
        with pytest.raises(StepInterrupted):
            group.allreduce(torch.ones(1))
        with pytest.raises(StepInterrupted):
            group.allgather(torch.ones(1))


def test_nothing_works_before_the_first_configure_or_after_close() -> None:
    group = LocalProcessGroup()
    with pytest.raises(LocalProtocolError):
        group.allreduce(torch.ones(1))
    group.close()
    with pytest.raises(StepInterrupted):
        group.configure(alone(1))


@pytest.mark.parametrize(
    ("rank", "size", "timeout_s"), [(1, 1, 1.0), (-1, 1, 1.0), (0, 0, 1.0), (0, 1, 0.0), (0, 1, float("nan"))]
)
def test_a_membership_that_cannot_be_is_refused(rank: int, size: int, timeout_s: float) -> None:
    with pytest.raises(ValueError):
        Membership(quorum_id=QuorumId(1, 1), rank=rank, size=size, timeout_s=timeout_s)
