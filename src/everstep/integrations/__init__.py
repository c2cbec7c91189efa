"""Everstep inside other launchers and frameworks."""

import torch

from everstep.torch_version import check_torch

check_torch(torch)
