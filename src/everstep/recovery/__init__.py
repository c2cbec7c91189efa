"""Live state from a peer's memory: snapshot, offer, fetch. What travels is a manifest, raw bytes and digests."""

import torch

from everstep.torch_version import check_torch

check_torch(torch)  # before the first name that an unfit torch lacks

# ruff: noqa: E402
from everstep.recovery.auth import TransferAuth
from everstep.recovery.client import Fetch
from everstep.recovery.gathering import FetchReport
from everstep.recovery.landing import InPlace, Landing
from everstep.recovery.manifest import Limits
from everstep.recovery.request import FetchRequest
from everstep.recovery.server import RecoveryServer, ServerOptions
from everstep.recovery.snapshot import Snapshot

__all__ = [
    "Fetch",
    "FetchReport",
    "FetchRequest",
    "InPlace",
    "Landing",
    "Limits",
    "RecoveryServer",
    "ServerOptions",
    "Snapshot",
    "TransferAuth",
]
