"""Who waits for other ranks, told from what faulthandler wrote of real ones."""

import pytest

from everstep.core.stacks import waits_for_others

DDP = "/venv/lib/python3.11/site-packages/torch/nn/parallel/distributed.py"
MODULE = "/venv/lib/python3.11/site-packages/torch/nn/modules/module.py"
THREADING = "/usr/lib/python3.11/threading.py"
C10D = "/venv/lib/python3.11/site-packages/torch/distributed/distributed_c10d.py"
AUTOGRAD = "/venv/lib/python3.11/site-packages/torch/autograd/graph.py"
IN_DDP = (
    (MODULE, "_call_impl"),
    (DDP, "_run_ddp_forward"),
    (DDP, "forward"),
    (MODULE, "_call_impl"),
    ("train.py", "m"),
)


@pytest.mark.parametrize(
    ("frames", "waits"),
    [
        (((THREADING, "wait"), ("data.py", "stuck_layer"), ("data.py", "forward"), *IN_DDP), False),
        ((("data.py", "forward"), *IN_DDP), False),
        (((DDP, "_sync_module_states"), (DDP, "_sync_buffers"), (DDP, "_pre_forward"), *IN_DDP[2:]), True),
        (((C10D, "all_reduce"), ("train.py", "<module>")), True),
        (((AUTOGRAD, "_engine_run_backward"), ("train.py", "<module>")), True),
        ((("ops.py", "backward"), (AUTOGRAD, "_engine_run_backward"), ("train.py", "<module>")), False),
    ],
    ids=["stuck in a layer", "C in a layer", "buffers", "collective", "backward", "stuck in a backward of one's own"],
)
def test_a_rank_waits_for_others_where_its_innermost_code_does(
    frames: tuple[tuple[str, str], ...], waits: bool
) -> None:
    lines = [f'  File "{file}", line 1 in {function}' for file, function in frames]
    assert waits_for_others("\n".join(["Current thread 0x1 (most recent call first):", *lines])) is waits
