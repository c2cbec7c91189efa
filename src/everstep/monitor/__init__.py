"""Rank monitoring: the worker's beats in a page of shared memory, and the agent's reader of it. No torch.

Names are loaded when they are used: `everstep.heartbeat` must not cost what the agent's side needs.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from everstep.monitor.attach import attach as attach
    from everstep.monitor.client import RankMonitorClient as RankMonitorClient
    from everstep.monitor.client import RankMonitorClientError as RankMonitorClientError
    from everstep.monitor.control import WorkloadAction as WorkloadAction
    from everstep.monitor.control import WorkloadControlRequest as WorkloadControlRequest
    from everstep.monitor.reader import Monitor as Monitor

_HOMES = {
    "attach": "everstep.monitor.attach",
    "RankMonitorClient": "everstep.monitor.client",
    "RankMonitorClientError": "everstep.monitor.client",
    "WorkloadAction": "everstep.monitor.control",
    "WorkloadControlRequest": "everstep.monitor.control",
    "Monitor": "everstep.monitor.reader",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'everstep.monitor' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value
