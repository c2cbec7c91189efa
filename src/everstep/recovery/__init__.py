"""Live state from a peer's memory: snapshot, offer, fetch. What travels is a manifest, raw bytes and digests."""

from everstep.recovery.auth import TransferAuth
from everstep.recovery.client import Fetch, FetchRequest
from everstep.recovery.landing import Landing
from everstep.recovery.manifest import Limits
from everstep.recovery.server import RecoveryServer, ServerOptions
from everstep.recovery.snapshot import Snapshot

__all__ = ["Fetch", "FetchRequest", "Landing", "Limits", "RecoveryServer", "ServerOptions", "Snapshot", "TransferAuth"]
