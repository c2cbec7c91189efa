"""What becomes of the buffers of operations that failed and have not ended: they may write at any time."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from everstep.collectives.local import LocalProcessGroup
from everstep.collectives.process_group import ReduceOp, Work
from everstep.collectives.step_journal import TensorReduction
from everstep.core.types import Member, MemberId, Quorum, QuorumId
from everstep.errors import StepInterrupted
from everstep.train.buckets import Bucket

GARBAGE = 666.0


@dataclass
class Operation:
    """Ends, or writes, when the test says so."""

    tensor: Tensor
    has_ended: bool = False

    def wait(self) -> None:
        if not self.has_ended:
            raise StepInterrupted("severed")

    def is_completed(self) -> bool:
        return self.has_ended

    def write(self) -> None:
        self.tensor.fill_(GARBAGE)


class TransportOfOne(LocalProcessGroup):
    """A group of one whose operations are under way until the test ends them."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def allreduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> Work:
        self.operations.append(Operation(tensor.detach()))
        return self.operations[-1]


ALONE = Quorum(QuorumId(1, 1), (Member(MemberId("m0", 1)),))


def _backward(bucket: Bucket, parameter: torch.nn.Parameter, value: float) -> None:
    """As autograd does: into `.grad`, if there is one, and then the hook."""
    bucket.begin()
    local = torch.full_like(parameter, value)
    parameter.grad = local if parameter.grad is None else parameter.grad.add_(local)
    bucket.keep(0)


@pytest.fixture
def parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(3))


def test_a_bucket_is_reduced_again_out_of_reach_of_an_operation_that_was_given_up(
    parameter: torch.nn.Parameter,
) -> None:
    bucket, group = Bucket([parameter]), TransportOfOne()
    _backward(bucket, parameter, 2.0)
    with pytest.raises(StepInterrupted):
        bucket.issue(group, ALONE).wait()
    bucket.issue(group, ALONE)
    given_up, again = group.operations
    given_up.write()
    again.has_ended = True
    bucket.finish()
    given_up.write()
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [2.0] * 3


def test_no_gradient_stays_within_reach_when_the_step_of_a_given_up_operation_is_aborted(
    parameter: torch.nn.Parameter,
) -> None:
    bucket, group = Bucket([parameter]), TransportOfOne()
    _backward(bucket, parameter, 2.0)
    bucket.issue(group, ALONE)
    group.operations[0].has_ended = True
    bucket.finish()
    bucket.reset()  # committed: `.grad` is a view of the bucket's buffer
    assert parameter.grad is not None
    parameter.grad.zero_()
    _backward(bucket, parameter, 3.0)
    bucket.issue(group, ALONE)
    given_up = group.operations[1]
    bucket.reset()  # aborted
    parameter.grad.zero_()
    given_up.write()
    assert parameter.grad.tolist() == [0.0] * 3
    _backward(bucket, parameter, 4.0)
    given_up.write()
    bucket.issue(group, ALONE)
    group.operations[2].has_ended = True
    bucket.finish()
    assert parameter.grad.tolist() == [4.0] * 3


def test_a_bucket_keeps_its_buffer_while_its_operations_end(parameter: torch.nn.Parameter) -> None:
    bucket, group = Bucket([parameter]), TransportOfOne()
    for value in (1.0, 2.0):
        _backward(bucket, parameter, value)
        bucket.issue(group, ALONE)  # interrupted, but ended
        group.operations[-1].has_ended = True
        bucket.issue(group, ALONE)
        group.operations[-1].has_ended = True
        bucket.finish()
        bucket.reset()
        parameter.grad = None
    assert len({operation.tensor.data_ptr() for operation in group.operations}) == 1


def test_a_scripts_tensor_is_reduced_again_out_of_reach_of_an_operation_that_was_given_up() -> None:
    tensor, group = torch.tensor([5.0, 7.0]), TransportOfOne()
    reduction = TensorReduction(tensor, ReduceOp.SUM, is_average=False)
    reduction.issue(group, ALONE)
    reduction.issue(group, ALONE)
    given_up, again = group.operations
    given_up.write()
    assert tensor.tolist() == [5.0, 7.0]
    again.has_ended = True
    reduction.finish()
    given_up.write()
    assert tensor.tolist() == [5.0, 7.0]
