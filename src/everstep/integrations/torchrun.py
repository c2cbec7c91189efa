"""The rendezvous backend `everstep` for torchrun and torch's own elastic agent.

    torchrun --rdzv-backend=everstep --rdzv-endpoint=HOST:PORT --rdzv-id=JOB --nnodes=1:4 script.py

HOST:PORT is the lighthouse. torch finds this through the entry-point group `torchrun.handlers`. What it means, and how
it differs from torch's c10d backend, is in docs/rendezvous.md.
"""

import itertools
import json
import logging
import os
import secrets
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.distributed import DistStoreError, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousError,
    RendezvousGracefulExitError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStateError,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
)

from everstep.config import is_loopback
from everstep.core.node_messages import CloseScope, RoundInfo
from everstep.core.ranks import NodeRole, worker_ranks
from everstep.errors import (
    ConfigError,
    EverstepError,
    LighthouseRefused,
    LighthouseUnreachable,
    NodeEvicted,
    RendezvousEnded,
    RendezvousTimedOut,
    RoundStoreError,
)
from everstep.integrations.node_settings import TorchrunSettings, torchrun_settings
from everstep.integrations.round_store import LinkStore
from everstep.link.node import NodeClient
from everstep.torch_version import check_torch

check_torch(torch)

BACKEND = "everstep"
ROLE_INFO = "torchelastic/role_info/"
ASSIGNED_RANKS = "torchelastic/assigned_ranks/"

log = logging.getLogger("everstep.torchrun")
_handlers = itertools.count()


def get_handler() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """What the entry point names; torch calls it for the function that makes handlers."""
    return create_handler


def create_handler(params: RendezvousParameters) -> "EverstepRendezvousHandler":
    """Raises ConfigError for an endpoint or a `--rdzv-conf` that is wrong; connects to nothing yet."""
    node_id = f"{params.local_addr or socket.gethostname()}_{os.getpid()}_{next(_handlers)}"
    settings = torchrun_settings(
        endpoint=params.endpoint,
        run_id=params.run_id,
        nodes=(params.min_nodes, params.max_nodes),
        conf=params.config,
        node_id=node_id,
        nonce=secrets.token_hex(8),
    )
    return EverstepRendezvousHandler(settings, params.local_addr)


class EverstepRendezvousHandler(RendezvousHandler):
    """One agent's. Connects at the first `next_rendezvous`; raises torch's exceptions where torch's handlers do."""

    def __init__(self, settings: TorchrunSettings, local_addr: str | None = None) -> None:
        self._settings = settings
        self._local_addr = local_addr
        self._client = NodeClient(settings.target, settings.group, settings.spec)
        self._is_started = False
        self._was_spare = False  # until the job was over
        self._server: TCPStore | None = None  # that this agent hosts for the workers of its round

    def get_backend(self) -> str:
        return BACKEND

    def get_run_id(self) -> str:
        return self._settings.target.credentials.job_id

    @property
    def use_agent_store(self) -> bool:
        return self._settings.shares_store

    def next_rendezvous(self) -> RendezvousInfo:
        """Leave the round this node is in, if any, and wait for the next. Blocks."""
        self._start()
        self._server = None  # of the round before: its workers have been stopped
        try:
            info = self._client.next_round(self._open_store)
        except EverstepError as error:
            self._was_spare = isinstance(error, RendezvousEnded) and error.was_spare
            raise _as_torch(error) from error
        log.info("round %s: node %s is %d of %d", info.round, self._settings.spec.node_id, info.rank, info.size)
        host, _, port = info.store.rpartition(":")
        bootstrap = RendezvousStoreInfo(host.strip("[]"), int(port))
        return RendezvousInfo(AgentStore(self._client, info), info.rank, info.size, bootstrap)

    def is_closed(self) -> bool:
        closed = self._client.closed
        return closed is not None and closed.scope is CloseScope.JOB

    def set_closed(self) -> None:
        """Raises RendezvousConnectionError when the lighthouse does not confirm it within `close_timeout`."""
        if self._is_started and not self._client.close(CloseScope.JOB, "set_closed", self._settings.close_timeout_s):
            raise RendezvousConnectionError(f"the lighthouse at {self._settings.target.url} cannot be reached")

    def num_nodes_waiting(self) -> int:
        """Nodes for which there is room; at least 1 when the round is over and this node has to come to the next.

        0 without the lighthouse: training needs it for changes only. Raises RendezvousStateError on an evicted node.
        """
        if not self._is_started:
            return 0
        try:
            if not self._client.is_open:
                return 0
            return max(self._client.waiting, int(self._client.needs_new_round))
        except EverstepError as error:
            raise _as_torch(error) from error

    def shutdown(self) -> bool:
        """Close the rendezvous for all and leave it; whether the others could be told."""
        closed = self._shut_down()
        if self._was_spare and isinstance(sys.exc_info()[1], AttributeError):
            # torch's agent takes RendezvousGracefulExitError for a good end, and its launcher then asks the result
            # that there is none of whether it has failed (torch 2.13, launcher/api.py). This is its `finally`.
            log.info("this node was a spare, and the job is over")
            raise SystemExit(0)
        return closed

    def _shut_down(self) -> bool:
        if not self._is_started:
            return True
        try:
            self.set_closed()
            return True
        except RendezvousError as error:
            log.warning("rendezvous not closed reason=%s", error)
            return False
        finally:
            self._client.shutdown("shut down")
            self._server = None

    def _start(self) -> None:
        if not self._is_started:
            self._client.start()
            self._is_started = True

    def _open_store(self) -> str:
        """This agent is rank 0: where its workers' MASTER_ADDR and MASTER_PORT will be."""
        host = self._local_addr or self._client.link_address
        if not self._local_addr and (not host or is_loopback(host)):
            host = socket.getfqdn()  # the lighthouse is on this very host, or behind a tunnel
        if self._settings.shares_store:
            self._server = TCPStore(host, 0, is_master=True, wait_for_workers=False, multi_tenant=True)
            port = self._server.port
        else:
            port = _free_port(host)
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _free_port(host: str) -> int:
    """For the workers' own store: their rank 0 opens it."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
        sock.bind(("", 0))
        port: int = sock.getsockname()[1]
        return port


def _as_torch(error: EverstepError) -> Exception:
    match error:
        case RendezvousEnded(was_spare=True):
            return RendezvousGracefulExitError(f"this node was a spare, and the job is over: {error}")
        case RendezvousEnded():
            again = "its --rdzv-id can be used again a minute after the last node has gone"
            return RendezvousClosedError(f"the rendezvous is closed ({error}); {again}")
        case RendezvousTimedOut():
            return RendezvousTimeoutError(str(error))
        case NodeEvicted():
            return RendezvousStateError(str(error))
        case LighthouseUnreachable() | LighthouseRefused():
            return RendezvousConnectionError(str(error))
        case _:
            return error


class AgentStore(LinkStore):
    """The round's store, for torch's agent.

    The agent distributes the workers' ranks through it, and ends with whatever an operation raises there. A round that
    is dissolved in that instant is answered for from what this node knows: the workers are started, and the agent's
    next look at `num_nodes_waiting` takes them to the next round.
    """

    def __init__(self, client: NodeClient, info: RoundInfo) -> None:
        super().__init__(client.store(info))
        self._client = client
        self._info = info
        self._role: NodeRole | None = None

    def clone(self) -> "AgentStore":
        return AgentStore(self._client, self._info)

    def set(self, key: str, value: str | bytes) -> None:
        if key.startswith(ROLE_INFO):
            told = json.loads(value)
            self._role = NodeRole(role=told["role"], local_world_size=told["local_world_size"])
        self._unless_over(None, (key,), super().set, key, value)

    def multi_set(self, keys: Sequence[str], values: Sequence[str | bytes]) -> None:
        self._unless_over(None, keys, super().multi_set, keys, values)

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        role = self._role or NodeRole(role="", local_world_size=1)
        mine = [
            json.dumps({"role": role.role, "rank": rank, "local_world_size": role.local_world_size}).encode()
            for rank, _ in enumerate(keys)
        ]
        found: list[bytes] = self._unless_over(mine, keys, super().multi_get, keys)
        return found

    def get(self, key: str) -> bytes:
        role = self._role or NodeRole(role="", local_world_size=1)
        ranks = worker_ranks([role] * self._info.size)[self._info.rank]
        told = [ranks.base_rank, ranks.world_size, ranks.base_role_rank, ranks.role_world_size]
        found: bytes = self._unless_over(json.dumps(told).encode(), (key,), super().get, key)
        return found

    def _unless_over(self, instead: Any, keys: Sequence[str], operation: Any, *arguments: Any) -> Any:
        try:
            return operation(*arguments)
        except DistStoreError as error:
            cause = error.__cause__
            is_over = isinstance(cause, RoundStoreError) and cause.is_over
            if not is_over or not all(key.startswith((ROLE_INFO, ASSIGNED_RANKS)) for key in keys):
                raise
            log.info("round %s ended while its workers were numbered; they will start again", self._info.round)
            return instead


__all__ = ["AgentStore", "ConfigError", "EverstepRendezvousHandler", "create_handler", "get_handler"]
