"""What each member brings to the first operation of a quorum's group, as a row of bytes that a collective carries."""

import msgspec
import torch

from everstep.core.recovery_plan import Claim

CLAIM_BYTES = 512
_LENGTH_BYTES = 2


class RankClaim(msgspec.Struct, frozen=True, array_like=True):
    """A member's claim, of one rank of it: how many ranks the group has, and where this one serves its live state.

    `recovery` is "" for rank 0: its address stands in the quorum. `meets`: after a quorum with joiners has settled it
    takes part in `ReconfigurableProcessGroup.meet`, once the joiners have their state; False from an older version.
    """

    claim: Claim
    group_size: int = 1
    recovery: str = ""
    meets: bool = False


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
