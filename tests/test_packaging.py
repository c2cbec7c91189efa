"""What is shipped: the dependencies, the type marker, one version, and nothing that is not ours."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

import everstep
from tests.support.architecture import DEPENDENCIES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
BUILD_TIMEOUT_S = 60
IMPORTED_AS = {"pyyaml": "yaml"}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        document: dict[str, Any] = tomllib.load(file)
    return document["project"]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as it would be published, built without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False)
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_the_runtime_dependencies_are_these(project: dict[str, Any]) -> None:
    names = {_name(requirement) for requirement in project["dependencies"]}
    assert names == {"torch", "aiohttp", "msgspec", "xxhash", "typer", "rich", "pyyaml", "tomli"}


def test_uvloop_is_an_extra_and_code_may_import_only_what_is_declared(project: dict[str, Any]) -> None:
    extras = project["optional-dependencies"]
    assert [_name(requirement) for requirement in extras["uvloop"]] == ["uvloop"]
    names = {_name(requirement) for requirement in project["dependencies"]}
    assert {IMPORTED_AS.get(name, name) for name in names} | {"uvloop"} == DEPENDENCIES


def test_torch_is_pinned_for_development_alone(project: dict[str, Any]) -> None:
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text().split()
    assert not [requirement for requirement in project["dependencies"] if "==" in requirement]


def test_the_version_stands_in_one_place(project: dict[str, Any], wheel: Path) -> None:
    assert "version" in project["dynamic"]
    assert "version" not in project
    assert wheel.name.startswith(f"everstep-{everstep.__version__}-")
    written = [
        path.name
        for path in sorted((ROOT / "src").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value == everstep.__version__
    ]
    assert written == ["__init__.py"]


def test_the_wheel_ships_the_package_its_type_marker_and_its_license(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    sources = {p.relative_to(ROOT / "src").as_posix() for p in (ROOT / "src" / "everstep").rglob("*.py")}
    assert sources <= set(names)
    assert "everstep/py.typed" in names
    assert [name for name in names if name.endswith("licenses/LICENSE")]
    assert {name.partition("/")[0] for name in names} == {"everstep", f"everstep-{everstep.__version__}.dist-info"}


def test_the_wheel_is_pure_python_and_runs_from_3_10_on(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        lines = archive.read(metadata).decode().splitlines()
    assert "Requires-Python: >=3.10" in lines
    assert "License-Expression: BSD-3-Clause" in lines


def test_the_license_is_the_three_clause_bsd_license_of_the_everstep_authors() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert text.startswith("BSD 3-Clause License")
    assert "The Everstep authors" in text


def _name(requirement: str) -> str:
    for index, char in enumerate(requirement):
        if not (char.isalnum() or char in "-_"):
            return requirement[:index].lower()
    return requirement.lower()
