"""What the first use of one of Everstep's names does beside loading it."""

import pytest

from tests.support.processes import Spawner

SCRIPT = """
import gc
import sys
import torch
import everstep as es

{before}
collected = []
gc.callbacks.append(lambda phase, info: collected.append(phase))
es.Manager
print(gc.isenabled(), len(collected), "everstep.train.manager" in sys.modules)
"""


@pytest.mark.parametrize(("before", "is_enabled"), [("", True), ("gc.disable()", False)])
def test_loading_looks_for_no_garbage_and_leaves_the_collector_as_it_was(
    spawn: Spawner, before: str, is_enabled: bool
) -> None:
    process = spawn(["-c", SCRIPT.format(before=before)])
    assert process.read_line() == f"{is_enabled} 0 True"
    assert process.wait() == 0
