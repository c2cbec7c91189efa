"""What the threads of Gloo do, as /proc tells it: torch does not name them to its callers (Linux)."""

import os

_OP_THREAD_NAME = "pt_gloo_runloop"


def thread_ids() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/task")}


def sleep_of(thread: int) -> str | None:
    """Tells one sleep of a thread that runs operations from another; "" while it is awake, None for other threads."""
    try:
        with open(f"/proc/self/task/{thread}/status") as status:
            lines = dict(line.split(":", 1) for line in status)
    except OSError:
        return None
    if lines["Name"].strip() != _OP_THREAD_NAME:
        return None
    if lines["State"].split()[0] != "S":
        return ""
    return f"{thread} {lines['voluntary_ctxt_switches'].strip()}"
