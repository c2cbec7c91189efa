"""Where the followers of a replica group learn their leader's address: torchrun's store, or the script's own.

One value, set and read once at the start. Nothing in a step touches the store: a wait on it cannot be cut off, and
torch's TCPStore looks names up in the DNS at each connection.
"""

import datetime
import secrets
from typing import Protocol

import msgspec
import torch.distributed
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from everstep.collectives.torch_private import default_store
from everstep.config import GroupSettings
from everstep.errors import ConfigError

SECRET_BYTES = 16
ASK_S = 2.0  # of one question; the one who asks repeats it


class Store(Protocol):
    """What we use of torch's stores."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...


class Meeting(msgspec.Struct, frozen=True):
    """What the leader publishes. The secret shows that who connects has read it here."""

    host: str
    port: int
    secret: str


class MeetingPlace:
    """Of one replica group. `token` is part of the key that both ends of the group's connections prove to know."""

    def __init__(self, group: GroupSettings, replica_id: str, token: bytes | None) -> None:
        self._group = group
        self._name = f"everstep/{group.namespace}/{replica_id}"
        self._token = token or b""
        self._secret = secrets.token_hex(SECRET_BYTES)
        self._store: Store | None = None

    # ---- the leader's

    @property
    def key(self) -> bytes:
        return self._token if self._group.leader is not None else self._token + self._secret.encode()

    def publish(self, address: str) -> None:
        if self._group.leader is not None:
            return
        host, _, port = address.rpartition(":")
        meeting = Meeting(host.strip("[]"), int(port), self._secret)
        self._open().set(self._name, msgspec.json.encode(meeting).decode())

    # ---- the followers'

    def locate(self) -> tuple[str, int, bytes]:
        """Host, port, key; raises OSError while nothing is published. After a restart they may be the last leader's."""
        if self._group.leader is not None:
            return (*self._group.leader, self._token)
        try:
            said = self._open().get(self._name)
        except RuntimeError as error:  # torch's DistStoreError among them
            raise TimeoutError(f"the leader has published no address: {str(error)[:200]}") from None
        meeting = msgspec.json.decode(said, type=Meeting)
        return meeting.host, meeting.port, self._token + meeting.secret.encode()

    def _open(self) -> Store:
        if self._store is None:
            patience = datetime.timedelta(seconds=ASK_S)
            if self._group.store is not None:
                self._store = TCPStore(*self._group.store, timeout=patience, wait_for_workers=False)
            elif torch.distributed.is_initialized():
                self._store = default_store()
            else:
                raise ConfigError(
                    f"the {self._group.size} ranks of this replica group have nowhere to meet: start them with "
                    "torchrun, call torch.distributed.init_process_group() before the Manager starts, or set "
                    "EVERSTEP_GROUP_LEADER"
                )
        return self._store
