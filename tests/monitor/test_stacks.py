"""Stacks that a process writes when it is asked for them."""

import os
import time
from pathlib import Path

from everstep.monitor.first import STACKS_OFFSET
from everstep.monitor.stacks import StackSource, dump, dump_all
from tests.support.processes import Spawner

SHOWS = """
import os, sys, threading
from everstep.monitor.first import OPEN_FLAGS, write_stacks_to
def stuck_layer():
    print("shows", flush=True)
    threading.Event().wait()
write_stacks_to(os.open(sys.argv[1], OPEN_FLAGS))
stuck_layer()
"""


def test_a_rank_that_has_not_run_when_its_time_is_up_is_waited_for_and_others_are_not(
    spawn: Spawner, tmp_path: Path
) -> None:
    """On a busy machine it is given no processor: here it has no time at all."""
    path = tmp_path / "stacks"
    path.write_bytes(bytes(STACKS_OFFSET))
    process = spawn(["-c", SHOWS, str(path)])
    process.expect_line("shows")
    with path.open("rb") as file:
        source = StackSource(process.pid, file.fileno())
        for _ in range(20):
            text = dump(source, time.monotonic())
            assert text.count("in stuck_layer") == 1
            assert text.rstrip().endswith("in <module>")
        begun = time.monotonic()
        dump_all([source], begun)
        assert time.monotonic() - begun < 0.5
    process.kill()


def test_a_process_that_is_gone_is_not_waited_for(tmp_path: Path, spawn: Spawner) -> None:
    path = tmp_path / "stacks"
    path.touch()
    process = spawn(["-c", "pass"])
    process.wait()
    with path.open("rb") as file:
        begun = time.monotonic()
        assert dump(StackSource(process.pid, file.fileno()), begun + 9.0) == ""
        assert time.monotonic() - begun < 5.0
    assert os.stat(path).st_size == 0
