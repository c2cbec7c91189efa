"""An optimizer whose step is a step of the whole job: voted, committed by every member or by none."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from everstep.collectives.torch_private import import_for_step, step_optimizer
from everstep.train.manager import Manager, StepResult
from everstep.train.recovering import Stateful


class Optimizer(torch.optim.Optimizer):
    """Wraps a torch optimizer; `step()` returns a StepResult.

    - `before_step` runs between the reduction and the vote, and again when a failure repeats the reduction: clip and
      unscale gradients there. A `.grad` changed elsewhere between backward and step makes a repeated reduction abort.
    - `schedulers` advance when a step commits, and only then; joiners recover them with the optimizer.
    - `skip_nonfinite`: abort the step on every member when an averaged gradient is infinite or NaN.

    `zero_grad()` begins a step. A step that was reduced and never decided (a GradScaler skipped it) is voted down then.
    """

    def __init__(  # torch's own __init__ would make a second optimizer of this: everything is the wrapped one's
        self,
        manager: Manager,
        optimizer: torch.optim.Optimizer,
        *,
        before_step: Callable[[], object] | None = None,
        schedulers: Sequence[Stateful] = (),
        skip_nonfinite: bool = False,
        name: str = "optimizer",
    ) -> None:
        self._manager = manager
        self._optimizer = optimizer
        self._before_step = before_step
        self._schedulers = list(schedulers)
        self._skip_nonfinite = skip_nonfinite
        import_for_step(optimizer)  # while nobody waits
        manager.register_state_dict_fn(name, optimizer.load_state_dict, optimizer.state_dict)
        for index, scheduler in enumerate(self._schedulers):
            manager.register(f"{name}.scheduler.{index}", scheduler)

    def step(self, closure: Callable[[], Any] | None = None) -> StepResult:  # type: ignore[override]
        """Vote; if every member votes ok, update the parameters. `closure` recomputes the loss once, before the vote.

        Raises only what the script's own code raises, ConfigError, and LighthouseRefused: never a peer's failure.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        is_prepared = self._before_step is not None or self._skip_nonfinite
        decision = self._manager.decide(self._prepare if is_prepared else None)
        if decision.committed:
            step_optimizer(self._optimizer)
            for scheduler in self._schedulers:
                scheduler.step()  # type: ignore[attr-defined]
        return StepResult(decision.committed, decision.step, decision.participants, decision.why, loss)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._manager.skip_open_step()
        self._manager.start_step()
        self._optimizer.zero_grad(set_to_none=set_to_none)

    def _prepare(self) -> None:
        if self._before_step is not None:
            self._before_step()
        if self._skip_nonfinite and not self._is_finite():
            self._manager.report_error(FloatingPointError("an averaged gradient is not finite"))

    def _is_finite(self) -> bool:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        return all(bool(torch.isfinite(gradient).all()) for gradient in gradients)

    # ---- the wrapped optimizer's

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._optimizer.param_groups = groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self._optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self._optimizer.defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self._optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        return self._optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(state_dict)

    def __repr__(self) -> str:
        return f"everstep.Optimizer({self._optimizer!r})"
