"""Settings of a command line that is typed on a machine which a test describes."""

import shlex
from collections.abc import Mapping

from everstep.launcher.job_settings import job_settings
from everstep.launcher.machine import Machine
from everstep.launcher.options import parse
from everstep.launcher.settings import JobSettings
from everstep.launcher.values import Values, find_values

HERE = ("localhost", "127.0.0.1", "::1", "here", "10.0.0.1")
TOKEN = {"EVERSTEP_TOKEN": "a token of a job"}


def values(line: str = "x.py", environ: Mapping[str, str] | None = None) -> Values:
    return find_values(parse(shlex.split(line)), environ or {})


def settings(
    line: str = "x.py",
    environ: Mapping[str, str] | None = None,
    *,
    devices: int = 0,
    accelerator: str = "cuda",
) -> JobSettings:
    """On a machine called `here`, 10.0.0.1, with 6 CPUs."""
    machine = Machine(
        environ=environ or {},
        hostname="here",
        pid=7,
        python="/usr/bin/python",
        cpus=6,
        accelerator=accelerator,
        devices=tuple(str(index) for index in range(devices)),
        is_here=lambda host: host in HERE,
    )
    return job_settings(values(line, environ), machine)
