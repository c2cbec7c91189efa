"""The random number generators of this process, as one more part of the state that a joiner copies."""

import random
import sys
from collections.abc import Mapping
from typing import Any

import torch


class RngState:
    """For `manager.register("rng", es.RngState())`: torch's generator (the current GPU's, too), Python's and NumPy's.

    A joiner goes on with the numbers that its donor draws next. Groups that draw their own (dropout) would draw alike
    from then on: reseed in the joiner where that matters, or do not register this.
    """

    def state_dict(self) -> dict[str, object]:
        state: dict[str, object] = {"torch": torch.get_rng_state(), "python": random.getstate()}
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            state["cuda"] = torch.cuda.get_rng_state()
        numpy = sys.modules.get("numpy")  # who has not imported it has drawn nothing from it
        if numpy is not None:
            state["numpy"] = numpy.random.get_state()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        torch.set_rng_state(state["torch"])
        random.setstate(state["python"])
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
        numpy = sys.modules.get("numpy")
        if "numpy" in state and numpy is not None:
            numpy.random.set_state(state["numpy"])
