"""Reads what faulthandler writes: which thread is where, and whether the process waits for other ranks.

faulthandler lists a process's threads from the youngest to the oldest, each from its innermost frame outwards.
"""

import re

_FRAME = re.compile(r'^  File "(?P<file>[^"]*)", line \d+ in (?P<function>.*)$')
_THREAD = re.compile(r"^(Current thread|Thread) ", re.MULTILINE)
# Where a rank is that waits for others: in a collective, or in a backward pass that ends in one.
_WAITS_IN_FILES = (
    "torch/distributed/",
    "torch/nn/parallel/distributed.py",
    "everstep/collectives/",
    "everstep/monitor/maximum.py",
)
_WAITS_IN_FUNCTIONS = ("_engine_run_backward",)
_PASSED_ON = ("torch/_ops.py", "torch/utils/_contextlib.py")
_WRAPS = ("forward", "_run_ddp_forward")  # of DistributedDataParallel and its like


def main_thread(stacks: str) -> list[tuple[str, str]]:
    """(file, function) of the main thread, from the innermost frame outwards."""
    frames: list[tuple[str, str]] = []
    for line in stacks.splitlines():
        if line.startswith(("Thread ", "Current thread ")):
            frames = []
        elif (found := _FRAME.match(line)) is not None:
            frames.append((found["file"], found["function"]))
    return frames


def cut(stacks: str, chars_max: int) -> str:
    """Within the bound: all of it, else the main thread first, from its innermost frame outwards."""
    if len(stacks) <= chars_max:
        return stacks
    of_rank = stacks.partition("\nProcess ")[0]  # its children come after it
    begins = [found.start() for found in _THREAD.finditer(of_rank)]
    main = stacks[begins[-1] :] if begins else stacks
    return main[: chars_max - 4] + "\n..."


def waits_for_others(stacks: str) -> bool | None:
    """None: the stacks do not say."""
    frames = main_thread(stacks)
    if not frames:
        return None
    for file, function in frames:
        if ("/lib/python3" in file and "site-packages" not in file) or file.endswith(_PASSED_ON):
            continue  # waits for whoever has called it
        if function in _WRAPS:
            return False  # what it wraps is a user's module, in C
        return any(part in file for part in _WAITS_IN_FILES) or function in _WAITS_IN_FUNCTIONS
    return False
