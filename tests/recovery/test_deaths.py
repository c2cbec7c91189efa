"""Donors and joiners that are processes of their own, killed and stopped by the kernel in the middle of a transfer."""

import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from everstep.errors import ConfigError, RecoveryFailed
from everstep.recovery import Fetch, InPlace, Snapshot, TransferAuth
from tests.recovery.far import CHUNK_BYTES, START_S, Far, far_donors, join_and_die
from tests.recovery.trees import assert_same
from tests.recovery.wires import AUTH, Proxy, Running, flipping, request_to, serving, state_of
from tests.support.proc import stat_of
from tests.support.waiting import wait_until

MIB = 16.0
READS = pytest.mark.parametrize("may_read_memory", [False, True], ids=["http", "memory"])


def fetch_from(donors: list[tuple[Far, str]], on_progress: Callable[[int, int], None], **fields: Any) -> Fetch:
    urls = [url for _, url in donors]
    landing = fields.pop("landing", None)
    return Fetch(request_to(urls[0], other_urls=tuple(urls[1:]), auth=AUTH, **fields), on_progress, landing)


class Striking:
    """Sends each donor its signal, once so much of the state has arrived."""

    def __init__(self, donors: list[tuple[Far, str]], shares: dict[int, float], number: signal.Signals) -> None:
        self.struck: list[int] = []
        self._donors = donors
        self._shares = shares
        self._number = number

    def __call__(self, done: int, total: int) -> None:
        for victim, share in self._shares.items():
            if done >= share * total and victim not in self.struck:
                self.struck.append(victim)
                self._donors[victim][0].send(self._number)


@READS
@pytest.mark.parametrize("victim", [0, 1])
def test_a_donor_killed_at_half_of_the_transfer_is_replaced_by_the_others(victim: int, may_read_memory: bool) -> None:
    with far_donors(3, MIB, AUTH) as donors:
        strike = Striking(donors, {victim: 0.5}, signal.SIGKILL)
        fetch = fetch_from(donors, strike, may_read_memory=may_read_memory)
        assert_same(fetch.run(), state_of(MIB))
    assert strike.struck == [victim]
    assert fetch.report.digest_errors == 0


@READS
def test_with_all_donors_but_one_killed_the_last_one_sends_the_rest(may_read_memory: bool) -> None:
    with far_donors(3, MIB, AUTH) as donors:
        strike = Striking(donors, {0: 0.2, 1: 0.5}, signal.SIGKILL)
        fetch = fetch_from(donors, strike, may_read_memory=may_read_memory)
        assert_same(fetch.run(), state_of(MIB))
    assert strike.struck == [0, 1]
    assert set(fetch.report.lost) <= {url for _, url in donors[:2]}


@READS
def test_with_all_donors_killed_nothing_is_handed_over(may_read_memory: bool) -> None:
    own: dict[str, Any] = {"model": {"w": torch.zeros_like(state_of(MIB)["model"]["w"])}, "step": 0, "lr": 0.5}
    with far_donors(2, MIB, AUTH) as donors:
        strike = Striking(donors, {0: 0.5, 1: 0.5}, signal.SIGKILL)
        there = InPlace(own)
        fetch = fetch_from(donors, strike, may_read_memory=may_read_memory, expected=own, landing=there)
        with pytest.raises(RecoveryFailed):
            fetch.run()
    assert strike.struck == [0, 1]
    assert (own["step"], own["lr"]) == (0, 0.5)
    assert own["model"]["w"].any(), "it had begun to land: whoever holds this has no state"
    assert not torch.equal(own["model"]["w"], state_of(MIB)["model"]["w"])


def test_a_donor_that_is_stopped_in_the_middle_is_robbed_of_its_work() -> None:
    with far_donors(2, MIB, AUTH) as donors:
        strike = Striking(donors, {1: 0.3}, signal.SIGSTOP)
        began_at = time.monotonic()
        fetch = fetch_from(donors, strike, stall_timeout_s=9.0)
        assert_same(fetch.run(), state_of(MIB))
        assert time.monotonic() - began_at < 5.0
    assert strike.struck == [1]


def test_the_only_donor_may_stand_still_for_a_while() -> None:
    with far_donors(1, MIB, AUTH) as donors:
        ((donor, _),) = donors
        strike = Striking(donors, {0: 0.3}, signal.SIGSTOP)
        fetch = fetch_from(donors, strike)
        with Running(fetch) as running:
            wait_until(lambda: bool(strike.struck) and is_stopped(donor), 10.0)
            donor.send(signal.SIGCONT)
            running.wait()
            assert running.state is not None
            assert_same(running.state, state_of(MIB))


def is_stopped(donor: Far) -> bool:
    assert donor.process.pid is not None
    stat = stat_of(donor.process.pid)
    return stat is not None and stat.state == "T"


def test_a_joiner_killed_in_the_middle_costs_the_donor_nothing_and_may_come_back() -> None:
    state = state_of(MIB)
    with serving(Snapshot.lend(state, CHUNK_BYTES), AUTH) as (server, url):
        with Far(join_and_die, url, AUTH) as joiner:
            joiner.process.join(START_S)
            assert joiner.process.exitcode == -signal.SIGKILL
        wait_until(lambda: len(server.list_fds()) == 1, 10.0)
        assert_same(Fetch(request_to(url, auth=AUTH)).run(), state)


def test_a_bit_flipped_on_the_wire_is_counted_and_never_lands_for_good() -> None:
    own: dict[str, Any] = {"model": {"w": torch.zeros_like(state_of(MIB)["model"]["w"])}, "step": 0, "lr": 0.5}
    with far_donors(1, MIB, AUTH) as ((_, url),), Proxy(url, flipping(int(MIB) << 19)) as proxy:
        fetch = Fetch(request_to(proxy.url, auth=AUTH, expected=own), landing=InPlace(own))
        assert_same(fetch.run(), state_of(MIB))
    assert fetch.report.digest_errors == 1
    assert torch.equal(own["model"]["w"], state_of(MIB)["model"]["w"])


def test_with_another_token_nothing_is_learned_and_nothing_lands() -> None:
    own: dict[str, Any] = {"model": {"w": torch.zeros_like(state_of(1)["model"]["w"])}, "step": 0, "lr": 0.5}
    with far_donors(1, 1.0, AUTH) as ((_, url),):
        for auth in (None, TransferAuth(b"the token of another job")):
            fetch = Fetch(request_to(url, auth=auth, may_read_memory=True), landing=InPlace(own))
            with pytest.raises(ConfigError):
                fetch.run()
            assert fetch.report.total_bytes == 0
    assert not own["model"]["w"].any()
