"""What a script attaches to its Manager: that which reduces gradients, and that which draws samples."""

from typing import Protocol

from everstep.train.header import Contribution
from everstep.train.stepper import Decision


class Reducer(Protocol):
    """What reduces gradients for the manager: DistributedDataParallel."""

    def flush(self) -> None: ...

    def objection(self) -> str: ...

    def settle(self) -> None: ...

    def step_decided(self, is_committed: bool) -> None: ...


class SampleSource(Protocol):
    """What tells the manager which samples a step used, and hears of its fate: DistributedSampler."""

    def contribution(self) -> Contribution: ...

    def step_decided(self, decision: Decision) -> None: ...

    def check(self, contributions: tuple[Contribution, ...]) -> str: ...
