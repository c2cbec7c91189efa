"""The command line wins over the environment, that over the file, and each says where a value is from."""

from pathlib import Path

import pytest

from everstep.errors import ConfigError
from everstep.launcher.options import OPTIONS
from tests.launcher.typed import values


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def test_each_layer_wins_over_the_next(tmp_path: Path) -> None:
    path = write(tmp_path, "job.yaml", "nnodes: 4\nrole: file\nmax-restarts: 9\nnproc_per_node: 2\n")
    found = values(f"--config {path} --role line x.py", {"PET_NNODES": "3", "PET_ROLE": "environment"})
    told = {name: (found.options[name].value, found.options[name].origin) for name in found.options}
    assert told["role"] == ("line", "command line")
    assert told["nnodes"] == ("3", "PET_NNODES")
    assert told["max_restarts"] == (9, path)
    assert told["nproc_per_node"] == ("2", path)
    assert told["rdzv_backend"] == ("static", "default")


def test_yaml_and_toml_say_the_same(tmp_path: Path) -> None:
    yaml = write(
        tmp_path,
        "a.yml",
        "# a job\nnnodes: 1:4\nrole: no\nno-template: true\npreload: [numpy, a.b]\nmonitor_interval: 2\n"
        "rdzv-conf: {join_timeout: 30, ranks: topology}\ntraining_script: train.py\n"
        "training_script_args: [--lr, 3e-4]\n",
    )
    toml = write(
        tmp_path,
        "a.toml",
        'nnodes = "1:4"\nrole = "no"\nno_template = true\npreload = "numpy,a.b"\nmonitor-interval = 2.0\n'
        'training-script = "train.py"\ntraining-script-args = ["--lr", 3e-4]\n'
        '[rdzv-conf]\njoin_timeout = 30\nranks = "topology"\n',
    )
    one, other = values(f"--config {yaml}"), values("", {"EVERSTEP_CONFIG": toml})
    for name in ("nnodes", "role", "no_template", "preload", "monitor_interval", "rdzv_conf"):
        assert one.options[name].value == other.options[name].value, name
    assert one.text("nnodes") == "1:4", "YAML 1.1 would make 64 of it"
    assert one.text("role") == "no"
    assert one.items("preload") == ("numpy", "a.b")
    assert one.text("rdzv_conf") == "join_timeout=30,ranks=topology"
    assert (
        (one.script.value, one.script_args.value)
        == ("train.py", ("--lr", "3e-4"))
        == (
            other.script.value,
            other.script_args.value,
        )
    )


def test_a_script_on_the_command_line_replaces_that_of_the_file_with_its_arguments(tmp_path: Path) -> None:
    path = write(tmp_path, "a.toml", 'training_script = "a.py"\ntraining_script_args = ["1"]\n')
    found = values(f"--config {path} b.py 2 3")
    assert (found.script.value, found.script_args.value) == ("b.py", ("2", "3"))


@pytest.mark.parametrize(
    ("name", "text", "wrong"),
    [
        ("a.yaml", "nnode: 2", "nnode is unknown; did you mean nnodes?"),
        ("a.yaml", "config: b.yaml", "config is unknown"),
        ("a.yaml", "nnodes: 2\nnnodes: 3", "has nnodes twice"),
        ("a.yaml", "max-restarts: 2\nmax_restarts: 3", "has max_restarts twice, with dashes and with underscores"),
        ("a.yaml", "max_restarts: many", "max_restarts in .*='many' must be a whole number"),
        ("a.toml", "max_restarts = true", "max_restarts in .* is true, but it takes a whole number"),
        ("a.yaml", "max_restarts: 1.5", "must be a whole number"),
        ("a.yaml", "standalone: 2.5", "standalone in .* must be 1 or 0"),
        ("a.toml", "standalone = 2", "standalone in .* must be true or false"),
        ("a.yaml", "role: [a]", "but it takes one text"),
        ("a.yaml", "role:", "role in .* has no value"),
        ("a.yaml", "start_method: thread", "must be one of spawn, fork, forkserver"),
        ("a.yaml", "rdzv_conf: {ranks: 'a,b'}", "without a comma"),
        ("a.yaml", "rdzv_conf: {ranks: [a]}", "give a word or a number"),
        ("a.toml", "preload = [1]", "but it takes one list"),
        ("a.yaml", "training_script_args: a", "give a list of words"),
        ("a.toml", "training_script = 3", "give the script's path"),
        ("a.toml", "training_script_args = [true]", "give a list of words, in quotes"),
        ("a.yaml", "- nnodes", "must be a table of options"),
        ("a.yaml", "nnodes: [", "is no YAML"),
        ("a.yaml", "nnodes: !!python/object/apply:os.system [ls]", "is no YAML"),
        ("a.yaml", "? [a]\n: 1", "is no"),
        ("a.toml", "nnodes = ", "is no TOML"),
        ("a.json", "{}", "must end in .yaml, .yml or .toml"),
        ("a.yaml", "x" * (2 << 20), "is larger than"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(tmp_path: Path, name: str, text: str, wrong: str) -> None:
    path = write(tmp_path, name, text)
    with pytest.raises(ConfigError, match=wrong):
        values(f"--config {path} x.py")


def test_a_file_that_is_not_there_or_no_text_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        values(f"--config {tmp_path}/a.yaml x.py")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        values(f"--config {tmp_path}/b.yaml x.py")


def test_an_empty_file_says_nothing(tmp_path: Path) -> None:
    for name in ("a.yaml", "a.toml"):
        assert not values(f"--config {write(tmp_path, name, '')} x.py").is_given("nnodes")


@pytest.mark.parametrize(("text", "value"), [("1", True), ("0", False), ("2", True), ("true", True), ("off", False)])
def test_torchruns_flags_are_numbers_in_the_environment_and_words_will_do(text: str, value: bool) -> None:
    assert values("x.py", {"PET_STANDALONE": text}).flag("standalone") is value


def test_a_flag_on_the_command_line_wins_over_a_variable_that_denies_it() -> None:
    assert values("--standalone x.py", {"PET_STANDALONE": "0"}).flag("standalone")


@pytest.mark.parametrize(
    ("variable", "text", "wrong"),
    [
        ("PET_MAX_RESTARTS", "x", "PET_MAX_RESTARTS='x' must be a whole number"),
        ("PET_MAX_RESTARTS", "", "must be a whole number"),
        ("PET_MAX_RESTARTS", "9" * 30, "must be a whole number"),
        ("PET_MONITOR_INTERVAL", "nan", "must be a number"),
        ("PET_STANDALONE", "perhaps", "must be 1 or 0"),
        ("PET_START_METHOD", "thread", "PET_START_METHOD: start_method='thread' must be one of spawn"),
    ],
)
def test_a_wrong_variable_is_named(variable: str, text: str, wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong):
        values("x.py", {variable: text})


def test_names_flags_and_variables_are_each_an_options_own() -> None:
    names = [option.name for option in OPTIONS]
    flags = [flag for option in OPTIONS for flag in option.flags]
    variables = [option.variable for option in OPTIONS if option.variable]
    for kind in (names, flags, variables):
        assert len(set(kind)) == len(kind)
    assert all(option.help for option in OPTIONS)
