"""FaultToleranceCallback in a real Trainer. Skipped where Lightning is not installed."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from everstep.monitor.attach import here
from everstep.monitor.client import RankMonitorClient
from tests.monitor.agent import Agent, limits
from tests.monitor.test_hangs import hung
from tests.support.processes import Spawner

if not any(importlib.util.find_spec(name) for name in ("lightning", "pytorch_lightning")):
    pytest.skip("Lightning is not installed", allow_module_level=True)

from everstep.integrations.lightning import FaultToleranceCallback

MODULE = """
import sys, threading, torch
try:
    import lightning.pytorch as pl
except ImportError:
    import pytorch_lightning as pl
class Model(pl.LightningModule):
    hangs_at = -1
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
    def training_step(self, batch, index):
        if index == self.hangs_at:
            self.hang()
        return self.layer(batch[0]).sum()
    def hang(self):
        threading.Event().wait()
    def validation_step(self, batch, index):
        self.log("loss", self.layer(batch[0]).sum())
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)
data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(8, 2)), batch_size=1)
def trainer(folder, *callbacks, **more):
    return pl.Trainer(default_root_dir=folder, callbacks=list(callbacks), accelerator="cpu", logger=False,
                      enable_progress_bar=False, enable_model_summary=False, **more)
"""


@pytest.fixture(scope="module")
def lightning() -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(MODULE, names)
    return names


class Seen(RankMonitorClient):
    """A client that remembers which sections were opened and closed, nested how."""

    def __init__(self) -> None:
        super().__init__()
        self.story: list[str] = []
        self.beats = 0

    def start_section(self, section: str) -> None:
        super().start_section(section)
        self.story.append(f"+{section}")

    def end_section(self, section: str) -> None:
        super().end_section(section)
        self.story.append(f"-{section}")

    def send_heartbeat(self) -> None:
        super().send_heartbeat()
        self.beats += 1


def test_fit_goes_through_its_sections_and_what_was_learned_is_in_the_checkpoint(
    tmp_path: Path, lightning: dict[str, Any]
) -> None:
    client = Seen()
    callback = FaultToleranceCallback(client=client)
    trainer = lightning["trainer"](tmp_path, callback, max_epochs=1, enable_checkpointing=False)
    trainer.fit(lightning["Model"](), lightning["data"], lightning["data"])
    story = client.story
    assert story[0] == "+setup"
    assert "+validation" in story[: story.index("-setup")], "the sanity check"
    assert story[story.index("-setup") :][:3] == ["-setup", "+step", "-step"]
    assert story.count("+step") == story.count("-step") == 8
    assert client.beats >= 16
    assert not client.is_initialized
    assert here.open_sections() == []

    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=False)["callbacks"]
    (state,) = [state for key, state in saved.items() if "FaultTolerance" in key]
    assert state["observed"]["step"]["count"] > 0
    again = FaultToleranceCallback()
    resumed = lightning["trainer"](tmp_path, again, max_epochs=2, enable_checkpointing=False)
    resumed.fit(lightning["Model"](), lightning["data"], ckpt_path=tmp_path / "a.ckpt")
    assert resumed.current_epoch == 2


def test_a_save_is_a_section(tmp_path: Path, lightning: dict[str, Any]) -> None:
    client = Seen()
    trainer = lightning["trainer"](tmp_path, FaultToleranceCallback(client=client), max_epochs=1)
    trainer.fit(lightning["Model"](), lightning["data"])
    assert client.story.count("+checkpoint") == client.story.count("-checkpoint") >= 1


def test_an_exception_closes_what_is_open(tmp_path: Path, lightning: dict[str, Any]) -> None:
    def fail(self: Any, batch: Any, index: int) -> Any:
        raise ArithmeticError(index)

    fails = type("Fails", (lightning["Model"],), {"training_step": fail})
    client = Seen()
    trainer = lightning["trainer"](tmp_path, FaultToleranceCallback(client=client), max_epochs=1)
    with pytest.raises(ArithmeticError):
        trainer.fit(fails(), lightning["data"])
    assert here.open_sections() == []
    assert not client.is_initialized


@pytest.mark.soak
def test_a_step_that_hangs_is_found(spawn: Spawner, tmp_path: Path) -> None:
    source = f"""{MODULE}
from everstep.integrations.lightning import FaultToleranceCallback
Model.hangs_at = 5
trainer({str(tmp_path)!r}, FaultToleranceCallback(), max_epochs=1).fit(Model(), data)
"""
    with Agent(spawn, limits(step=1.5)) as agent:
        agent.start(0, source)
        event = hung(agent)
    assert event.section == "step"
    assert "in hang" in event.stacks[0]
