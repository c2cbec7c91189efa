"""Process groups that are rebuilt for each quorum and can be cut off at any moment."""

import torch

from everstep.torch_version import check_torch

check_torch(torch)  # before the first name that an unfit torch lacks
