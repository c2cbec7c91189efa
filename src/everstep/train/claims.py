"""What each member brings to the first operation of a quorum's group, as a row of bytes that a collective carries."""

import msgspec
import torch

from everstep.core.recovery_plan import Claim
from everstep.errors import ConfigError

CLAIM_BYTES = 512
_LENGTH_BYTES = 2


class RankClaim(msgspec.Struct, frozen=True, array_like=True):
    """A member's claim, of one rank of it: how many ranks the group has, and where this one serves its live state.

    `recovery` is "" for rank 0: its address stands in the quorum. `meets`: after a quorum with joiners has settled it
    takes part in `ReconfigurableProcessGroup.meet`, once the joiners have their state; False from an older version.
    `transport`: the name of its recovery transport, which must be the same on all.
    """

    claim: Claim
    group_size: int = 1
    recovery: str = ""
    meets: bool = False
    transport: str = "http"


_encode = msgspec.msgpack.Encoder().encode
_decoder = msgspec.msgpack.Decoder(RankClaim)


def pack(claim: RankClaim) -> torch.Tensor:
    content = _encode(claim)
    assert len(content) <= CLAIM_BYTES - _LENGTH_BYTES, "a history id or a recovery server's URL is far too long"
    row = len(content).to_bytes(_LENGTH_BYTES, "little") + content.ljust(CLAIM_BYTES - _LENGTH_BYTES, b"\0")
    return torch.frombuffer(bytearray(row), dtype=torch.uint8)


def unpack(row: torch.Tensor) -> RankClaim:
    content = bytes(row.tolist())
    return _decoder.decode(content[_LENGTH_BYTES : _LENGTH_BYTES + int.from_bytes(content[:_LENGTH_BYTES], "little")])


def check_sizes(claims: tuple[RankClaim, ...], rank: int) -> None:
    """The first member that holds the state sets how many ranks a group has; who differs must go."""
    first = next((claim for claim in claims if claim.claim.lineage is not None), claims[0])
    if claims[rank].group_size != first.group_size:
        raise ConfigError(
            f"this replica group has {claims[rank].group_size} ranks, the others have {first.group_size}: start every "
            "group with the same --nproc-per-node and --nnodes"
        )
