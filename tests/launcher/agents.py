"""Agents as real processes for tests: `python -m tests.launcher.agents PAUSE_S` and then what `everstep run` takes.

PAUSE_S is the first pause between restarts of workers that fail at once; nobody wants to wait for that in a test.
"""

import logging
import os
import sys
from pathlib import Path

from everstep.core.restart_budget import BudgetPolicy
from everstep.errors import ConfigError
from everstep.launcher.agent import run
from everstep.launcher.command import settings_of
from tests.support.processes import Spawned, Spawner

ROOT = Path(__file__).parent.parent.parent
QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR", "EVERSTEP_LIGHTHOUSE": None, "EVERSTEP_JOB_ID": None}


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    settings = settings_of(sys.argv[2:], os.environ)
    try:
        code = run(settings, budget=BudgetPolicy(pause_s=float(sys.argv[1]), pause_max_s=0.1))
    except ConfigError as error:
        sys.stderr.write(f"everstep: {error}\n")
        return 90
    assert "torch" not in sys.modules, "the agent has imported torch"
    return code


def start_agent(spawn: Spawner, folder: Path, *arguments: str, pause_s: float = 0.0, **environment: str) -> Spawned:
    """`everstep run ARGUMENTS`. `folder`: what an agent that is killed leaves behind is left there."""
    env = QUIET | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "TMPDIR": str(folder)} | environment
    if "--no-template" in arguments:  # nor does the script use torch: nobody needs a store
        env.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    return spawn(["-m", "tests.launcher.agents", str(pause_s or 1e-3), *arguments], env=env)


def script(folder: Path, source: str, name: str = "script.py") -> str:
    path = folder / name
    path.write_text(source)
    return str(path)


def stderr_of(agent: Spawned) -> str:
    return agent.stderr_path.read_text(errors="replace")


if __name__ == "__main__":
    sys.exit(main())
