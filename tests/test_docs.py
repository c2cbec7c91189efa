"""The documents are true: generated tables are fresh, snippets run, commands exist, links lead somewhere."""

import ast
import dataclasses
import json
import os
import re
from pathlib import Path

import pytest

from everstep import config
from tests.support.processes import Spawner

ROOT = Path(__file__).parents[1]
DOCS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
IDS = [path.relative_to(ROOT).as_posix() for path in DOCS]
STEPS = 20


@dataclasses.dataclass(frozen=True)
class Fence:
    """A block between ``` lines."""

    language: str
    text: str
    line: int


def fences(path: Path, language: str) -> list[Fence]:
    found: list[Fence] = []
    lines = path.read_text(encoding="utf-8").splitlines()
    start: int | None = None
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if start is None:
            start = number
        else:
            found.append(Fence(lines[start][3:].strip(), "\n".join(lines[start + 1 : number]) + "\n", start + 1))
            start = None
    assert start is None, f"{path.name}:{start} opens a block that never ends"
    return [fence for fence in found if fence.language == language]


# ---- text


@pytest.mark.parametrize("path", DOCS, ids=IDS)
def test_links_between_documents_lead_somewhere(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        other = (path.parent / file).resolve() if file else path
        assert other.exists(), f"{path.name} links to {target}, which is not there"
        if anchor:
            assert anchor in _anchors(other), f"{path.name} links to {target}, a heading that is not there"


@pytest.mark.parametrize("path", DOCS, ids=IDS)
def test_files_and_names_of_the_source_that_a_document_mentions_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:[\w-]+/)*[\w-]+\.py)(?:`|: )", text):
        places = [ROOT, ROOT / "src/everstep", ROOT / "src/everstep/core", ROOT / "src"]
        assert any((place / name).is_file() for place in places), f"{path.name} mentions {name}"
    for name, function in re.findall(r"`([\w/]+\.py): (\w+)`", text):
        file = next(p for p in (ROOT / "src/everstep/core" / name, ROOT / "src/everstep" / name) if p.is_file())
        assert f"def {function}(" in file.read_text(encoding="utf-8"), f"{path.name} mentions {function} of {name}"


def test_the_readme_lists_every_variable_that_the_settings_read() -> None:
    assert config.__doc__ is not None
    variables = set(re.findall(r"^\| ([A-Z_, ]+) \|", config.__doc__, flags=re.MULTILINE))
    names = {name for row in variables for name in row.split(", ")}
    assert len(names) >= 6
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {name for name in names if f"`{name}`" not in readme} == set()


def test_every_make_target_of_the_readme_exists() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    mentioned = {name for path in DOCS for name in re.findall(r"`?make (\w+)`", path.read_text(encoding="utf-8"))}
    assert {"demo", "test"} <= mentioned <= targets


def test_the_readme_shows_the_loop_of_the_example() -> None:
    example = _code(ROOT / "examples/train_ddp.py")
    (loop,) = [fence for fence in fences(ROOT / "README.md", "python") if "set_epoch" in fence.text]
    shown = [re.sub(r"\s*# (<-|\d).*", "", line).strip() for line in loop.text.splitlines()]
    for line in shown:
        assert not line or line in example, f"README: {line!r} is not in examples/train_ddp.py"


def test_every_public_name_is_in_the_readme() -> None:
    import everstep

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [name for name in everstep.__all__ if not name.startswith("_") and f"`{name}`" not in readme]
    assert missing == []


# ---- generated tables


def test_the_generated_tables_are_what_the_code_says(spawn: Spawner) -> None:
    check = spawn([str(ROOT / "docs/generate.py"), "--check"])
    assert check.wait() == 0, check.output()


# ---- snippets

RUN_SNIPPETS = """
import json, sys, traceback
import torch
torch.set_num_threads(1)
for line in sys.stdin:
    name, source = json.loads(line)
    verdict = "ok"
    try:
        exec(compile(source, name, "exec"), {"__name__": name})
    except BaseException:
        verdict = traceback.format_exc()
    print(json.dumps([name, verdict]), flush=True)
"""


def test_every_snippet_runs_and_the_example_trains_alone(spawn: Spawner) -> None:
    """One process runs them all, one after another; the first block of rules.md is the frame of those after it."""
    runner = spawn(["-c", RUN_SNIPPETS], env={"EVERSTEP_LIGHTHOUSE": None, "TORCH_CPP_LOG_LEVEL": "ERROR"})
    example = ROOT / "examples/train_ddp.py"
    run_example = (
        f"import runpy, sys\nsys.argv[1:] = ['--steps', '{STEPS}']\nrunpy.run_path('{example}', run_name='__main__')"
    )
    programs = {example.name: run_example}
    for path in (ROOT / "docs/rules.md", ROOT / "docs/migrating-from-torchft.md"):
        snippets = [fence for fence in fences(path, "python") if "from torchft" not in fence.text]
        frame = snippets.pop(0).text if path.name == "rules.md" else ""
        programs |= {f"{path.name}:{snippet.line}": frame + snippet.text for snippet in snippets}
    assert len(programs) > 15
    for name, program in programs.items():
        runner.send(json.dumps([name, program]))
        answered, verdict = json.loads(runner.expect_line(f'["{name}"'))
        assert (answered, verdict) == (name, "ok"), verdict
    assert runner.process.stdin is not None
    runner.process.stdin.close()
    assert runner.wait() == 0


@pytest.mark.parametrize("path", DOCS, ids=IDS)
def test_every_python_block_parses(path: Path) -> None:
    for fence in fences(path, "python"):
        ast.parse(fence.text)


def test_every_test_that_a_document_names_exists_and_soaks_where_it_says_so() -> None:
    written: dict[str, bool] = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        text = path.read_text(encoding="utf-8")
        is_soak = re.search(r"^pytestmark = .*soak", text, flags=re.MULTILINE) is not None
        for marks, name in re.findall(r"((?:^@.*\n(?:^[ )\]].*\n)*)*)^def (test_\w+)\(", text, flags=re.MULTILINE):
            written[name] = is_soak or bool(re.search(r"^@pytest\.mark\.soak", marks, flags=re.MULTILINE))
    named = 0
    for path in DOCS:
        for name, soak in re.findall(r"`(test_\w+)`( \(soak\))?", path.read_text(encoding="utf-8")):
            assert name in written, f"{path.name} names {name}"
            assert path.name != "promises.md" or bool(soak) == written[name], f"{path.name}: is {name} a soak test?"
            named += 1
    assert named > 40


# ---- commands


def test_every_shell_command_is_one_that_this_file_knows() -> None:
    """A command that is new in a document gets a test, or a line here that says who runs it."""
    known = (
        r"make \w+",  # the Makefile's targets: checked above; `test` and `lint` are what runs this
        r"pip install \.(\[uvloop\])?",  # the wheel is built by test_packaging
        r"everstep demo( --json)?",  # tests of the demo
        r"everstep lighthouse( --[\w-]+ \S+)*",  # the flags: below
        r"everstep run .*train\.py( --lr \S+)?",  # launcher/test_launcher_documents
        r"everstep run .*examples/train_ddp\.py --steps \d+",  # launcher/test_training
        r"kill -9 \$\(pgrep -n -f -- '-u examples/train_ddp\.py'\)",  # the title: launcher/test_script
        r"export( [A-Z_]+=\S+)+",  # test_examples, and the next
        r"REPLICA_GROUP_ID=\d (python|torchrun --standalone --nproc-per-node 1) examples/train_ddp\.py --steps \d+",
        r"everstep (status|admit \S+)( --lighthouse \S+)?",  # lighthouse/test_command
        r'curl -N "localhost:29520/api/v1/events\?job=default&after=oldest"',  # lighthouse/test_events
        r"everstep status",  # lighthouse/test_command
        r"python -m everstep\.sim --seed 7 --trace",  # below
        r"python -m everstep\.sim --rendezvous --(seeds 0:1000|nodes 10000)",  # sim/test_rendezvous
        r"torchrun --rdzv-backend=everstep .* script\.py",  # integrations
        r"\(umask 077; head -c 32 /dev/urandom \| base64 > token\)",
    )
    for path in DOCS:
        for fence in fences(path, "sh"):
            for line in fence.text.splitlines():
                command = line.partition("  #")[0].strip()
                assert not command or any(re.fullmatch(k, command) for k in known), f"{path.name}: {command}"


def test_the_lighthouse_takes_every_flag_that_the_documents_use(spawn: Spawner) -> None:
    help_ = spawn(["-m", "everstep.cli", "lighthouse", "--help"], env={"COLUMNS": "200"})
    assert help_.wait() == 0
    offered = set(re.findall(r"--[\w-]+", help_.stdout_path.read_text()))
    used = {
        flag
        for path in DOCS
        for line in re.findall(r"everstep lighthouse (.*)", path.read_text(encoding="utf-8"))
        for flag in re.findall(r"--[\w-]+", line)
    }
    assert {"--token-file", "--state-dir"} <= used <= offered


def test_the_simulator_takes_the_arguments_that_the_documents_use(spawn: Spawner) -> None:
    simulator = spawn(["-m", "everstep.sim", "--seed", "7", "--trace"])
    assert simulator.expect_line("seed 7")
    assert simulator.wait() == 0


def _anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _code(path: Path) -> set[str]:
    return {line.strip() for line in path.read_text(encoding="utf-8").splitlines()}


def test_the_documents_name_no_machine_paths() -> None:
    own = os.fspath(ROOT)
    for path in DOCS:
        assert own not in path.read_text(encoding="utf-8")
