"""A job's events as a reader sees them: over HTTP, over the library, over restarts, and when it is slow."""

import asyncio
import contextlib
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

import everstep as es
from everstep.config import LighthouseSettings
from everstep.core.events import EventKind, JobEvent
from everstep.core.messages import Cause, Goodbye, Switch
from everstep.errors import ConfigError, LighthouseRefused, LighthouseUnreachable
from everstep.lighthouse.app import Lighthouse
from everstep.lighthouse.event_stream import encode
from everstep.link.auth import http_key
from everstep.link.events import Subscription
from tests.link.parties import TOKEN, Member

DEADLINE_S = 10.0


@contextlib.contextmanager
def lighthouse(**settings: object) -> Iterator[Lighthouse]:
    with Lighthouse.in_thread(LighthouseSettings(**{"port": 0, **settings})) as running:  # type: ignore[arg-type]
        yield running


def subscribed(running: Lighthouse, **options: object) -> Subscription:
    return es.subscribe_events(**{"lighthouse": running.address, "job_id": "job", **options})  # type: ignore[arg-type]


def until(events: Subscription, kind: EventKind) -> list[JobEvent]:
    """Everything up to the first event of this kind."""
    seen: list[JobEvent] = []
    while not seen or seen[-1].kind is not kind:
        seen.append(events.next(DEADLINE_S))
    return seen


@contextlib.contextmanager
def quorum_of_two(running: Lighthouse) -> Iterator[tuple[Member, Member]]:
    with Member(running.url, "a", expected_replicas=2) as a:
        a.events.expect("message")  # its Welcome, so that it is a#1
        with Member(running.url, "b", expected_replicas=2) as b:
            for member in (a, b):
                member.events.expect("message", lambda seen: isinstance(seen.value, Switch))
            yield a, b


def cut(member: Member) -> None:
    """Its connection breaks without a Goodbye."""
    member.client.close()


def test_subscribe_failures_delivers_notifications() -> None:
    with lighthouse() as running, quorum_of_two(running) as (_, b):
        with es.subscribe_failures(lighthouse=running.address, job_id="job") as failures:
            assert failures.next(DEADLINE_S).kind is EventKind.RESYNC
            cut_at = time.time()
            cut(b)
            failed = failures.next(DEADLINE_S)
        assert (failed.kind, failed.member, failed.cause) == (EventKind.MEMBER_FAILED, "b#2", Cause.LINK_CLOSED)
        assert failed.quorum_id == "1.1"
        assert failed.evidence
        assert cut_at - 1 < failed.at < cut_at + DEADLINE_S


def test_lighthouse_subscribe_failures() -> None:
    """As `curl` sees it: server-sent events with an id to resume from."""
    with lighthouse() as running, quorum_of_two(running) as (_, b):
        with urllib.request.urlopen(f"{running.url}/api/v1/events?job=job&after=oldest", timeout=DEADLINE_S) as stream:
            assert stream.headers["Content-Type"] == "text/event-stream"
            cut(b)
            lines: list[str] = []
            while not lines or '"member-failed"' not in lines[-1]:
                lines.append(stream.readline().decode().rstrip("\n"))
        assert lines[-2] == "event: member-failed"
        number, data = lines[-3], json.loads(lines[-1].removeprefix("data: "))
        assert number == "id: " + data["cursor"]
        assert (data["replica_id"], data["incarnation"], data["cause"]) == ("b", 2, "link-closed")


def test_a_graceful_leave_is_an_event_of_its_own_and_no_failure() -> None:
    with lighthouse() as running, Member(running.url, "a") as a, subscribed(running) as events:
        a.events.expect("message", lambda seen: isinstance(seen.value, Switch))
        assert events.next(DEADLINE_S).kind is EventKind.RESYNC
        a.client.close(Goodbye("done", True))
        seen = until(events, EventKind.JOB_ENDED)
        assert [e.evidence for e in seen if e.kind is EventKind.MEMBER_LEFT] == ["done"]
        assert not [e for e in seen if e.kind in (EventKind.MEMBER_FAILED, EventKind.ROUND_OPENED)]


def test_a_subscription_resumes_from_its_cursor_without_a_gap_or_a_repetition() -> None:
    with lighthouse() as running, quorum_of_two(running):
        with subscribed(running, after="oldest", follow=False) as everything:
            whole = list(everything)
        assert len(whole) >= 4
        parts: list[JobEvent] = []
        cursor = "oldest"
        for _ in whole:
            with subscribed(running, after=cursor) as some:
                parts.append(some.next(DEADLINE_S))
                cursor = some.cursor
        assert parts == whole


def test_a_lighthouse_that_starts_again_is_a_resync_and_the_stream_goes_on(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        with lighthouse(state_dir=tmp_path) as first:
            port = int(first.address.rpartition(":")[2])
            stack.enter_context(quorum_of_two(first))
            events = stack.enter_context(subscribed(first))
            assert events.next(DEADLINE_S).kind is EventKind.RESYNC
        with lighthouse(state_dir=tmp_path, port=port) as second:
            assert second.address == first.address
            resync = until(events, EventKind.RESYNC)[-1]
            assert resync.evidence == "the log does not reach back so far"
            with Member(second.url, "c"):
                while until(events, EventKind.MEMBER_WAITING)[-1].replica_id != "c":
                    pass


def test_a_reader_that_falls_behind_is_told_so_and_goes_on_with_the_state_as_it_is() -> None:
    with lighthouse(events_kept_max=5) as running, quorum_of_two(running) as (_, b):
        with subscribed(running, after="oldest", follow=False) as everything:
            first = next(everything)
        with subscribed(running) as live:
            live.next(DEADLINE_S)
            cut(b)
            until(live, EventKind.ROUND_OPENED)
        with subscribed(running, after=first.cursor) as late:
            resync = late.next(DEADLINE_S)
            assert resync.kind is EventKind.RESYNC
            assert resync.snapshot is not None
            assert resync.snapshot["quorum"] in ("1.1", "1.2")


def test_a_timeout_or_a_close_ends_the_wait_at_once() -> None:
    with lighthouse() as running, subscribed(running) as events:
        started = time.monotonic()
        with pytest.raises(TimeoutError, match=r"no event within 0\.2 s"):
            events.next(timeout_s=0.2)
        assert time.monotonic() - started < 2.0
        closer = threading.Timer(0.1, events.close)
        closer.start()
        assert list(events) == []
        closer.join()


def test_events_come_in_an_event_loop_as_well() -> None:
    async def read(running: Lighthouse) -> list[EventKind]:
        kinds = []
        with subscribed(running, after="oldest") as events:
            async for event in events:
                kinds.append(event.kind)
                if event.kind is EventKind.JOB_FOUNDED:
                    break
        return kinds

    with lighthouse() as running, quorum_of_two(running):
        kinds = asyncio.run(asyncio.wait_for(read(running), DEADLINE_S))
    assert kinds[0] is EventKind.LIGHTHOUSE_STARTED


def test_a_reader_of_a_job_that_does_not_exist_yet_gets_its_first_events() -> None:
    with lighthouse() as running, subscribed(running, after="oldest") as events:
        with quorum_of_two(running):
            assert until(events, EventKind.JOB_FOUNDED)[-1].members == ("a#1", "b#2")


def test_without_the_token_nobody_reads_and_a_reader_never_shows_the_token_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with lighthouse(token=TOKEN) as running:
        monkeypatch.setenv("EVERSTEP_TOKEN", "another token")
        with subscribed(running) as events, pytest.raises(LighthouseRefused, match="token"):
            events.next(DEADLINE_S)
        monkeypatch.setenv("EVERSTEP_TOKEN", TOKEN.decode())
        with subscribed(running) as events, pytest.raises(TimeoutError):
            events.next(0.2)
        url = f"{running.url}/api/v1/drain?job=job&group=a"
        for scope, code in (("read", 401), ("operate", 404)):
            bearer = {"Authorization": f"Bearer {http_key(TOKEN, scope)}"}
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(urllib.request.Request(url, method="POST", headers=bearer), timeout=DEADLINE_S)
            with refused.value:
                assert refused.value.code == code


def test_no_lighthouse_is_said_within_the_connect_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with es.subscribe_events(lighthouse=f"127.0.0.1:{port}", connect_timeout_s=0.3) as events:
        with pytest.raises(LighthouseUnreachable, match="no events from"):
            events.next(DEADLINE_S)


def test_a_subscription_without_a_lighthouse_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="which lighthouse"):
        es.subscribe_events()


def test_a_job_that_is_not_served_is_named_when_only_the_past_is_asked_for() -> None:
    with lighthouse() as running, subscribed(running, follow=False) as events:
        with pytest.raises(ConfigError, match="no job 'job' here; jobs: none"):
            events.next(DEADLINE_S)


def test_a_reader_that_reads_nothing_costs_the_others_nothing() -> None:
    with lighthouse() as running, quorum_of_two(running) as (_, b):
        host, _, port = running.address.rpartition(":")
        with socket.create_connection((host, int(port))) as idle:
            idle.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            idle.sendall(b"GET /api/v1/events?job=job&after=oldest HTTP/1.1\r\nHost: x\r\n\r\n")
            with subscribed(running) as events:
                assert events.next(DEADLINE_S).kind is EventKind.RESYNC
                cut(b)
                assert until(events, EventKind.MEMBER_FAILED)[-1].replica_id == "b"


def test_an_event_of_a_newer_lighthouse_is_passed_over_and_the_stream_goes_on() -> None:
    """A server that says one kind more; whoever does not know it neither fails nor asks for it again and again."""
    known = encode(JobEvent(kind=EventKind.JOB_ENDED, cursor="life-2"))
    unknown = known.replace(b"job-ended", b"job-teleported").replace(b"life-2", b"life-1")
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(DEADLINE_S)
        with es.subscribe_events(lighthouse=f"127.0.0.1:{server.getsockname()[1]}", after="oldest") as events:
            with server.accept()[0] as connection:
                connection.recv(4096)
                connection.sendall(head + unknown + known)
                assert events.next(DEADLINE_S).cursor == "life-2"
