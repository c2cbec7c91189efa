"""This process's presence in the job: its machine, its link, and the servers that the other members reach.

The link thread feeds the machine and performs what it returns; the training thread waits on `changed` and feeds its
own results. One lock guards the machine; nothing blocks while it is held.
"""

import asyncio
import contextlib
import dataclasses
import faulthandler
import logging
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import torch

from everstep.collectives.gloo import GlooProcessGroup
from everstep.collectives.nccl import NcclProcessGroup, ProcessGroupByDevice
from everstep.collectives.process_group import ReconfigurableProcessGroup
from everstep.collectives.sockets import host_and_port
from everstep.collectives.store import HostedStore
from everstep.collectives.with_lane import ProcessGroupWithLane
from everstep.config import ManagerSettings
from everstep.core.follower import Follower
from everstep.core.group import Beginning, Outcome
from everstep.core.messages import Effect, Exit, Log, Send, Sever, Tell, ToMember
from everstep.core.moves import (
    AskToLeave,
    CollectiveFailed,
    Leave,
    LinkDown,
    LinkUp,
    ReplicaConfig,
    ReplicaEvent,
    TrainAlone,
)
from everstep.core.recovery_plan import Claim
from everstep.core.replica import Replica
from everstep.core.types import QuorumId
from everstep.core.worker_book import worker_name
from everstep.errors import ConfigError, EverstepError, LighthouseRefused, LighthouseUnreachable
from everstep.exit_codes import ExitCode
from everstep.link.auth import Credentials
from everstep.link.client import LinkClient
from everstep.link.dial import LinkTarget
from everstep.link.driver import Driver
from everstep.link.path_watch import LongWait, PathWatch
from everstep.logs import JobLog
from everstep.recovery import Fetching, Place, TransferAuth
from everstep.train.claims import RankClaim
from everstep.train.phases import Phases
from everstep.train.steps_file import StepsFile
from everstep.train.transports import check_address, peers_for, transport_for

EXIT_STUCK_S = 3.0  # it may stand still because nobody reads its stderr


class Presence:
    """Context manager. With a lighthouse it joins the job; without one it is a quorum of one, and opens no socket."""

    def __init__(self, settings: ManagerSettings, replica: ReplicaConfig, host: str | None) -> None:
        self._settings = settings
        self.steps_file = StepsFile(settings.steps_file)
        # Not what settings alone say: a child that inherited the environment is another process.
        self._worker = worker_name(settings.worker, os.getpid()) if settings.worker else ""
        self._config = dataclasses.replace(replica, workers=(self._worker,) if self._worker else ())
        self.log = JobLog(logging.getLogger("everstep"), self._where)
        self._host = host
        self.auth = TransferAuth(settings.token) if settings.token is not None else None
        self.changed = threading.Condition(threading.RLock())
        self.group: ReconfigurableProcessGroup = GlooProcessGroup()
        make_peers = peers_for(settings.backend, settings.nccl_environment)
        self.transport = transport_for(settings.recovery_transport, make_peers)
        self._replica: Replica | Follower | None = None
        self._driver: Driver[Any] | None = None
        self._client: LinkClient[ToMember] | None = None
        self._store: HostedStore | None = None
        self._fetch: Fetching | None = None
        self._severed: QuorumId | None = None  # the latest
        self._paths = PathWatch(self._long_wait, self._no_answer)
        self._error: Exception | None = None
        self.phases = Phases()
        self.leaves_alone = False  # asked to leave, and there is nobody to tell

    @property
    def replica(self) -> Replica | Follower:
        """Read it under `changed`."""
        assert self._replica is not None, "start the Manager first: `with es.Manager() as manager`"
        return self._replica

    # ---- start and end

    def __enter__(self) -> "Presence":
        try:
            self._start()
        except BaseException:
            self._close_servers()
            raise
        return self

    def _start(self) -> None:
        lighthouse = self._settings.lighthouse
        if lighthouse is None:
            self._begin(self._config)
            self.feed(TrainAlone("alone"))
            return
        host = self._host or address_towards(lighthouse)
        url = self._open_servers(host)
        self._store = HostedStore(host)
        self._store.start()
        self._begin(dataclasses.replace(self._config, store=self._store.address, recovery=url))
        credentials = Credentials(job_id=self._settings.job_id, token=self._settings.token)
        target = LinkTarget(
            url=lighthouse,
            credentials=credentials,
            connect_timeout_s=self._settings.connect_timeout_s,
            tls_ca=self._settings.tls_ca,
        )
        self._client = LinkClient(target, self)
        self._client.start()
        try:
            if not self._client.wait_open(self._settings.connect_timeout_s + 10.0):
                raise LighthouseUnreachable(
                    f"the link to {lighthouse} neither opened nor failed; is this host stopped?"
                )
        except BaseException:
            self._client.close()
            raise

    def _open_servers(self, host: str) -> str:
        """What every rank has of its own; returns where its live state is reached."""
        group: ReconfigurableProcessGroup = GlooProcessGroup(bind_host=host, threads=2)
        if self._settings.backend == "nccl":
            device = torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)
            group = ProcessGroupByDevice(group, NcclProcessGroup(device, environ=self._settings.nccl_environment))
        self.group = ProcessGroupWithLane(group, host)
        place = Place(host=host, auth=self.auth, timeout_s=self._settings.collective_timeout_s)
        return check_address(self.transport, self.transport.open(place))

    def _machine(self, config: ReplicaConfig) -> Replica | Follower:
        return Replica(config)

    def _begin(self, config: ReplicaConfig) -> None:
        self._replica = self._machine(config)
        self._replica.ledger.begin(time.monotonic())
        self.steps_file.open()
        self._driver = Driver(self._replica, self._perform, lock=self.changed, on_crash=self.on_failed)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None or isinstance(error, KeyboardInterrupt | SystemExit):
                # After another error no Goodbye: the others go on as after a crash.
                self._leave("done" if error is None else f"{type(error).__name__}")
        finally:
            self.phases.end()
            if self._client is not None:
                self._client.close()
            self._close_servers()

    def _leave(self, reason: str) -> None:
        if self._client is not None:
            self.feed(Leave(reason))

    def _close_servers(self) -> None:
        self.steps_file.close()
        if self._driver is not None:
            self._driver.close()
        self._paths.close()
        self.group.close()
        self.transport.close()
        if self._store is not None:
            self._store.close()

    # ---- either thread

    def feed(self, event: ReplicaEvent) -> None:
        assert self._driver is not None
        self._driver.receive(event)

    def ask_to_leave(self, grace_s: float) -> None:
        """Any thread, and a signal handler: it takes no lock, which the interrupted thread may hold."""
        if self._client is not None:
            self._client.call(lambda: self.feed(AskToLeave(grace_s)))
        else:
            self.leaves_alone = True

    def run(self, call: Callable[[float], list[Effect]]) -> None:
        """Call the machine under the lock with the time now."""
        assert self._driver is not None
        self._driver.run(call)

    def _perform(self, effects: list[Effect]) -> None:
        """Under the lock; never blocks."""
        for effect in effects:
            match effect:
                case Send(message, _):
                    if self._client is not None:
                        self._client.send(message)
                case Sever(up_to):
                    self._severed = up_to
                    self.group.abort(up_to)
                    if self._fetch is not None:
                        self._fetch.abort()
                case Log(event, fields):
                    self._log(event, fields)
                case Exit(reason):
                    _exit_stuck(reason)
                case Tell(message):
                    self._tell(message)
                case _:
                    raise AssertionError(f"a member's machine returned {effect}")
        self.changed.notify_all()

    def _log(self, event: str, fields: dict[str, object]) -> None:
        if self.log.isEnabledFor(logging.INFO):
            text = " ".join(f"{name}={value}" for name, value in fields.items())
            extra = {"everstep": {"event": event, **fields, "member": str(self.replica.member)}}
            self.log.info("%s %s member=%s", event, text, self.replica.member, extra=extra)

    def _where(self) -> tuple[str, str, int, int]:
        step = self._replica.step if self._replica is not None else 0
        return self._settings.job_id, self._config.replica_id, self._settings.group.rank, max(step, 0)

    # ---- with the other ranks of the replica group (group_presence.py); a group of one has nobody to tell

    @property
    def rank_prefix(self) -> str:
        """Keeps the ranks' process groups of one quorum apart."""
        return f"rank{self._settings.group.rank}" if self._settings.group.rank > 0 else ""

    @property
    def group_rank(self) -> int:
        return self._settings.group.rank

    @property
    def group_size(self) -> int:
        return self._settings.group.size

    @property
    def own_recovery(self) -> str:
        """Where a follower's recovery transport is reached; the leader's stands in the quorum."""
        return ""

    def rank_claim(self, claim: Claim) -> RankClaim:
        return RankClaim(claim, self.group_size, self.own_recovery, meets=True, transport=self.transport.name)

    def begin_batch(self) -> Beginning:
        """The batch that the script begins; the same on every rank."""
        with self.changed:
            return self.replica.beginning()

    def agree(self, outcome: Outcome) -> Outcome:
        """How the batch ended; the same on every rank."""
        return outcome

    def _tell(self, message: object) -> None:
        raise AssertionError(f"nobody to tell {message}")

    @contextlib.contextmanager
    def fetching(self, fetch: Fetching, quorum_id: QuorumId) -> Iterator[Fetching]:
        """Lets a freeze abort `fetch` while the block runs; one that came before it does, too."""
        with self.changed:
            self.check()
            self._fetch = fetch
            if self._severed is not None and quorum_id <= self._severed:
                fetch.abort()
        try:
            yield fetch
        finally:
            with self.changed:
                self._fetch = None

    def check(self) -> None:
        """Raise what ended this member's part in the job. Training thread, with or without the lock."""
        if self._error is not None:
            raise self._error
        refusal = self.replica.refusal
        if refusal is not None:
            raise LighthouseRefused(refusal.code, refusal.detail)

    # ---- LinkHandler: the link's thread

    def on_start(self, loop: asyncio.AbstractEventLoop) -> None:
        assert self._driver is not None
        self._driver.attach(loop)
        self._paths.attach(loop)

    def on_open(self) -> None:
        self.feed(LinkUp())

    def on_message(self, message: ToMember) -> None:
        assert self._driver is not None
        self._driver.receive(message)

    def on_close(self, detail: str) -> None:  # noqa: ARG002 - the client has logged it
        self.feed(LinkDown())

    def _long_wait(self) -> LongWait | None:
        with self.changed:
            replica = self.replica
            since = replica.waits_since if isinstance(replica, Replica) else None
            if since is None or replica.quorum is None or replica.rank is None:
                return None
            now = time.monotonic()
            return LongWait(
                quorum_id=replica.quorum.id,
                since=since,
                waited_s=now - since,
                patience_s=replica.patience_s,
                rank=replica.rank,
                addresses=tuple(host_and_port(m.store) for m in replica.quorum.members),
            )

    def _no_answer(self, quorum_id: QuorumId, details: Mapping[int, str]) -> None:
        """The lighthouse opens a round: what the training thread waits in ends with it."""
        for rank, detail in details.items():
            self.feed(CollectiveFailed(quorum_id, rank, detail, is_unreachable=True))

    def on_failed(self, error: Exception) -> None:
        """The training thread raises it at its next look."""
        with self.changed:
            self._error = error
            quorum = self.replica.quorum
            if not isinstance(error, EverstepError) and quorum is not None:
                self.group.abort(quorum.id)  # a bug: let nobody wait for this member
            self.changed.notify_all()


def _exit_stuck(reason: str) -> None:
    """On the link's thread. The training thread stands still: it cannot be told, only shown, and ended."""
    ending = threading.Timer(EXIT_STUCK_S, os._exit, (ExitCode.STUCK,))
    ending.daemon = True
    ending.start()
    sys.stderr.write(f"everstep: this process ends, because {reason}; its threads are here:\n")
    sys.stderr.flush()
    faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
    os._exit(ExitCode.STUCK)


def new_nonce() -> str:
    return secrets.token_hex(8)


def address_towards(lighthouse: str) -> str:
    """This host's address on the way to the lighthouse, which is where the other members reach it too."""
    parts = urlsplit(lighthouse)
    host, port = parts.hostname or "", parts.port or 80
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)  # UDP: no packet is sent
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(f"the lighthouse's host {host!r} is unknown or unreachable: {error}") from error
