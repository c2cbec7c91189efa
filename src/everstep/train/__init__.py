"""What a training script uses: the Manager, DistributedDataParallel, Optimizer and DistributedSampler."""

import torch

from everstep.torch_version import check_torch

check_torch(torch)  # before the first name that an unfit torch lacks
