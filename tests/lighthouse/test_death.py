"""A lighthouse that dies, and two of them for one job: members' machines on real links, without torch."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from everstep.config import LighthouseSettings
from everstep.core.messages import Refused, Switch
from everstep.core.types import RefusalCode
from everstep.lighthouse.app import Lighthouse
from tests.link.parties import Member
from tests.support.relay import Relay
from tests.support.waiting import wait_until


@contextlib.contextmanager
def lighthouse(state_dir: Path, **settings: object) -> Iterator[Lighthouse]:
    made = LighthouseSettings(**{"port": 0, "state_dir": state_dir, **settings})  # type: ignore[arg-type]
    with Lighthouse.in_thread(made) as running:
        yield running


def switch(member: Member) -> Switch:
    found = member.events.expect("message", lambda seen: isinstance(seen.value, Switch)).value
    assert isinstance(found, Switch)
    return found


def history(member: Member) -> str:
    founding = switch(member).founding
    assert founding is not None
    return founding.history


@contextlib.contextmanager
def half_at_each(*addresses: str) -> Iterator[list[Member]]:
    """Four groups that are to found one job together, two at each address."""
    with contextlib.ExitStack() as stack:
        where = [addresses[0], addresses[0], addresses[1], addresses[1]]
        yield [
            stack.enter_context(Member(f"http://{address}", f"g{i}", expected_replicas=4))
            for i, address in enumerate(where)
        ]


def test_with_min_replicas_above_half_two_lighthouses_found_nothing(tmp_path: Path) -> None:
    settings = {"min_replicas": 3, "join_timeout_s": 0.2}
    with lighthouse(tmp_path / "1", **settings) as one, lighthouse(tmp_path / "2", **settings) as two:
        with half_at_each(one.address, two.address) as members:
            for member in members:
                member.events.expect("log", lambda seen: seen.value == "waiting")
            after = time.monotonic() + 0.5
            wait_until(lambda: time.monotonic() > after, what="both join timeouts pass")
            assert all(member.replica.quorum is None for member in members)
            with Member(f"http://{one.address}", "g4", expected_replicas=4) as third:
                assert len(switch(third).members.added) == 3, "and with one more it is founded where three are"
                assert len(switch(members[0]).members.added) == 3
            assert all(member.replica.quorum is None for member in members[2:])


def test_two_lighthouses_of_one_job_found_two_histories_and_neither_takes_the_others_members(tmp_path: Path) -> None:
    """Two jobs, then, of one name. Nobody moves from one to the other with its state, so no step has two lineages."""
    settings = {"join_timeout_s": 0.2}
    with lighthouse(tmp_path / "1", **settings) as one, lighthouse(tmp_path / "2", **settings) as two:
        with Relay(one.address) as near, Relay(two.address) as far:
            with half_at_each(near.address, far.address) as members:
                histories = {history(member) for member in members}
                assert len(histories) == 2
                holders = [member for member in members if member.replica.lineage is not None]
                held = [member.replica.lineage for member in holders]
                assert len(holders) == 2, "the founder of each"
                near.point_at(two.address)
                far.point_at(one.address)
                for holder in holders:
                    refused = holder.events.expect("message", lambda seen: isinstance(seen.value, Refused)).value
                    assert refused.code is RefusalCode.STRANGER
                    assert "everstep new-history --job job" in refused.detail
                assert [holder.replica.lineage for holder in holders] == held
