"""Live state from a peer's memory: snapshot, offer, fetch. What travels is a manifest, raw bytes and digests."""

import torch

from everstep.torch_version import check_torch

check_torch(torch)  # before the first name that an unfit torch lacks

# ruff: noqa: E402
from everstep.recovery.auth import TransferAuth
from everstep.recovery.client import Fetch, FetchRequest
from everstep.recovery.landing import Landing
from everstep.recovery.manifest import Limits
from everstep.recovery.server import RecoveryServer, ServerOptions
from everstep.recovery.snapshot import Snapshot

__all__ = ["Fetch", "FetchRequest", "Landing", "Limits", "RecoveryServer", "ServerOptions", "Snapshot", "TransferAuth"]
