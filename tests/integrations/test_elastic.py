"""torchrun with torch's own agents, as real processes: a node is lost, and the job trains on."""

from pathlib import Path

import pytest

from tests.integrations.elastic import DEADLINE_S, elastic_job, kill_host
from tests.support.processes import Spawner
from tests.support.waiting import wait_until


def test_a_job_under_torchrun_trains_on_when_the_node_that_hosts_the_store_is_lost(
    spawn: Spawner, tmp_path: Path
) -> None:
    with elastic_job(spawn, tmp_path) as job:
        a, b = job.agent("1:2", "a"), job.agent("1:2", "b")
        a.expect_line("trains rank 0 of 2", DEADLINE_S)
        b.expect_line("trains rank 1 of 2", DEADLINE_S)
        kill_host(a)
        b.expect_line("rank 0 of 1 restarts 0", DEADLINE_S)  # a change of nodes costs no restart
        b.expect_line("trains rank 0 of 1", DEADLINE_S)
        job.end()
        b.expect_line("done rank 0 of 1", DEADLINE_S)
        assert b.wait(DEADLINE_S) == 0, b.output()


@pytest.mark.soak
def test_a_spare_of_a_job_that_succeeds_exits_with_zero(spawn: Spawner, tmp_path: Path) -> None:
    with elastic_job(spawn, tmp_path) as job:
        trains = job.agent("1:1", "a")
        trains.expect_line("trains rank 0 of 1", DEADLINE_S)
        spare = job.agent("1:1", "b")
        wait_until(lambda: job.nodes() == 2, what="the second node waits", deadline_s=DEADLINE_S)
        job.end()
        trains.expect_line("done rank 0 of 1", DEADLINE_S)
        assert trains.wait(DEADLINE_S) == 0, trains.output()
        assert spare.wait(DEADLINE_S) == 0, spare.output()
        assert "worker" not in spare.stdout_path.read_text()
