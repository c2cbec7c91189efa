"""A process that starts again imports no more than it needs: others wait for it."""

import subprocess
import sys

import pytest

SCRIPT = """
import sys
import everstep as es
with es.Manager() as manager:
    import torch
    for make in (torch.optim.SGD, torch.optim.AdamW):
        net = torch.nn.Linear(3, 2)
        wrapped = make(net.parameters(), lr=0.1)
        stepped = []
        wrapped.register_step_post_hook(lambda *_: stepped.append(1))
        scheduler = torch.optim.lr_scheduler.StepLR(wrapped, 1)
        model = es.DistributedDataParallel(manager, net, name=make.__name__)
        optimizer = es.Optimizer(manager, wrapped, schedulers=[scheduler], name=make.__name__ + "'s")
        for _ in range(2):
            before = net.weight.clone()
            optimizer.zero_grad()
            model(torch.ones(1, 3)).sum().backward()
            assert optimizer.step()
            assert not torch.equal(before, net.weight)
        optimizer.load_state_dict(optimizer.state_dict())
        assert len(stepped) == 2, stepped
    assert "torch._dynamo" not in sys.modules
    import torch._dynamo
    optimizer.zero_grad()
    model(torch.ones(1, 3)).sum().backward()
    assert optimizer.step()
    assert len(stepped) == 3, stepped
"""


@pytest.mark.soak
def test_no_optimizer_imports_dynamo_and_all_go_on_when_something_else_does() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", SCRIPT], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
