"""One template for all modules of this folder: torch is imported once. One without torch is for scripts as such."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from everstep.launcher.death_watch import Surroundings
from everstep.launcher.plain import PlainStarter
from everstep.launcher.starting import Starter
from everstep.launcher.template_client import TemplateSettings, TemplateStarter
from tests.launcher.workers import DEADLINE_S, Scripts, Worker, environment, without_python


@pytest.fixture(scope="package")
def torch_template() -> Iterator[TemplateStarter]:
    settings = TemplateSettings(environment=environment(), search_path=os.getcwd(), spares=0)
    with TemplateStarter(settings, Surroundings()) as starter:
        assert starter.wait_ready(2 * DEADLINE_S)
        assert not starter.is_plain
        yield starter


@pytest.fixture(scope="package")
def light_template() -> Iterator[TemplateStarter]:
    """Imports nothing more: a fork takes 1 ms, and an exit no longer."""
    settings = TemplateSettings(environment=environment(), search_path=os.getcwd(), preload=(), spares=0)
    with TemplateStarter(settings, Surroundings()) as starter:
        assert starter.wait_ready(DEADLINE_S)
        assert not starter.is_plain
        yield starter


@pytest.fixture(scope="package")
def plain() -> Iterator[PlainStarter]:
    starter = PlainStarter(Surroundings())
    with Worker(starter, without_python(["true"])):  # its thread lives from here on
        pass
    yield starter
    starter.close()


@pytest.fixture(params=["plain", "template"])
def starter(request: pytest.FixtureRequest) -> Starter:
    """Each way to start a worker."""
    name = {"plain": "plain", "template": "light_template"}[request.param]
    found: Starter = request.getfixturevalue(name)
    return found


@pytest.fixture
def scripts(tmp_path: Path) -> Scripts:
    return Scripts(tmp_path)
