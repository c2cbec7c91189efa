"""Everstep: a PyTorch training job that keeps stepping while machines, processes and networks under it fail.

Names are loaded when they are used, so that `import everstep` costs what the lighthouse and the command line need, and
torch only where training happens.
"""

import gc
import importlib
from types import ModuleType
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from everstep.core.events import EventKind as EventKind
    from everstep.core.events import JobEvent as JobEvent
    from everstep.errors import ConfigError as ConfigError
    from everstep.errors import EverstepError as EverstepError
    from everstep.errors import GroupDrained as GroupDrained
    from everstep.errors import GroupFailed as GroupFailed
    from everstep.errors import LighthouseRefused as LighthouseRefused
    from everstep.errors import LighthouseUnreachable as LighthouseUnreachable
    from everstep.lighthouse.app import Lighthouse as Lighthouse
    from everstep.link.events import Subscription as Subscription
    from everstep.logs import configure_logging as configure_logging
    from everstep.monitor.attach import heartbeat as heartbeat
    from everstep.monitor.attach import section as section
    from everstep.subscribe import subscribe_events as subscribe_events
    from everstep.subscribe import subscribe_failures as subscribe_failures
    from everstep.train.ddp import DistributedDataParallel as DistributedDataParallel
    from everstep.train.manager import Manager as Manager
    from everstep.train.manager import StepResult as StepResult
    from everstep.train.optimizer import Optimizer as Optimizer
    from everstep.train.rng_state import RngState as RngState
    from everstep.train.sampler import DistributedSampler as DistributedSampler

_HOMES = {
    "ConfigError": "everstep.errors",
    "EverstepError": "everstep.errors",
    "LighthouseRefused": "everstep.errors",
    "LighthouseUnreachable": "everstep.errors",
    "EventKind": "everstep.core.events",
    "GroupDrained": "everstep.errors",
    "GroupFailed": "everstep.errors",
    "JobEvent": "everstep.core.events",
    "Lighthouse": "everstep.lighthouse.app",
    "DistributedDataParallel": "everstep.train.ddp",
    "Manager": "everstep.train.manager",
    "StepResult": "everstep.train.manager",
    "Optimizer": "everstep.train.optimizer",
    "RngState": "everstep.train.rng_state",
    "DistributedSampler": "everstep.train.sampler",
    "Subscription": "everstep.link.events",
    "configure_logging": "everstep.logs",
    "heartbeat": "everstep.monitor.attach",
    "section": "everstep.monitor.attach",
    "subscribe_events": "everstep.subscribe",
    "subscribe_failures": "everstep.subscribe",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'everstep' has no attribute {name!r}")
    value = getattr(_load(home), name)
    globals()[name] = value  # `es.heartbeat` is called often
    return value


def _load(home: str) -> ModuleType:
    """Import it without collections of garbage: modules make none, and each collection looks through all of torch's."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return importlib.import_module(home)
    finally:
        if was_enabled:
            gc.enable()


def __dir__() -> list[str]:
    return sorted(__all__)
