"""`everstep run` and `everstep config show` as processes: what they print, and how they end."""

import json
import time
from pathlib import Path

import pytest

from everstep.exit_codes import ExitCode
from tests.support.processes import Spawner

HELP_TIME_MAX_S = 2.0
CLEAN = {"EVERSTEP_LIGHTHOUSE": "", "REPLICA_GROUP_ID": "", "EVERSTEP_TOKEN": "", "EVERSTEP_TOKEN_FILE": ""}


def test_the_help_names_every_option_and_is_quick(spawn: Spawner) -> None:
    started_at = time.monotonic()
    process = spawn(["-m", "everstep.cli", "run", "--help"])
    assert process.wait() == 0
    assert time.monotonic() - started_at < HELP_TIME_MAX_S
    text = process.stdout_path.read_text()
    for flag in ("--replica-groups", "--nproc_per_node", "--rdzv-conf", "--virtual-local-rank", "--tee"):
        assert flag in text


@pytest.mark.parametrize(
    ("arguments", "code", "wrong"),
    [
        (["--nnodes"], ExitCode.USAGE, "argument --nnodes: expected one argument"),
        (["--nodes", "2", "x.py"], ExitCode.USAGE, "unrecognized arguments"),
        ([], ExitCode.USAGE, "the following arguments are required: training_script"),
        (["--rdzv-backend", "etcd", "x.py"], ExitCode.CONFIGURATION, "everstep: --rdzv-backend=etcd is not supported"),
        (["--config", "/nonexistent.yaml"], ExitCode.CONFIGURATION, "--config /nonexistent.yaml cannot be read"),
    ],
)
def test_a_wrong_command_line_is_said_and_not_run(
    spawn: Spawner, arguments: list[str], code: ExitCode, wrong: str
) -> None:
    process = spawn(["-m", "everstep.cli", "run", *arguments], env=CLEAN)
    assert process.wait() == code
    assert wrong in process.stderr_path.read_text()


def test_config_show_says_where_each_value_is_from(spawn: Spawner, tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text('role = "[bold]"\nmax-restarts = 3\n')
    given = ["--config", str(path), "--nproc-per-node", "2", "train.py", "--json"]
    shown = spawn(["-m", "everstep.cli", "config", "show", "--origin", "--json", *given], env={"PET_NNODES": "1:2"})
    assert shown.wait() == 0
    values = json.loads(shown.stdout_path.read_text())
    assert values["nnodes"] == {"value": "1:2", "origin": "PET_NNODES"}
    assert values["nproc_per_node"] == {"value": "2", "origin": "command line"}
    assert values["max_restarts"] == {"value": 3, "origin": str(path)}
    assert values["monitor_interval"] == {"value": 0.1, "origin": "default"}
    assert values["training_script_args"] == {"value": ["--json"], "origin": "command line"}
    table = spawn(["-m", "everstep.cli", "config", "show", *given], env={"COLUMNS": "200"})
    assert table.wait() == 0
    assert "[bold]" in table.stdout_path.read_text()
    assert "origin" not in table.stdout_path.read_text()
