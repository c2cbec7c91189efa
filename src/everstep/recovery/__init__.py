"""Live state from a peer's memory: snapshot, offer, fetch. What travels is a manifest, raw bytes and digests."""

import torch

from everstep.torch_version import check_torch

check_torch(torch)  # before the first name that an unfit torch lacks

# ruff: noqa: E402
from everstep.recovery.arrival import Arrival
from everstep.recovery.auth import TransferAuth
from everstep.recovery.client import Fetch
from everstep.recovery.landing import InPlace, Landing
from everstep.recovery.manifest import Limits
from everstep.recovery.over_group import GroupTransport
from everstep.recovery.over_http import HttpTransport
from everstep.recovery.report import FetchReport
from everstep.recovery.request import FetchRequest
from everstep.recovery.server import RecoveryServer, ServerOptions
from everstep.recovery.snapshot import Snapshot
from everstep.recovery.transport import Fetching, Meeting, Peer, Place, RecoveryTransport, Transfer

__all__ = [
    "Arrival",
    "Fetch",
    "FetchReport",
    "FetchRequest",
    "Fetching",
    "GroupTransport",
    "HttpTransport",
    "InPlace",
    "Landing",
    "Limits",
    "Meeting",
    "Peer",
    "Place",
    "RecoveryServer",
    "RecoveryTransport",
    "ServerOptions",
    "Snapshot",
    "Transfer",
    "TransferAuth",
]
