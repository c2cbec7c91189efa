"""A replica group joins a job that trains already, with its peers' live state. See the README beside this file."""

import argparse
import collections
import logging
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

import everstep as es

SHOW_EVERY_S = 2.0
GROUPS = 2
STEPS_DRAWN = 2000  # of each group, at most

log = logging.getLogger("everstep.example")


class StepTimes:
    """When this group's latest steps ended, and how long each took, in seconds on a clock of its own."""

    def __init__(self) -> None:
        self._steps: collections.deque[tuple[float, float]] = collections.deque(maxlen=STEPS_DRAWN)
        self._last_at = time.monotonic()
        self._joined_at = 0.0

    def step_ended(self) -> None:
        now = time.monotonic()
        self._steps.append((now, now - self._last_at))
        self._last_at = now

    def joined(self) -> None:
        """The step that ended last is the first that all groups committed: everybody's clock has its zero there."""
        self._joined_at = self._last_at

    def table(self, rank: int) -> torch.Tensor:
        """[group, step, (end, duration)], zeros but for this group: a sum over the groups has everybody's."""
        rows = torch.zeros(GROUPS, STEPS_DRAWN, 2, dtype=torch.float64)
        for i, (end, took) in enumerate(self._steps):
            rows[rank, i] = torch.tensor([end - self._joined_at, took])
        return rows


def draw(path: Path, table: torch.Tensor, title: str) -> None:
    """Step times of all groups around the join. The first rank is the one that was there before."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 3.6), layout="constrained")
    pause_s = max(took for end, took in table[0].tolist() if took and abs(end) < 1e-6)
    window_s = max(2.0, 1.5 * pause_s)
    axes.axvspan(-pause_s, 0.0, color="0.92")
    for rank, (rows, mark) in enumerate(zip(table.tolist(), ("o", "x"), strict=True)):
        ends, tooks = zip(*((end, took * 1e3) for end, took in rows if took), strict=True)
        axes.plot(ends, tooks, mark, markersize=4, alpha=0.6, label=f"group {rank}")
    axes.set(yscale="log", xlim=(-pause_s - window_s, window_s), title=f"{title}: group 0 waits {pause_s:.2f} s")
    axes.set(xlabel="seconds since the first step that both groups committed", ylabel="step time in ms")
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=100)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps-together", type=int, default=200, help="end this many steps after the second came")
    parser.add_argument("--transport", choices=("http", "process_group"), default="http", help="of the live state")
    parser.add_argument("--state-gib", type=float, default=0.0, help="state beside the model's, the same in all groups")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw all groups' step times around the join")
    args = parser.parse_args()
    if args.plot is not None:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            parser.error("--plot needs matplotlib: pip install 'everstep[plot]'")
    return args


def main() -> None:
    args = parse()
    es.configure_logging()
    with es.Manager(recovery_transport=args.transport) as manager:
        table = train(manager, args.state_gib, args.steps_together)
    if args.plot is not None:  # the others do not wait for it
        draw(args.plot, table, f"a group joins, {args.state_gib:g} GiB of state, transport {args.transport}")


def train(manager: es.Manager, state_gib: float, steps_together: int) -> torch.Tensor:
    """Until so many steps after the second group came; returns everybody's step times."""
    inputs = torch.randn(4096, 16, generator=torch.Generator().manual_seed(0))
    dataset = TensorDataset(inputs, inputs.sum(1, keepdim=True).sin())
    net = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
    model = es.DistributedDataParallel(manager, net)
    optimizer = es.Optimizer(manager, torch.optim.AdamW(model.parameters(), lr=1e-3))
    sampler = es.DistributedSampler(manager, dataset, batch_size=32)
    loader = DataLoader(dataset, batch_sampler=sampler)
    ballast = torch.nn.Module()
    ballast.register_buffer("state", torch.rand(int(state_gib * (1 << 28))))  # its memory is real from the start
    manager.register("ballast", ballast)
    times = StepTimes()
    shown_at, last_step = 0.0, 0
    for epoch in range(1_000_000):
        sampler.set_epoch(epoch)
        for x, y in sampler.batches(loader):
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(model(x), y)
            loss.backward()
            is_last = manager.current_step() + 1 == last_step
            table = times.table(manager.participating_rank() or 0) if is_last else torch.empty(0)
            if is_last:  # a part of the step like the gradients: once it commits every group has all times
                manager.allreduce(table, op="sum")
            result = optimizer.step()
            times.step_ended()
            if not last_step and result.participants == GROUPS:
                last_step = result.step + steps_together
                times.joined()
                log.info("step %d is the first that 2 groups committed", result.step)
            is_end = is_last and result.committed
            if is_end or time.monotonic() - shown_at > SHOW_EVERY_S:
                shown_at = time.monotonic()
                log.info("step %d, %d groups, loss %.4f", result.step, result.participants, loss.item())
            if is_end:
                everything = [*net.parameters(), *ballast.buffers()]
                log.info("the end: parameters sum to %.6f", sum(p.sum().item() for p in everything))
                return table
    raise AssertionError("unreachable")


if __name__ == "__main__":
    main()
