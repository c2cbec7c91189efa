"""What the tests' workers train: a small regression that takes every path of the reductions when it is `rich`."""

from typing import Any

import torch
from torch.utils.data import TensorDataset

SAMPLES = 512
INPUTS = 8
LEARNING_RATE = 0.05
MOMENTUM = 0.9


class Rich(torch.nn.Module):
    """Two dtypes make two buckets of gradients; the norm's statistics are reduced as buffers, of two dtypes as well."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = torch.nn.Linear(INPUTS, width)
        self.norm = torch.nn.BatchNorm1d(width)
        self.last = torch.nn.Linear(width, 1)
        self.scale = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.last(torch.tanh(self.norm(self.first(x)))) * self.scale
        return out


def make_net(width: int, is_rich: bool, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    if is_rich:
        return Rich(width)
    return torch.nn.Sequential(torch.nn.Linear(INPUTS, width), torch.nn.Tanh(), torch.nn.Linear(width, 1))


def make_dataset() -> TensorDataset:
    """Of (inputs, targets, number of the sample)."""
    inputs = torch.randn(SAMPLES, INPUTS, generator=torch.Generator().manual_seed(1))
    return TensorDataset(inputs, inputs.sum(1, keepdim=True).sin(), torch.arange(len(inputs)))


def loss_of(net: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out = net(x)
    return torch.nn.functional.mse_loss(out, y.to(out.dtype))
