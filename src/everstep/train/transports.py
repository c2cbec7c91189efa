"""Which recovery transport a Manager uses, and who gives what to whom in the terms of transports."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from everstep.collectives.gloo_peers import GlooPeers, PeerPlace
from everstep.collectives.nccl import allows_late_writes
from everstep.collectives.nccl_peers import DevicePlace, NcclPeers
from everstep.collectives.process_group import Membership
from everstep.config import is_loopback
from everstep.core.recovery_plan import RecoveryPlan
from everstep.core.types import Lineage, Quorum
from everstep.errors import ConfigError
from everstep.recovery import GroupTransport, HttpTransport, Meeting, Peer, Place, RecoveryTransport, Transfer
from everstep.recovery.over_group import MakePeers
from everstep.train.claims import RankClaim

NAME_CHARS_MAX = 64
ADDRESS_CHARS_MAX = 200


def over_gloo(place: Place, transfer: Transfer, number: int) -> GlooPeers:
    """`number`: this member's among the joiner, which is 0, and its donors."""
    return GlooPeers(PeerPlace(membership=membership_of(place, transfer, number), bind_host=place.host))


def membership_of(place: Place, transfer: Transfer, number: int) -> Membership:
    meeting = transfer.meeting
    return Membership(
        quorum_id=meeting.quorum_id,
        rank=number,
        size=1 + len(transfer.donors),
        store=meeting.store,
        timeout_s=place.timeout_s,
        prefix=meeting.prefix,
    )


class OverNccl:
    """As `over_gloo`, and between GPUs as well: the current one of the thread that makes a group."""

    def __init__(self) -> None:
        self._has_failed = threading.Event()  # at this member as a joiner

    def __call__(self, place: Place, transfer: Transfer, number: int) -> NcclPeers:
        device = torch.device("cuda", torch.cuda.current_device())
        there = DevicePlace(
            membership=membership_of(place, transfer, number),
            device=device,
            name=str(torch.cuda.get_device_properties(device).uuid),
            has_failed=self._has_failed if number == 0 else threading.Event(),
        )
        return NcclPeers(over_gloo(place, transfer, number), there)


def check_place(place: Place) -> None:
    if place.auth is None and not is_loopback(place.host):
        raise ConfigError(
            f"recovery would give the model to anyone who reaches {place.host}; set a job token (EVERSTEP_TOKEN_FILE), "
            "or use 127.0.0.1"
        )


_OURS: dict[str, Callable[[MakePeers], RecoveryTransport]] = {
    "http": lambda _: HttpTransport(),
    "process_group": lambda make_peers: GroupTransport(make_peers, check_place),
}


def peers_for(backend: str, nccl_environment: Mapping[str, str]) -> MakePeers:
    return OverNccl() if backend == "nccl" and not allows_late_writes(nccl_environment) else over_gloo


def transport_for(choice: object, make_peers: MakePeers = over_gloo) -> RecoveryTransport:
    """The value of `Manager(recovery_transport=...)`: a name of ours, or an object that is one."""
    if isinstance(choice, str):
        if choice not in _OURS:
            raise ConfigError(
                f"recovery_transport={choice!r} is unknown; use {' or '.join(map(repr, _OURS))}, or an object of your "
                "own (docs/recovery.md)"
            )
        return _OURS[choice](make_peers)
    if not isinstance(choice, RecoveryTransport):
        raise ConfigError(
            f"recovery_transport={choice!r} is no transport: it needs name, open, offer, withdraw, fetch and close "
            "(docs/recovery.md)"
        )
    if not 0 < len(choice.name) <= NAME_CHARS_MAX:
        raise ConfigError(f"a recovery transport's name has 1 to {NAME_CHARS_MAX} characters, not {choice.name!r}")
    return choice


def check_address(transport: RecoveryTransport, address: str) -> str:
    """What its `open` returned."""
    if len(address) > ADDRESS_CHARS_MAX:
        raise ConfigError(
            f"the recovery transport {transport.name!r} is reached at {address[:40]!r}…: {len(address)} characters; "
            f"use at most {ADDRESS_CHARS_MAX}"
        )
    return address


def check_same_transport(claims: Sequence[RankClaim], rank: int) -> None:
    """The first member that holds the state sets the transport; who differs must go."""
    first = next((claim for claim in claims if claim.claim.lineage is not None), claims[0])
    if claims[rank].transport != first.transport:
        raise ConfigError(
            f"this member recovers live state by recovery_transport={claims[rank].transport!r}, the others by "
            f"{first.transport!r}: start every replica group with the same"
        )


@dataclass(frozen=True, kw_only=True)
class Roll:
    """A settled quorum's members, as transports see them; `addresses` by rank, `rank` this member's own.

    `prefix` keeps the ranks of a replica group apart (`Presence.rank_prefix`).
    """

    quorum: Quorum
    rank: int
    addresses: tuple[str, ...]
    prefix: str = ""

    def transfer(self, lineage: Lineage, receiver: int, donors: Sequence[int]) -> Transfer:
        prefix = f"{self.prefix}recovery{receiver}"
        return Transfer(
            key=f"{self.quorum.id}/{lineage.step}/{lineage.digest.hex()}",
            rank=self.rank,
            joiner=self._peer(receiver),
            donors=tuple(map(self._peer, donors)),
            meeting=Meeting(quorum_id=self.quorum.id, store=self.quorum.store, prefix=prefix),
        )

    def donations(self, plan: RecoveryPlan) -> list[Transfer]:
        """The transfers that this member is a donor of."""
        receivers = plan.receivers_of(self.rank)
        return [self.transfer(plan.lineage, receiver, plan.donors_of(receiver)) for receiver in receivers]

    def _peer(self, rank: int) -> Peer:
        return Peer(rank=rank, name=str(self.quorum.members[rank].id), address=self.addresses[rank])
