"""The presence of one rank of a replica group of several: the leader's and the followers' (docs/groups.md).

The group lives and dies as one. When a rank ends without having left, the others cut their collectives and the link at
once, so that the lighthouse sees the group fail, and raise GroupFailed in the script; a script that hangs elsewhere is
ended after a grace.
"""

import dataclasses
import logging
import os
import threading
import time
from collections.abc import Callable
from types import TracebackType

from everstep.config import GroupSettings, ManagerSettings
from everstep.core.follower import Follower
from everstep.core.group import Beginning, FromRank, GroupEnds, Outcome, RankBeat, RankDrains, ToFollower, ToLeader
from everstep.core.leader import Leader
from everstep.core.moves import AskToLeave, Leave, ReplicaConfig
from everstep.core.replica import Replica
from everstep.core.types import QuorumId
from everstep.errors import GroupFailed
from everstep.link.group_client import GroupClient
from everstep.link.group_server import GroupServer
from everstep.train.presence import Presence, address_towards
from everstep.train.rank_meeting import MeetingPlace

MEET_S = 60.0  # beyond the time to connect: ranks import, build and load at different speeds
LEAVE_S = 60.0
EXIT_GRACE_S = 5.0
WAIT_SLICE_S = 0.5  # so that Python runs signal handlers while it waits
EVERY_QUORUM = QuorumId((1 << 31) - 1, (1 << 32) - 1)

log = logging.getLogger("everstep")


def make_presence(settings: ManagerSettings, replica: ReplicaConfig, host: str | None) -> Presence:
    if settings.group.size == 1:
        return Presence(settings, replica, host)
    if settings.group.rank == 0:
        return LeaderPresence(settings, replica, host)
    return FollowerPresence(settings, replica, host)


class RankPresence(Presence):
    """What the leader and its followers share."""

    def __init__(self, settings: ManagerSettings, replica: ReplicaConfig, host: str | None) -> None:
        super().__init__(settings, replica, host)
        self._place = MeetingPlace(settings.group, settings.replica_group_id, settings.token)
        self._exit_timer: threading.Timer | None = None
        self._ended_by: BaseException | None = None

    @property
    def _group(self) -> GroupSettings:
        return self._settings.group

    def _own_host(self) -> str:
        if self._host is not None:
            return self._host
        if self._settings.lighthouse is not None:
            return address_towards(self._settings.lighthouse)
        leader = self._group.leader or self._group.store
        return address_towards(f"http://{leader[0]}:{leader[1]}") if leader is not None else "127.0.0.1"

    def _wait_until(self, is_reached: Callable[[], bool], timeout_s: float) -> bool:
        """Under no lock; raises what ended this process's part in the job."""
        deadline = time.monotonic() + timeout_s
        with self.changed:
            while not is_reached():
                self.check()
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self.changed.wait(min(left, WAIT_SLICE_S))
        return True

    def _fail_group(self, detail: str) -> None:
        """On the channel's thread. Severs everything and makes the script raise GroupFailed; once."""
        with self.changed:
            if self._error is not None:
                return
            self._error = GroupFailed(f"this replica group has failed: {detail}")
            self.group.abort(EVERY_QUORUM)
            if self._fetch is not None:
                self._fetch.abort()
            self.changed.notify_all()
        self.log.error(
            "replica group failed cause=%s; this process ends; whatever started the group starts it again", detail
        )
        self._exit_timer = threading.Timer(EXIT_GRACE_S, _exit)
        self._exit_timer.daemon = True
        self._exit_timer.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended_by = error
        super().__exit__(kind, error, trace)

    def _close_servers(self) -> None:
        if self._exit_timer is not None:
            self._exit_timer.cancel()
        super()._close_servers()


class LeaderPresence(RankPresence):
    """Rank 0: the group's member of the protocol, and the one with the link."""

    _channel: GroupServer | None = None
    _asked_grace_s: float | None = None  # to leave, when no link's thread was there to be told

    def _start(self) -> None:
        host, port = self._group.leader or (self._own_host(), 0)
        self._channel = GroupServer(self._group.size, self._place.key, self)
        self._place.publish(self._channel.listen(host, port))
        missing = self._channel.wait_complete(self._settings.connect_timeout_s + MEET_S)
        if missing:
            raise GroupFailed(f"ranks {missing} of this replica group did not come; is WORLD_SIZE={self._group.size}?")
        workers = (self._worker, *self._channel.workers())
        self._config = dataclasses.replace(self._config, workers=workers if any(workers) else ())
        super()._start()

    def _machine(self, config: ReplicaConfig) -> Replica | Follower:
        return Leader(config, self._group.size, time.monotonic())

    @property
    def leader(self) -> Leader:
        assert isinstance(self._replica, Leader)
        return self._replica

    def begin_batch(self) -> Beginning:
        with self.changed:
            self.run(lambda _: self.leader.begin_batch())
            return self.leader.beginning()

    def agree(self, outcome: Outcome) -> Outcome:
        self.run(lambda _: self.leader.end_batch(outcome))
        return outcome

    def _tell(self, message: object) -> None:
        assert self._channel is not None
        assert isinstance(message, ToFollower)
        self._channel.broadcast(message)

    def _leave(self, reason: str) -> None:
        """Once every rank has: the last one's Goodbye is the group's."""
        self.feed(Leave(reason))
        if not self._wait_until(lambda: self.leader.has_everyone_left, LEAVE_S):
            raise GroupFailed(f"the other ranks of this replica group were not done within {LEAVE_S:g} s of rank 0")

    def _close_servers(self) -> None:
        super()._close_servers()
        if self._channel is not None:
            if self._replica is None or not self.leader.has_everyone_left:
                why = self._ended_by or self._error
                detail = f"rank 0 ended: {type(why).__name__}: {why}" if why is not None else "rank 0 ended"
                self._channel.broadcast(GroupEnds(detail[:500]))
            self._channel.close()

    def ask_to_leave(self, grace_s: float) -> None:
        """Any thread, and a signal handler: without a link the channel's thread asks, when it hears a rank's beat."""
        if self._client is not None:
            super().ask_to_leave(grace_s)
        else:
            self._asked_grace_s = grace_s

    # ---- LeaderHandler: the channel's thread

    def on_rank(self, rank: int, message: ToLeader) -> None:
        if self._driver is None:  # the machine is not made yet
            if isinstance(message, RankDrains):
                self._asked_grace_s = message.grace_s
            return
        try:
            grace_s, self._asked_grace_s = self._asked_grace_s, None
            if grace_s is not None:
                self.feed(AskToLeave(grace_s))
            self._driver.receive(FromRank(rank, message))
        except Exception as error:
            # Thread boundary: a bug must reach the training thread instead of leaving it without an answer.
            self.on_failed(error)

    def on_rank_lost(self, rank: int, detail: str) -> None:
        if self._replica is not None and self.leader.has_everyone_left:
            return
        detail = f"rank {rank} ended ({detail})"
        self._fail_group(detail)
        if self._client is not None:
            self._client.close(timeout_s=0.2)  # without Goodbye: the lighthouse takes it for the failure that it is
        assert self._channel is not None
        self._channel.broadcast(GroupEnds(detail))


class FollowerPresence(RankPresence):
    """Any other rank: it follows the leader, and has no link."""

    _channel: GroupClient | None = None
    _recovery_url = ""
    _asked_grace_s: float | None = None

    def _start(self) -> None:
        if self._settings.lighthouse is not None:
            self._recovery_url = self._open_servers(self._own_host())
        self._begin(self._config)
        self._channel = GroupClient(self._group.rank, self, self._worker)
        patience_s = self._settings.connect_timeout_s + MEET_S
        try:
            self._channel.connect(self._place.locate, patience_s)
        except OSError as error:
            raise GroupFailed(f"the leader (rank 0) of this replica group was not found: {error}") from error
        if not self._wait_until(lambda: self.follower.has_view, 2 * patience_s):
            raise GroupFailed("the leader (rank 0) of this replica group never joined the job")

    def _machine(self, config: ReplicaConfig) -> Replica | Follower:
        return Follower(config)

    @property
    def follower(self) -> Follower:
        assert isinstance(self._replica, Follower)
        return self._replica

    @property
    def own_recovery(self) -> str:
        return self._recovery_url

    def begin_batch(self) -> Beginning:
        with self.changed:
            return self.follower.begin_batch()

    def agree(self, outcome: Outcome) -> Outcome:  # noqa: ARG002 - the leader's counts
        told: list[Outcome] = []

        def is_told() -> bool:
            outcome = self.follower.end_batch()
            if outcome is not None:
                told.append(outcome)
            return bool(told)

        while not self._wait_until(is_told, LEAVE_S):
            self.log.warning("waiting for the leader of this group to end the step")
        return told[0]

    def _tell(self, message: object) -> None:
        if self._channel is not None:
            assert isinstance(message, ToLeader)
            self._channel.send(message)

    def _leave(self, reason: str) -> None:
        self.feed(Leave(reason))
        if not self._wait_until(lambda: self.follower.has_everyone_left, LEAVE_S):
            raise GroupFailed(f"the other ranks of this replica group were not done within {LEAVE_S:g} s of this one")

    def _close_servers(self) -> None:
        super()._close_servers()
        if self._channel is not None:
            self._channel.close()

    def ask_to_leave(self, grace_s: float) -> None:
        """Any thread, and a signal handler: the channel's thread asks at its next beat."""
        self._asked_grace_s = grace_s

    # ---- FollowerHandler: the channel's thread

    def beat(self) -> tuple[RankBeat, float]:
        grace_s, self._asked_grace_s = self._asked_grace_s, None
        if grace_s is not None:
            self.feed(AskToLeave(grace_s))
        return self.follower.beat(time.monotonic()), self.follower.beat_after_s

    def on_leader(self, message: ToFollower) -> None:
        try:
            self.feed_follower(message)
        except Exception as error:
            # Thread boundary: a bug must reach the training thread instead of leaving it without an answer.
            self.on_failed(error)
        if isinstance(message, GroupEnds) and not self.follower.has_everyone_left:
            self._fail_group(message.detail)

    def feed_follower(self, message: ToFollower) -> None:
        assert self._driver is not None
        self._driver.receive(message)

    def on_leader_lost(self, detail: str) -> None:
        if not self.follower.has_everyone_left:
            self._fail_group(f"the leader (rank 0) ended ({detail})")


def _exit() -> None:
    log.error("the script did not end within %g s of the failure of its group: exiting", EXIT_GRACE_S)
    os._exit(1)
