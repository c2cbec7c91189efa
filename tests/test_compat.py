"""What Everstep says of the Python and the torch that it runs with, and where it says it."""

import re
import sys
from pathlib import Path

import pytest

from everstep import torch_version
from tests.support.processes import Spawner

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
LAYERS = ["everstep.train.manager", "everstep.collectives.gloo", "everstep.recovery"]

IMPORT_LAYERS = """
import importlib, logging, sys
import everstep
logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stdout)
for layer in sys.argv[1:]:
    try:
        importlib.import_module(layer)
    except everstep.EverstepError as error:
        print(layer, type(error).__name__, error)
    except Exception as error:  # a fake torch has nothing but its version
        print(layer, type(error).__name__)
    else:
        print(layer, "works")
print("end")
"""


def import_beside(spawn: Spawner, folder: Path, *layers: str) -> list[str]:
    """What importing the layers says, with `folder` before the real packages on the path."""
    child = spawn(["-c", IMPORT_LAYERS, *layers], env={"PYTHONPATH": str(folder)})
    assert child.wait() == 0, child.output()
    return child.stdout_path.read_text().splitlines()


def fake_torch(folder: Path, version: str) -> Path:
    """A stand-in for a torch that is not installed here: all that is looked at is its version."""
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "__init__.py").write_text(f"__version__ = {version!r}\n")
    return folder


def test_a_torch_that_is_too_old_is_refused_by_every_layer_with_what_to_do(spawn: Spawner, tmp_path: Path) -> None:
    said = import_beside(spawn, fake_torch(tmp_path, "1.13.1+cu117"), *LAYERS)
    assert len(said) == len(LAYERS) + 1
    for layer, line in zip(LAYERS, said, strict=False):
        assert line.startswith(f"{layer} ConfigError torch 1.13.1+cu117 (at {tmp_path}/torch/__init__.py) is too old")
        assert "needs torch 2.6 or newer and is tested up to" in line
        assert "pip install --upgrade 'torch>=2.6'" in line


def test_a_torch_newer_than_any_tested_is_a_warning_of_one_line(spawn: Spawner, tmp_path: Path) -> None:
    said = import_beside(spawn, fake_torch(tmp_path, "97.1.0a0+gitabc"), *LAYERS)
    warnings = [line for line in said if line.startswith("WARNING")]
    assert len(warnings) == 1
    assert "torch 97.1.0a0+gitabc is newer than" in warnings[0]
    assert not [line for line in said if "ConfigError" in line]


def test_a_folder_that_is_called_torch_is_not_taken_for_torch(spawn: Spawner, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    (line, _) = import_beside(spawn, tmp_path, "everstep.collectives.gloo")
    assert "ConfigError what `import torch` found is not PyTorch" in line
    assert str(tmp_path / "torch") in line


def test_the_package_the_lighthouse_and_the_command_need_no_torch_at_all(spawn: Spawner, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise AssertionError('somebody imported torch')\n")
    units = ["everstep", "everstep.lighthouse.app", "everstep.cli", "everstep.torch_version", "everstep.sim.world"]
    assert import_beside(spawn, tmp_path, *units) == [*[f"{unit} works" for unit in units], "end"]


def test_the_real_torch_is_one_that_was_tested(spawn: Spawner, tmp_path: Path) -> None:
    assert import_beside(spawn, tmp_path, *LAYERS) == [*[f"{layer} works" for layer in LAYERS], "end"]


@pytest.fixture(scope="module")
def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_range_is_the_same_in_the_code_the_package_and_the_readme(readme: str) -> None:
    oldest, newest = (".".join(map(str, end)) for end in (torch_version.OLDEST, torch_version.NEWEST_TESTED))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"torch>={oldest}" in project["dependencies"]
    assert f"torch {oldest} to {newest}" in readme


def test_the_pythons_are_the_same_in_the_package_the_readme_and_the_makefile(readme: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    prefix = "Programming Language :: Python :: 3."
    classified = [c.rpartition(" ")[2] for c in project["classifiers"] if c.startswith(prefix)]
    assert classified == PYTHONS
    assert project["requires-python"] == f">={PYTHONS[0]}"
    assert f"Python {PYTHONS[0]} to {PYTHONS[-1]}" in readme
    makefile = (ROOT / "Makefile").read_text()
    found = re.search(r"^COMPAT_PYTHONS \?= (.*)$", makefile, flags=re.MULTILINE)
    assert found is not None
    assert found[1].split() == PYTHONS
