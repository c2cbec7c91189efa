"""What an agent finds, and has to wait for, when it starts."""

import signal
from pathlib import Path

import pytest

from everstep.config import LighthouseSettings
from everstep.lighthouse.app import Lighthouse
from tests.launcher.agents import script, start_agent, stderr_of
from tests.support.processes import Spawner

PLAIN = ("--standalone", "--no-template")
TORCH_S = 60.0  # to import it, on a machine that does other things, too

LOADS_SLOWLY = """
import threading
threading.Event().wait({seconds})
"""


@pytest.mark.soak
def test_a_node_that_may_come_late_says_where_its_store_is_while_its_template_loads(
    spawn: Spawner, tmp_path: Path
) -> None:
    """Which takes longer than a node has to open a store. The workers are served when it has loaded."""
    script(tmp_path, LOADS_SLOWLY.format(seconds=12), "loads_slowly.py")
    meets = "import torch.distributed as dist\ndist.init_process_group('gloo')\nprint('met', flush=True)\n"
    with Lighthouse.in_thread(LighthouseSettings(port=0)) as lighthouse:
        elastic = ("--nnodes", "1:2", "--rdzv-id", "job", "--rdzv-conf", "last_call_timeout=1")
        arguments = (*elastic, "--lighthouse", lighthouse.address, "--nproc-per-node", "2")
        agent = start_agent(spawn, tmp_path, *arguments, "--preload", "loads_slowly", script(tmp_path, meets))
        for _ in range(2):
            agent.expect_line("met", TORCH_S)
        assert agent.wait() == 0
    said = stderr_of(agent)
    assert "opened no store" not in said
    assert "evicted" not in said.lower()


@pytest.mark.soak
def test_what_a_killed_agent_leaves_goes_with_the_next_one_and_what_a_live_one_has_stays(
    spawn: Spawner, tmp_path: Path
) -> None:
    def folders() -> set[str]:
        return {path.name for path in tmp_path.glob("everstep*")}

    waits = script(tmp_path, "import threading\nprint('up', flush=True)\nthreading.Event().wait()")
    agents = [start_agent(spawn, tmp_path, *PLAIN, waits) for _ in range(2)]
    for agent in agents:
        agent.expect_line("up")
    both = folders()
    assert len(both) == 2
    agents[0].kill()
    agents[0].wait()
    assert start_agent(spawn, tmp_path, *PLAIN, script(tmp_path, "", "nothing.py")).wait() == 0
    assert len(folders()) == 1
    assert folders() < both
    agents[1].kill(signal.SIGTERM)
    assert agents[1].wait() == 92
    assert folders() == set()
