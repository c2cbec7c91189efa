"""The layout of DESIGN section 3 holds: for every file as it is, and each rule does catch what it forbids."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import architecture as rules
from tests.support.processes import Spawner
from tests.support.source_tree import Source, read_sources

ROOT = Path(__file__).parents[1]
HELP_TIME_MAX_S = 2.0
Rule = Callable[[Source], Iterator[str]]

SRC_RULES: list[Rule] = [
    rules.import_direction,
    rules.core_is_pure,
    rules.sim_depends_on_its_seed_alone,
    rules.torch_stays_in_its_folders,
    rules.private_torch_is_in_one_file,
    rules.environment_is_read_in_one_place,
    rules.nothing_is_pickled,
    rules.dependencies_are_declared,
    rules.modules_have_docstrings,
    rules.broad_excepts_say_why,
    rules.wall_clocks_are_for_people,
]
EVERYWHERE_RULES: list[Rule] = [rules.files_are_short, rules.functions_are_short, rules.names_say_what_is_inside]
TESTS_RULES: list[Rule] = [rules.tests_do_not_sleep, rules.tests_do_not_mock]


@pytest.fixture(scope="module")
def src() -> list[Source]:
    sources = read_sources(ROOT, ["src/everstep"])
    assert len(sources) > 10, "the package was not found"
    return sources


@pytest.fixture(scope="module")
def tests() -> list[Source]:
    return read_sources(ROOT, ["tests"])


@pytest.mark.parametrize("rule", SRC_RULES, ids=lambda rule: rule.__name__)
def test_the_package_obeys(rule: Rule, src: list[Source]) -> None:
    _check(rule, src)


@pytest.mark.parametrize("rule", EVERYWHERE_RULES, ids=lambda rule: rule.__name__)
def test_every_python_file_obeys(rule: Rule) -> None:
    _check(rule, read_sources(ROOT, ["src", "tests", "examples", "bench", "docs"]))


@pytest.mark.parametrize("rule", TESTS_RULES, ids=lambda rule: rule.__name__)
def test_the_tests_obey(rule: Rule, tests: list[Source]) -> None:
    _check(rule, tests)


LONG_FUNCTION = "def f():\n" + "    pass\n" * 70
LONG_FILE = "x = 1\n" * 401
BROAD = "try:\n    f()\nexcept Exception:\n    pass\n"

CAUGHT: list[tuple[Rule, str, str]] = [
    (rules.import_direction, "core/a.py", "from everstep.link.client import Client"),
    (rules.import_direction, "core/a.py", "from everstep.errors import ConfigError"),
    (rules.import_direction, "core/a.py", "def f():\n    import everstep.sim"),
    (rules.import_direction, "core/a.py", "from ..link import client"),
    (rules.import_direction, "core/__init__.py", "from ..link import client"),
    (rules.import_direction, "link/a.py", "from everstep import Manager"),
    (rules.import_direction, "link/a.py", "import importlib\nimportlib.import_module('everstep.train.manager')"),
    (rules.import_direction, "lighthouse/a.py", "from everstep.train import manager"),
    (rules.import_direction, "recovery/a.py", "from everstep.collectives import gloo"),
    (rules.import_direction, "collectives/a.py", "import everstep.recovery.http"),
    (rules.import_direction, "sim/a.py", "from everstep.errors import ConfigError"),
    (rules.import_direction, "integrations/a.py", "from everstep.recovery import http"),
    (rules.import_direction, "errors.py", "import everstep.config"),
    (rules.import_direction, "fork_guard.py", "from everstep.core import types"),
    (rules.import_direction, "novelty/a.py", ""),
    (rules.import_direction, "novelty.py", ""),
    (rules.core_is_pure, "core/a.py", "import time"),
    (rules.core_is_pure, "core/a.py", "from os.path import join"),
    (rules.core_is_pure, "core/a.py", "from random import Random"),
    (rules.core_is_pure, "core/a.py", "import logging"),
    (rules.core_is_pure, "core/a.py", "def f():\n    import threading"),
    (rules.core_is_pure, "core/a.py", "import numpy"),
    (rules.core_is_pure, "core/a.py", "open('f')"),
    (rules.core_is_pure, "core/a.py", "print('x')"),
    (rules.sim_depends_on_its_seed_alone, "sim/a.py", "import time"),
    (rules.sim_depends_on_its_seed_alone, "sim/a.py", "import random\nrandom.random()"),
    (rules.sim_depends_on_its_seed_alone, "sim/a.py", "from random import choice"),
    (rules.torch_stays_in_its_folders, "link/a.py", "import torch.distributed"),
    (rules.torch_stays_in_its_folders, "launcher/agent.py", "def f():\n    from torch import nn"),
    (rules.torch_stays_in_its_folders, "cli.py", "import torch"),
    (rules.private_torch_is_in_one_file, "train/a.py", "from torch._C import x"),
    (rules.private_torch_is_in_one_file, "train/a.py", "import torch._C as c"),
    (rules.private_torch_is_in_one_file, "train/a.py", "from torch import _C"),
    (rules.private_torch_is_in_one_file, "train/a.py", "import torch\ntorch._C.f()"),
    (rules.private_torch_is_in_one_file, "train/a.py", "import torch.distributed as dist\ndist._world"),
    (rules.private_torch_is_in_one_file, "train/a.py", "from torch import distributed\ndistributed.nn._x"),
    (rules.private_torch_is_in_one_file, "train/a.py", "import torch\ngetattr(torch, '_C')"),
    (rules.environment_is_read_in_one_place, "train/a.py", "import os\nos.environ['A']"),
    (rules.environment_is_read_in_one_place, "train/a.py", "import os as system\nsystem.getenv('A')"),
    (rules.environment_is_read_in_one_place, "launcher/config.py", "from os import environ"),
    (rules.nothing_is_pickled, "train/a.py", "import pickle"),
    (rules.nothing_is_pickled, "train/a.py", "from marshal import loads"),
    (rules.nothing_is_pickled, "recovery/a.py", "import torch\ntorch.save(x, f)"),
    (rules.nothing_is_pickled, "recovery/a.py", "from torch import load"),
    (rules.nothing_is_pickled, "train/a.py", "import torch.distributed as d\nd.broadcast_object_list(x)"),
    (rules.dependencies_are_declared, "train/a.py", "import numpy as np"),
    (rules.dependencies_are_declared, "train/a.py", "import lightning"),
    (rules.dependencies_are_declared, "train/a.py", "import importlib\nimportlib.import_module('numpy')"),
    (rules.modules_have_docstrings, "train/a.py", "x = 1"),
    (rules.broad_excepts_say_why, "train/a.py", BROAD),
    (rules.broad_excepts_say_why, "train/a.py", BROAD.replace("Exception", "(OSError, BaseException)")),
    (rules.broad_excepts_say_why, "train/a.py", BROAD.replace(" Exception", "")),
    (rules.files_are_short, "train/a.py", LONG_FILE),
    (rules.functions_are_short, "train/a.py", LONG_FUNCTION),
    (rules.functions_are_short, "train/a.py", "class C:\n" + "".join(f"    {x}\n" for x in LONG_FUNCTION.splitlines())),
    (rules.functions_are_short, "train/a.py", "async " + LONG_FUNCTION),
    (rules.names_say_what_is_inside, "train/utils.py", ""),
    (rules.names_say_what_is_inside, "common/a.py", ""),
    (rules.names_say_what_is_inside, "train/_helpers.py", ""),
    (rules.wall_clocks_are_for_people, "link/a.py", "import time\ntime.time()"),
    (rules.wall_clocks_are_for_people, "link/a.py", "import datetime\ndatetime.datetime.now()"),
    (rules.tests_do_not_sleep, "a.py", "import time\ntime.sleep(1)"),
    (rules.tests_do_not_sleep, "a.py", "from time import sleep as nap\nnap(1)"),
    (rules.tests_do_not_sleep, "a.py", "import asyncio\nasync def f():\n    await asyncio.sleep(0.1)"),
    (rules.tests_do_not_mock, "a.py", "from unittest import mock"),
    (rules.tests_do_not_mock, "a.py", "from unittest.mock import patch"),
    (rules.tests_do_not_mock, "a.py", "def test(monkeypatch):\n    monkeypatch.setattr('a.b', 1)"),
    (rules.tests_do_not_mock, "a.py", "def test(mocker): ..."),
]

ALLOWED: list[tuple[Rule, str, str]] = [
    (rules.import_direction, "core/a.py", "from everstep.core import types\nfrom . import messages"),
    (rules.wall_clocks_are_for_people, "link/a.py", "import time\ntime.monotonic()"),
    (rules.import_direction, "train/a.py", "from everstep.collectives import gloo\nfrom everstep.config import read"),
    (rules.import_direction, "link/a.py", "from everstep import __version__\nfrom everstep.fork_guard import guard"),
    (rules.import_direction, "launcher/a.py", "from everstep.lighthouse.app import Lighthouse"),
    (rules.import_direction, "cli.py", "from everstep.launcher import agent\nfrom everstep.sim import world"),
    (
        rules.core_is_pure,
        "core/a.py",
        "import msgspec, enum\nfrom collections.abc import Iterable\nreopen = str\nreopen()",
    ),
    (rules.core_is_pure, "link/a.py", "import time"),
    (rules.sim_depends_on_its_seed_alone, "sim/a.py", "import random\nr = random.Random(7)\nr.random()"),
    (rules.sim_depends_on_its_seed_alone, "sim/__main__.py", "import time"),
    (rules.torch_stays_in_its_folders, "launcher/template.py", "import torch"),
    (rules.torch_stays_in_its_folders, "train/a.py", "import torch"),
    (rules.private_torch_is_in_one_file, "collectives/torch_private.py", "import torch._C"),
    (rules.private_torch_is_in_one_file, "train/a.py", "import torch\ntorch.__version__\nself._c"),
    (rules.environment_is_read_in_one_place, "config.py", "import os\nos.environ"),
    (rules.environment_is_read_in_one_place, "train/a.py", "import os\nos.getpid()"),
    (rules.nothing_is_pickled, "train/a.py", "import torch, msgspec\nmsgspec.msgpack.encode(torch.zeros(1))"),
    (rules.dependencies_are_declared, "integrations/a.py", "import lightning"),
    (rules.dependencies_are_declared, "train/a.py", "import torch, socket\nfrom . import b"),
    (rules.modules_have_docstrings, "train/a.py", '"""What it is."""'),
    (rules.broad_excepts_say_why, "train/a.py", BROAD.replace(":\n    pass", ":  # thread boundary\n    pass")),
    (rules.broad_excepts_say_why, "train/a.py", BROAD.replace("Exception", "OSError")),
    (rules.broad_excepts_say_why, "train/a.py", BROAD.replace("    pass", "    undo()\n    raise")),
    (rules.files_are_short, "train/a.py", "x = 1\n" * 400),
    (rules.functions_are_short, "train/a.py", LONG_FUNCTION.replace("    pass\n", "", 1)),
    (rules.names_say_what_is_inside, "train/utility_curve.py", ""),
    (rules.tests_do_not_sleep, "a.py", "import asyncio\nasync def f():\n    await asyncio.sleep(0)"),
    (rules.tests_do_not_mock, "a.py", "def test(monkeypatch):\n    monkeypatch.setenv('A', '1')"),
]


@pytest.mark.parametrize(("rule", "path", "text"), CAUGHT)
def test_a_rule_catches_what_it_forbids(rule: Rule, path: str, text: str) -> None:
    findings = list(rule(_snippet(rule, path, text)))
    assert findings
    assert all(":" in finding and ";" in finding for finding in findings), "each names file:line and a remedy"


@pytest.mark.parametrize(("rule", "path", "text"), ALLOWED)
def test_a_rule_lets_pass_what_is_allowed(rule: Rule, path: str, text: str) -> None:
    assert list(rule(_snippet(rule, path, text))) == []


def test_every_rule_has_a_snippet_that_it_catches_and_one_that_it_lets_pass() -> None:
    every = {rule.__name__ for rule in SRC_RULES + EVERYWHERE_RULES + TESTS_RULES}
    written = {name for name, thing in vars(rules).items() if callable(thing) and thing.__module__ == rules.__name__}
    assert {name for name in written if not name.startswith("_")} == every
    assert {rule.__name__ for rule, _, _ in CAUGHT} == every
    assert {rule.__name__ for rule, _, _ in ALLOWED} == every


def test_a_finding_names_the_file_the_line_and_the_remedy() -> None:
    (finding,) = rules.core_is_pure(Source("src/everstep/core/a.py", '"""A."""\n\nimport time\n'))
    assert finding == (
        "src/everstep/core/a.py:3: core imports time; take it as an argument (`now`, ids) or do it in a shell"
    )


IMPORT_EACH = """
import importlib, json, sys
seen = {}
for name in sys.argv[1:]:
    importlib.import_module(name)
    if "torch" in sys.modules:
        seen[name] = True
        break
print(json.dumps(sorted(seen)))
"""


def test_no_module_outside_the_torch_folders_imports_torch(spawn: Spawner, src: list[Source]) -> None:
    names = [s.module for s in src if s.unit not in rules.TORCH_UNITS and s.path not in rules.TORCH_FILES]
    names = [name for name in names if not name.endswith("__main__")]
    assert {"everstep", "everstep.core.lighthouse"} <= set(names)
    child = spawn(["-c", IMPORT_EACH, *names])
    first_offender = json.loads(child.read_line())
    assert child.wait() == 0
    assert first_offender == [], "importing it, or one of the modules before it, imports torch"


def test_help_is_quick(spawn: Spawner) -> None:
    started_at = time.monotonic()
    child = spawn(["-m", "everstep.cli", "--help"])
    child.expect_line("Usage")
    assert child.wait() == 0
    took_s = time.monotonic() - started_at
    sys.stdout.write(f"everstep --help took {took_s:.2f} s\n")
    assert took_s < HELP_TIME_MAX_S


def _check(rule: Rule, sources: list[Source]) -> None:
    findings = [finding for source in sources for finding in rule(source)]
    if findings:
        pytest.fail("\n" + "\n".join(dict.fromkeys(findings)), pytrace=False)


def _snippet(rule: Rule, path: str, text: str) -> Source:
    folder = "tests" if rule in TESTS_RULES else "src/everstep"
    return Source(f"{folder}/{path}", text)
