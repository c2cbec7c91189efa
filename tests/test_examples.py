"""The README's commands, as they stand there, in shells: two plain groups and two under torchrun, on one lighthouse."""

import re
from pathlib import Path

import pytest

from tests.support.processes import Spawned, Spawner
from tests.test_docs import fences

ROOT = Path(__file__).parents[1]
STEPS = 20
# torchrun's agent imports torch, and so does its worker; with four groups at once that may take a while.
DEADLINE_S = 90.0

# In place of the test's python: a shell, in which the commands find this environment's programs.
SHELL = """
import os, sys
from pathlib import Path
os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
os.execvp("bash", ["bash", "-euc", sys.argv[1]])
"""


class Shells:
    """Runs blocks of the README; the only changes are the lighthouse's address, its folder, and fewer steps."""

    def __init__(self, spawn: Spawner, folder: Path) -> None:
        self._spawn = spawn
        self._folder = folder
        self.blocks = [fence.text for fence in fences(ROOT / "README.md", "sh")]
        self.address = ""

    def find(self, pattern: str) -> list[str]:
        return [block for block in self.blocks if re.search(pattern, block, flags=re.MULTILINE)]

    def open(self, block: str, *, until_teardown: bool = False, **env: str | None) -> Spawned:
        text = block.replace("/tmp/everstep", str(self._folder / "state")).replace("localhost:29520", self.address)
        text = re.sub(r"--steps \d+", f"--steps {STEPS}", text)
        quiet = {"TORCH_CPP_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        return self._spawn(["-c", SHELL, f"cd '{ROOT}'\n{text}"], env=quiet | env, until_teardown=until_teardown)

    def start_lighthouse(self) -> Spawned:
        (block,) = self.find(r"^everstep lighthouse --state-dir \S+$")
        lighthouse = self.open(block.strip() + " --port 0", until_teardown=True)
        self.address = lighthouse.expect_line("listening on").rpartition(" ")[2]
        return lighthouse


@pytest.mark.soak
def test_groups_train_by_the_commands_of_the_readme_plain_and_under_torchrun(spawn: Spawner, tmp_path: Path) -> None:
    shells = Shells(spawn, tmp_path)
    lighthouse = shells.start_lighthouse()
    plain = shells.find(r"^REPLICA_GROUP_ID=\d python examples/train_ddp.py")
    torchrun = shells.find(r"^REPLICA_GROUP_ID=\d torchrun .*examples/train_ddp.py")
    assert (len(plain), len(torchrun)) == (2, 2)
    groups = [shells.open(block, EVERSTEP_JOB_ID="torchrun") for block in torchrun]
    groups += [shells.open(block, EVERSTEP_JOB_ID="plain") for block in plain]
    for group in groups:
        assert f"step {STEPS} " in group.expect_line("participants 2", deadline_s=DEADLINE_S)
    for group in groups:
        assert group.wait(DEADLINE_S) == 0, group.output()
    (status,) = shells.find("^everstep status")
    for job in ("plain", "torchrun"):
        answer = shells.open(status, EVERSTEP_JOB_ID=job)
        assert answer.wait() == 0, answer.output()
        assert "seconds of each group" in answer.stdout_path.read_text()
    lighthouse.kill(15)
    assert lighthouse.wait() == 0, lighthouse.output()


def test_torchruns_variables_do_not_change_what_a_group_is(spawn: Spawner) -> None:
    """With one process a group (WORLD_SIZE=1) the others do not count, whatever they say."""
    theirs = {
        "MASTER_ADDR": "192.0.2.1",
        "MASTER_PORT": "1",
        "RANK": "0",
        "LOCAL_RANK": "1",
        "GROUP_RANK": "2",
        "ROLE_RANK": "3",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_WORLD_SIZE": "2",
        "ROLE_WORLD_SIZE": "4",
        "TORCHELASTIC_RUN_ID": "another",
        "TORCHELASTIC_RESTART_COUNT": "1",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    example = [str(ROOT / "examples/train_ddp.py"), "--steps", str(STEPS)]
    alone = spawn(example, env=theirs | {"EVERSTEP_LIGHTHOUSE": None, "OMP_NUM_THREADS": "1"})
    assert f"step {STEPS} " in alone.expect_line("participants 1", deadline_s=DEADLINE_S)
    assert alone.wait() == 0, alone.output()
