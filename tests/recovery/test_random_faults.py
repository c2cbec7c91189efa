"""Transfers from several donors, each with faults of its own, drawn from a seed: a state arrives whole, or it fails."""

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from everstep.errors import RecoveryFailed, RemoteProtocolError
from everstep.recovery import Fetch, InPlace, RecoveryServer, Snapshot
from tests.recovery.trees import assert_same
from tests.recovery.wires import AUTH, KEY, Proxy, Running, Tamper, flipping, request_to, serving, state_of

MIB = 2.0
TOTAL = int(MIB * (1 << 20))
CHUNK_BYTES = 1 << 15
STALL_S = 1.0
SEEDS = 150


def donated(number: int, rng: random.Random) -> dict[str, Any]:
    """The same weights everywhere, but for what is each one's own."""
    state = state_of(MIB)
    state["rng"] = torch.full((4000,), number if rng.random() < 0.5 else 0)
    return state


def damaged(rng: random.Random) -> Tamper:
    at = rng.randrange(TOTAL)
    kind = rng.choice(["none", "flip", "cut", "cut once", "hold", "flip all"])
    seen: list[int] = []

    def tamper(offset: int, data: bytes) -> bytes | None:
        if kind == "flip":
            return flipping(at)(offset, data)
        if kind == "cut" and offset > at:
            return None
        if kind == "cut once" and offset > at and not seen:
            seen.append(offset)
            return None
        if kind == "hold" and offset > at:
            return b""
        if kind == "flip all" and len(data) > 2000:
            return data[:1000] + bytes([data[1000] ^ 1]) + data[1001:]
        return data

    return tamper


def striking(offered: list[tuple[RecoveryServer, dict[str, Any]]], rng: random.Random) -> Callable[[int, int], None]:
    """Withdraws, changes what was lent, and maybe offers again, when so much has arrived."""
    plans = [(rng.randrange(TOTAL), rng.choice(["withdraw", "withdraw", "again", "none"])) for _ in offered]
    done_with: set[int] = set()

    def strike(done: int, _total: int) -> None:
        for number, (at, what) in enumerate(plans):
            if done < at or number in done_with:
                continue
            done_with.add(number)
            server, state = offered[number]
            if what == "again":
                server.offer(KEY, Snapshot.lend(state, CHUNK_BYTES))
            elif what == "withdraw":
                server.withdraw(KEY)
                state["model"]["w"].fill_(-1)
                state["rng"].fill_(-1)

    return strike


@contextlib.contextmanager
def faulty_donors(rng: random.Random) -> Iterator[tuple[list[str], list[tuple[RecoveryServer, dict[str, Any]]]]]:
    urls, offered = [], []
    with contextlib.ExitStack() as stack:
        for number in range(rng.randint(1, 4)):
            state = donated(number, rng)
            snapshot = Snapshot.lend(state, CHUNK_BYTES) if rng.random() < 0.9 else None
            server, url = stack.enter_context(serving(snapshot, AUTH))
            offered.append((server, state))
            if rng.random() < 0.6:
                url = stack.enter_context(Proxy(url, damaged(rng))).url
            urls.append(url)
        yield urls, offered


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_state_arrives_whole_or_not_at_all(seed: int) -> None:
    rng = random.Random(seed)
    threads = set(threading.enumerate())
    with faulty_donors(rng) as (urls, offered):
        sound = [{name: _copy(value) for name, value in state.items()} for _, state in offered]
        own = donated(9, rng)
        request = request_to(
            urls[0],
            other_urls=tuple(urls[1:]),
            auth=AUTH,
            expected=own,
            stall_timeout_s=STALL_S,
            timeout_s=4.0,
            may_read_memory=rng.random() < 0.5,
        )
        landing = InPlace(own) if rng.random() < 0.5 else None
        fetch = Fetch(request, striking(offered, rng), landing)
        began_at = time.monotonic()
        with Running(fetch) as running:
            if rng.random() < 0.2:
                threading.Event().wait(rng.uniform(0.0, 0.05))
                fetch.abort()
            running.wait()
        assert time.monotonic() - began_at < 9.0
        if running.state is None:
            assert isinstance(running.error, RecoveryFailed | RemoteProtocolError) or "aborted" in str(running.error)
        else:
            there: Any = running.state
            assert_same(there, sound[int(there["rng"][0])] if _is_own(there, sound) else sound[0])
    assert set(threading.enumerate()) <= threads


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _copy(inner) for name, inner in value.items()}
    return value.clone() if isinstance(value, torch.Tensor) else value


def _is_own(there: Any, sound: list[dict[str, Any]]) -> bool:
    number = int(there["rng"][0])
    return 0 <= number < len(sound) and torch.equal(sound[number]["rng"], there["rng"])
