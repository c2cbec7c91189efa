"""What the server has imported that the tests' workers are forked from, so that none of them spends seconds on it."""

from everstep.collectives.torch_private import import_dynamo
from tests.train import scripts

__all__ = ["scripts"]

import_dynamo()  # an optimizer would, in each of them
