"""The job token as a transfer uses it: HMAC over the parts of a challenge. The token itself never travels."""

import hashlib
import hmac
from dataclasses import dataclass, field

from everstep.errors import ConfigError

TOKEN_BYTES_MIN = 8


@dataclass(frozen=True)
class TransferAuth:
    """Signs and verifies with the job token (SHA-256). Parts are length-prefixed, so ("ab", "c") is not ("a", "bc")."""

    token: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.token) < TOKEN_BYTES_MIN:
            raise ConfigError(f"the job token has {len(self.token)} bytes; use at least {TOKEN_BYTES_MIN}")

    def sign(self, *parts: bytes) -> bytes:
        message = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
        return hmac.new(self.token, message, hashlib.sha256).digest()

    def verify(self, mac: bytes, *parts: bytes) -> bool:
        """In constant time."""
        return hmac.compare_digest(mac, self.sign(*parts))
