"""Rules of the training loop that a quorum of one shows as well as any: no lighthouse, no network."""

from collections.abc import Iterator

import pytest
import torch

import everstep as es


@pytest.fixture
def manager() -> Iterator[es.Manager]:
    with es.Manager() as manager:
        yield manager


def net(*, batch_norm: bool = False) -> torch.nn.Sequential:
    torch.manual_seed(0)
    layers: list[torch.nn.Module] = [torch.nn.Linear(4, 8)]
    if batch_norm:
        layers.append(torch.nn.BatchNorm1d(8))
    return torch.nn.Sequential(*layers, torch.nn.ReLU(), torch.nn.Linear(8, 1))


def batch(seed: int = 0, size: int = 6) -> torch.Tensor:
    return torch.randn(size, 4, generator=torch.Generator().manual_seed(seed))


def backward(loss: torch.Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


def parameters(module: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_alone_it_trains_as_plain_torch_does(manager: es.Manager) -> None:
    plain, wrapped = net(), net()
    reference = torch.optim.AdamW(plain.parameters())
    model = es.DistributedDataParallel(manager, wrapped)
    optimizer = es.Optimizer(manager, torch.optim.AdamW(wrapped.parameters()))
    for step in range(4):
        reference.zero_grad()
        backward(plain(batch(step)).square().mean())
        reference.step()
        optimizer.zero_grad()
        backward(model(batch(step)).square().mean())
        assert optimizer.step()
    assert same(parameters(plain), parameters(wrapped))
    assert manager.current_step() == 4
    assert manager.batches_committed() == 4


def test_a_step_with_a_reported_error_changes_nothing_and_says_why(manager: es.Manager) -> None:
    module = net()
    model = es.DistributedDataParallel(manager, module)
    optimizer = es.Optimizer(manager, torch.optim.SGD(module.parameters(), lr=0.1))
    before = parameters(module)
    optimizer.zero_grad()
    backward(model(batch()).square().mean())
    manager.report_error(ValueError("a bad batch"))
    assert isinstance(manager.errored(), ValueError)
    result = optimizer.step()
    assert not result
    assert "a bad batch" in result.why
    assert manager.errored() is None
    assert same(before, parameters(module))
    optimizer.zero_grad()
    backward(model(batch()).square().mean())
    assert optimizer.step().step == 1


def test_no_sync_accumulates_to_the_gradient_of_the_joint_batch(manager: es.Manager) -> None:
    module, joint = net(), net()
    model = es.DistributedDataParallel(manager, module)
    optimizer = es.Optimizer(manager, torch.optim.SGD(module.parameters(), lr=0.1))
    optimizer.zero_grad()
    with model.no_sync():
        backward(model(batch(1)).square().sum())
    backward(model(batch(2)).square().sum())
    backward(joint(torch.cat([batch(1), batch(2)])).square().sum())
    for ours, theirs in zip(module.parameters(), joint.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert optimizer.step()


def test_a_parameter_that_nobody_used_keeps_no_gradient(manager: es.Manager) -> None:
    module = torch.nn.ModuleDict({"used": torch.nn.Linear(4, 1), "unused": torch.nn.Linear(4, 1)})
    unused = module["unused"]
    assert isinstance(unused, torch.nn.Linear)

    class Half(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = module

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.parts["used"](x)
            return result

    model = es.DistributedDataParallel(manager, Half())
    optimizer = es.Optimizer(manager, torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5))
    before = unused.weight.detach().clone()
    optimizer.zero_grad()
    backward(model(batch()).sum())
    assert unused.weight.grad is None
    assert optimizer.step()
    assert torch.equal(before, unused.weight)


def test_schedulers_advance_on_commit_alone(manager: es.Manager) -> None:
    module = net()
    inner = torch.optim.SGD(module.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(inner, gamma=0.5)
    model = es.DistributedDataParallel(manager, module)
    optimizer = es.Optimizer(manager, inner, schedulers=[scheduler])
    for is_bad in (True, False):
        optimizer.zero_grad()
        backward(model(batch()).square().mean())
        if is_bad:
            manager.report_error(ValueError("no"))
        optimizer.step()
        assert inner.param_groups[0]["lr"] == (1.0 if is_bad else 0.5)


def test_before_step_clips_what_the_optimizer_applies(manager: es.Manager) -> None:
    module = net()
    seen: list[float] = []

    def clip() -> None:
        seen.append(float(torch.nn.utils.clip_grad_norm_(module.parameters(), 1e-3)))

    model = es.DistributedDataParallel(manager, module)
    optimizer = es.Optimizer(manager, torch.optim.SGD(module.parameters(), lr=1.0), before_step=clip)
    before = parameters(module)
    optimizer.zero_grad()
    backward(model(batch()).square().sum() * 100)
    assert optimizer.step()
    moved = torch.sqrt(sum(((a - b) ** 2).sum() for a, b in zip(before, parameters(module), strict=True)))  # type: ignore[arg-type]
    assert len(seen) == 1
    assert float(moved) == pytest.approx(1e-3, rel=1e-3)


def test_a_grad_scaler_that_skips_the_step_aborts_it(manager: es.Manager) -> None:
    module = net()
    model = es.DistributedDataParallel(manager, module)
    optimizer = es.Optimizer(manager, torch.optim.SGD(module.parameters(), lr=0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = parameters(module)
    for scale in (float("inf"), 1.0):
        optimizer.zero_grad()
        backward(scaler.scale(model(batch()).square().mean() * scale))
        scaler.step(optimizer)
        scaler.update()
        if scale != 1.0:
            assert same(before, parameters(module))
    assert manager.current_step() == 1
    assert not same(before, parameters(module))


def test_buffers_of_an_aborted_step_return_to_what_was_committed(manager: es.Manager) -> None:
    module = net(batch_norm=True)
    model = es.DistributedDataParallel(manager, module)
    optimizer = es.Optimizer(manager, torch.optim.SGD(module.parameters(), lr=0.1))
    states = []
    for is_bad in (False, True, False):
        optimizer.zero_grad()
        backward(model(batch(3)).square().mean())
        if is_bad:
            manager.report_error(ValueError("no"))
        optimizer.step()
        states.append({name: value.clone() for name, value in module.named_buffers()})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert int(states[2]["1.num_batches_tracked"]) == 2


def test_not_finite_gradients_abort_the_step_where_that_is_asked_for(manager: es.Manager) -> None:
    module = net()
    model = es.DistributedDataParallel(manager, module)
    optimizer = es.Optimizer(manager, torch.optim.SGD(module.parameters(), lr=0.1), skip_nonfinite=True)
    optimizer.zero_grad()
    backward(model(batch()).square().mean() * float("nan"))
    result = optimizer.step()
    assert not result.committed
    assert "not finite" in result.why


def test_a_closure_computes_the_loss_once_before_the_vote(manager: es.Manager) -> None:
    module = net()
    model = es.DistributedDataParallel(manager, module)
    optimizer = es.Optimizer(manager, torch.optim.SGD(module.parameters(), lr=0.1))
    calls = []

    def closure() -> torch.Tensor:
        calls.append(1)
        optimizer.zero_grad()
        loss: torch.Tensor = model(batch()).square().mean()
        backward(loss)
        return loss

    result = optimizer.step(closure)
    assert result.committed
    assert calls == [1]
    assert float(result.loss) > 0


def test_allreduce_of_the_scripts_own_tensors(manager: es.Manager) -> None:
    tensor = torch.tensor([1.0, 2.0])
    manager.allreduce(tensor, "avg").wait()
    assert tensor.tolist() == [1.0, 2.0]
    assert manager.should_commit()
    with pytest.raises(es.ConfigError, match="op='mean'"):
        manager.allreduce(tensor, "mean")


def test_a_name_registered_twice_is_refused(manager: es.Manager) -> None:
    module = net()
    es.DistributedDataParallel(manager, module)
    with pytest.raises(es.ConfigError, match="registered already"):
        es.DistributedDataParallel(manager, net())


def test_a_module_with_nothing_to_train_is_refused(manager: es.Manager) -> None:
    frozen = net().requires_grad_(False)
    with pytest.raises(es.ConfigError, match="nothing to train"):
        es.DistributedDataParallel(manager, frozen)


def test_a_checkpoint_continues_at_its_step() -> None:
    manager = es.Manager()
    manager.load_state_dict({"step": 41, "batches_committed": 82})
    with manager:
        assert manager.should_commit()
        assert manager.state_dict() == {"step": 42, "batches_committed": 83}
        with pytest.raises(es.ConfigError, match="before it starts"):
            manager.load_state_dict({"step": 1, "batches_committed": 1})


def test_a_manager_that_is_not_started_says_how_to_start_it() -> None:
    with pytest.raises(es.ConfigError, match=r"with es\.Manager"):
        es.Manager().start_step()
