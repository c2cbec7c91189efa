"""A Lightning callback: a training loop by `Trainer.fit` is watched by the rank monitor, section by section.

For `lightning` where it is installed, else for `pytorch_lightning`. Sections: `setup` from the start of fit to the
first batch, `step` around each batch, `validation`, and `checkpoint` around each save. What was learned about their
lengths is saved with the checkpoints, and restored from them.
"""

import functools
import importlib
import importlib.util
from typing import Any

from everstep.errors import ConfigError
from everstep.monitor.client import RankMonitorClient

SETUP, STEP, VALIDATION, CHECKPOINT = "setup", "step", "validation", "checkpoint"


def _callback_class() -> Any:
    for name in ("lightning", "pytorch_lightning"):
        if importlib.util.find_spec(name) is not None:
            module = "lightning.pytorch.callbacks" if name == "lightning" else "pytorch_lightning.callbacks"
            return importlib.import_module(module).Callback
    raise ConfigError("everstep.integrations.lightning needs Lightning: pip install lightning, or pytorch-lightning")


class FaultToleranceCallback(_callback_class()):  # type: ignore[misc]  # known when it is imported
    """`Trainer(callbacks=[FaultToleranceCallback()])`. Only `fit` is watched.

    `calculate_timeouts`: save what was learned with the checkpoints. Other arguments that NVIDIA's callbacks take are
    accepted: who starts a job again after `fit` has ended is told by exit codes (docs/exit-codes.md), not by a file.
    """

    def __init__(self, calculate_timeouts: bool = True, *, client: RankMonitorClient | None = None, **_: Any) -> None:
        self._calculates = calculate_timeouts
        self._client = RankMonitorClient() if client is None else client
        self._open: list[str] = []
        self._trainer_save: Any = None

    # ---- hooks

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:  # noqa: ARG002
        if stage != "fit":
            return
        self._client.init_workload_monitoring()
        self._start(SETUP)
        # There is a hook before a checkpoint is written, and none after.
        self._trainer_save = trainer.save_checkpoint
        trainer.save_checkpoint = functools.partial(self._save, self._trainer_save)

    def on_train_batch_start(self, *_: Any, **__: Any) -> None:
        self._end(SETUP)
        self._start(STEP)

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        self._end(STEP)
        self._beat()

    def on_validation_start(self, *_: Any, **__: Any) -> None:
        self._start(VALIDATION)

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        self._beat()

    def on_validation_end(self, *_: Any, **__: Any) -> None:
        self._end(VALIDATION)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:  # noqa: ARG002
        self._finish(trainer)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:  # noqa: ARG002
        if stage == "fit":
            self._finish(trainer)

    def state_dict(self) -> dict[str, Any]:
        return self._client.state_dict() if self._calculates else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._calculates and state_dict:
            self._client.load_state_dict(state_dict)

    # ---- sections; `validate` and `test` outside of fit have none

    def _save(self, save: Any, *args: Any, **kwargs: Any) -> Any:
        self._start(CHECKPOINT)
        try:
            return save(*args, **kwargs)
        finally:
            self._end(CHECKPOINT)

    def _start(self, name: str) -> None:
        if self._client.is_initialized and name not in self._open:
            self._open.append(name)
            self._client.start_section(name)

    def _end(self, name: str) -> None:
        if name in self._open:
            self._open.remove(name)
            self._client.end_section(name)

    def _beat(self) -> None:
        if self._client.is_initialized:
            self._client.send_heartbeat()

    def _finish(self, trainer: Any) -> None:
        """Once: an exception is followed by teardown."""
        if self._trainer_save is not None:
            trainer.save_checkpoint, self._trainer_save = self._trainer_save, None
        for name in [*self._open]:
            self._end(name)
        self._client.shutdown_workload_monitoring()
