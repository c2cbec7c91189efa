"""Our table of torchrun's options beside the parser of the torch that is installed: a new torch's option fails here."""

import argparse

import pytest
from torch.distributed.run import get_args_parser

from everstep.launcher.option import Kind
from everstep.launcher.options import BY_NAME, parse
from everstep.launcher.torchrun_options import TORCHRUN_OPTIONS


@pytest.fixture(scope="module")
def theirs() -> dict[str, argparse.Action]:
    actions = get_args_parser()._actions
    return {action.dest: action for action in actions if action.option_strings and action.dest != "help"}


def test_each_of_their_options_is_in_the_table_and_nothing_else_is(theirs: dict[str, argparse.Action]) -> None:
    assert {option.name for option in TORCHRUN_OPTIONS} == set(theirs)


@pytest.mark.parametrize("option", TORCHRUN_OPTIONS, ids=lambda option: option.name)
def test_an_option_has_their_names_default_choices_and_type(option: object, theirs: dict[str, argparse.Action]) -> None:
    mine = BY_NAME[option.name]  # type: ignore[attr-defined]
    action = theirs[mine.name]
    assert list(mine.flags) == list(action.option_strings)
    assert (list(mine.default) if isinstance(mine.default, tuple) else mine.default) == action.default
    assert mine.choices == tuple(action.choices or ())
    assert (action.nargs == 0) == (mine.kind is Kind.FLAG)
    types = {Kind.INTEGER: int, Kind.NUMBER: float, Kind.TEXT: str, Kind.FLAG: None}
    if mine.kind is not Kind.LIST:
        assert action.type is types[mine.kind]


def test_they_read_the_same_variables(monkeypatch: pytest.MonkeyPatch, theirs: dict[str, argparse.Action]) -> None:
    for name, action in theirs.items():
        monkeypatch.setenv(f"PET_{name.upper()}", "1" if action.nargs == 0 else "7")
    after = {action.dest: action.default for action in get_args_parser()._actions}
    changed = {name for name, action in theirs.items() if after[name] != action.default}
    assert changed == {option.name for option in TORCHRUN_OPTIONS if option.variable}
    assert all(option.variable in (None, f"PET_{option.name.upper()}") for option in TORCHRUN_OPTIONS)


@pytest.mark.parametrize(
    "line",
    [
        "train.py",
        "--nnodes 2 train.py --nnodes 3 -m",
        "--nnodes=1:4 --nproc_per_node=gpu --rdzv_backend c10d --rdzv-endpoint h:1 train.py a -- b",
        "-m package.train --lr 1",
        "--stand --rol a x.py",
        "-r 3 -t 0:1,1:2 --redirects 1 x.py",
        "-r3 x.py",
        "--no-python ls -l",
        "--role a --max-restarts 3 --monitor_interval 2.5 --virtual-local-rank x.py",
        "--duplicate-stdout-filters a,,b,c --duplicate_stderr_filters d x.py",
        "--numa-binding node --signals-to-handle SIGUSR1 --shutdown-timeout 5 x.py",
        "-- x.py --y",
        "--local-r 0,1 x.py x.py",
    ],
)
def test_a_command_line_means_what_it_means_there(line: str, theirs: dict[str, argparse.Action]) -> None:
    expected = vars(get_args_parser().parse_args(line.split()))
    found = parse(line.split())
    assert (found.script, list(found.script_args)) == (
        expected["training_script"],
        expected["training_script_args"],
    )
    for name, action in theirs.items():
        value = found.values.get(name, action.default)
        assert (list(value) if isinstance(value, tuple) else value) == expected[name]


@pytest.mark.parametrize(
    "line",
    [
        "--nnodes",
        "--max-restarts x a.py",
        "--start-method thread a.py",
        "--rdzv x a.py",
        "--unknown a.py",
        "-m",
        "--r 1",
    ],
)
def test_a_usage_error_there_is_one_here(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as theirs:
        get_args_parser().parse_args(line.split())
    assert theirs.value.code == 2
    if line == "-m":
        assert parse(line.split()).script is None  # a file may name it; `run` says the rest
        return
    with pytest.raises(SystemExit) as ours:
        parse(line.split())
    assert ours.value.code == 2
    assert "\0" not in capsys.readouterr().err
