"""Subscribe to what happens in a job: the failure notices, or every event. Settings as the Manager's.

    with everstep.subscribe_failures() as failures:
        for event in failures:
            print(event.member, event.cause, event.evidence)

The stream informs; it never aborts anything (only a round's Notice, on the members' own links, does that).
"""

import datetime
from collections.abc import Collection
from pathlib import Path

from everstep.config import manager_settings
from everstep.core.events import FAILURES, EventKind, JobEvent
from everstep.errors import ConfigError
from everstep.link.auth import Credentials
from everstep.link.dial import LinkTarget
from everstep.link.events import Subscription


def subscribe_events(
    *,
    lighthouse: str | None = None,
    job_id: str | None = None,
    token_file: str | Path | None = None,
    after: str = "",
    follow: bool = True,
    kinds: Collection[EventKind] | None = None,
    connect_timeout_s: float = 30.0,
) -> Subscription:
    """A Subscription to this job's events; open it with `with`, then iterate, `async for`, or call `next(timeout_s)`.

    `after`: a cursor to go on from, "oldest" for all that the lighthouse keeps, or "" for the state now (one `resync`
    event) and what follows. `follow=False` ends after what is kept. `kinds` selects. Raises ConfigError; see
    Subscription for the rest.
    """
    where = target(lighthouse=lighthouse, job_id=job_id, token_file=token_file, connect_timeout_s=connect_timeout_s)
    return Subscription(where, after=after, follow=follow, kinds=kinds)


def subscribe_failures(
    *,
    lighthouse: str | None = None,
    job_id: str | None = None,
    token_file: str | Path | None = None,
    after: str = "",
    connect_timeout_s: float = 30.0,
) -> Subscription:
    """Only the failure notices: one `member-failed` for each member that evidence speaks against, and `resync` marks.

    A graceful leave is not among them. The arguments are those of `subscribe_events`.
    """
    return subscribe_events(
        lighthouse=lighthouse,
        job_id=job_id,
        token_file=token_file,
        after=after,
        kinds=FAILURES | {EventKind.RESYNC},
        connect_timeout_s=connect_timeout_s,
    )


def target(
    *,
    lighthouse: str | None = None,
    job_id: str | None = None,
    token_file: str | Path | None = None,
    connect_timeout_s: float = 10.0,
) -> LinkTarget:
    """The lighthouse and the job, from these arguments and, where they are None, from the environment."""
    settings = manager_settings(
        lighthouse=lighthouse,
        job_id=job_id,
        token_file=token_file,
        replica_group_id="0",
        connect_timeout_s=connect_timeout_s,
    )
    if settings.lighthouse is None:
        raise ConfigError("which lighthouse? Set EVERSTEP_LIGHTHOUSE, or give host:port")
    return LinkTarget(
        url=settings.lighthouse,
        credentials=Credentials(job_id=settings.job_id, token=settings.token),
        connect_timeout_s=settings.connect_timeout_s,
        tls_ca=settings.tls_ca,
    )


def line(event: JobEvent) -> str:
    """An event as one line for people: local time, what, who, why."""
    when = datetime.datetime.fromtimestamp(event.at).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
    words = [when, event.kind.value]
    if event.member:
        words.append(f"group {event.replica_id} (incarnation {event.incarnation})")
    if event.quorum_id:
        words.append(f"quorum {event.quorum_id}")
    if event.round:
        words.append(f"round {event.round}")
    if event.kind is EventKind.RESYNC and event.snapshot is not None:
        members = event.snapshot.get("quorum_members")
        words.append(f"quorum {event.snapshot.get('quorum')} of {len(members) if isinstance(members, list) else 0}")
    if event.member_count:
        names = ", ".join(event.members) + (", ..." if event.member_count > len(event.members) else "")
        words.append(f"{event.member_count} members: {names}")
    if event.joined:
        words.append("joined: " + ", ".join(event.joined))
    if event.left:
        words.append("left: " + ", ".join(event.left))
    if event.step is not None:
        words.append(f"step {event.step}")
    if event.action:
        words.append(f"action {event.action}")
    if event.cause is not None:
        words.append(f"cause {event.cause.value}")
    if event.node:
        words.append(f"node {event.node}")
    if event.rank:
        words.append(event.rank)
    if event.culprit:
        words.append("the others wait for it" if event.culprit == event.rank else f"it waits for {event.culprit}")
    if event.donors:
        words.append("from " + ", ".join(event.donors))
    if event.total_bytes:
        words.append(f"{event.done_bytes / 1e6:.2f} of {event.total_bytes / 1e6:.2f} MB in {event.seconds:.3f} s")
    if event.transport:
        words.append(f"by {event.transport}")
    words += [f"{what} {count}" for what, count in _counts(event) if count]
    if event.outcome:
        words.append(event.outcome)
    if event.evidence:
        words.append(f"({event.evidence})")
    return "  ".join(words)


def _counts(event: JobEvent) -> list[tuple[str, int]]:
    return [("retries", event.retries), ("digest errors", event.digest_errors)]
