"""The largest of all ranks, over torch.distributed where the script has initialised it.

torch is not imported here: a process that has a process group has it, and for any other it would be seconds and memory.
"""

import sys
import time
import zlib
from collections.abc import Mapping
from typing import Any

from everstep.monitor.attach import say

SLOTS = 4096
LOOK_S = 0.002


def over_ranks(longest: Mapping[str, float], timeout_s: float) -> dict[str, float]:
    """Of each key the largest of the default process group's ranks, each of which calls this; alone, its own.

    Ranks need not have been in the same sections: a key has a slot of one vector. (Two keys of one slot, which is one
    pair in 4096, have the larger of both.) With a Manager that group is one replica group, which lives and dies
    together; no other group is waited for.

    A rank that does not come in time, or an error, leaves everybody with its own, and is said once. The reduction was
    begun all the same, so that collectives after it still meet those of the others.
    """
    dist: Any = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized():
        return dict(longest)
    deadline = time.monotonic() + timeout_s
    try:
        largest = _reduce(dist, longest, deadline)
    except (RuntimeError, ValueError, OSError) as error:  # as backends raise them
        say(f"timeouts are calculated from this rank's intervals alone ({error})")
        return dict(longest)
    return {key: max(own, largest[_slot(key)]) for key, own in longest.items()}


def _reduce(dist: Any, longest: Mapping[str, float], deadline: float) -> list[float]:
    torch: Any = sys.modules["torch"]
    slots = [0.0] * SLOTS
    for key, seconds in longest.items():
        slots[_slot(key)] = max(seconds, slots[_slot(key)])
    tensor = torch.tensor(slots, dtype=torch.float32, device=_device(dist))
    work = dist.all_reduce(tensor, op=dist.ReduceOp.MAX, async_op=True)
    while not work.is_completed():
        if time.monotonic() >= deadline:
            raise RuntimeError("not all ranks came in time")
        time.sleep(LOOK_S)  # `wait` with a timeout would end NCCL's communicator
    work.wait()
    largest: list[float] = tensor.tolist()
    return largest


def _device(dist: Any) -> str:
    """Where the default group's backend wants its tensors: "cpu" if it may be; of "cuda" the current one."""
    config = str(dist.get_backend_config())  # cpu:gloo,cuda:nccl
    kinds = [part.partition(":")[0] for part in config.split(",") if ":" in part]
    return "cpu" if "cpu" in kinds or not kinds else kinds[0]


def _slot(key: str) -> int:
    return zlib.crc32(key.encode()) % SLOTS
