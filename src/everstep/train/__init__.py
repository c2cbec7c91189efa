"""What a training script uses: the Manager, DistributedDataParallel, Optimizer and DistributedSampler."""

import torch

from everstep.torch_version import check_torch

check_torch(torch)  # before the first name that an unfit torch lacks

# ruff: noqa: E402
from everstep.collectives.torch_private import keep_dynamo_out

keep_dynamo_out()  # before the script makes an optimizer
