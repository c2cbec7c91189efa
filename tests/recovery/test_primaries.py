"""The donor whose digests decide is lost, slow, or differs, at moments when no other one can take its place at once."""

import logging
import threading
from typing import Any

import pytest
import torch

from everstep.recovery import Fetch, Snapshot
from tests.recovery.trees import assert_same
from tests.recovery.wires import KEY, Proxy, Running, request_to, serving, state_of
from tests.support.waiting import wait_until

CHUNK_BYTES = 1 << 16


def test_a_primary_that_is_lost_before_anybody_else_offers_has_an_heir() -> None:
    """It is lost as its first chunk arrives, before it has told the digests of the many others."""
    state = state_of(64)
    with serving(Snapshot.lend(state, CHUNK_BYTES)) as (first, first_url), serving() as (second, second_url):
        fetch = Fetch(
            request_to(first_url, other_urls=(second_url,), retry_after_s=()), lambda _done, _total: first.withdraw(KEY)
        )
        with Running(fetch) as running:
            wait_until(lambda: first_url in fetch.report.lost)
            second.offer(KEY, Snapshot.lend(state, CHUNK_BYTES))
            running.wait()
    assert running.state is not None, running.error
    assert_same(running.state, state)


def test_a_slow_primary_is_asked_for_what_only_it_has(caplog: pytest.LogCaptureFixture) -> None:
    """It is robbed of its run; then the other one's generator turns out to differ."""
    first, second = state_of(4), state_of(4)
    first["rng"], second["rng"] = torch.zeros(5000), torch.ones(5000)
    held, go_on = threading.Event(), threading.Event()
    caplog.set_level(logging.INFO)

    def hold(offset: int, data: bytes) -> bytes:
        if offset > 3 * CHUNK_BYTES and not held.is_set():
            held.set()
            go_on.wait(5.0)
        return data

    with serving(Snapshot.lend(first, CHUNK_BYTES)) as (_, slow_url), Proxy(slow_url, hold) as proxy:
        with serving() as (late, late_url):
            lent = Snapshot.lend(second, CHUNK_BYTES)

            def offer(_done: int, _total: int) -> None:
                if late.offers.by_id(lent.id) is None:
                    late.offer(KEY, lent)

            fetch = Fetch(request_to(proxy.url, other_urls=(late_url,), expected=state_of(4) | {"rng": None}), offer)
            with Running(fetch) as running:
                wait_until(lambda: "is slow" in caplog.text, what="the primary is robbed")
                go_on.set()
                running.wait()
    there: Any = running.state
    assert there is not None, running.error
    assert_same(there, first)
