"""RankMonitorClient without an agent: what is calculated, saved and loaded."""

import json

import pytest

from everstep.core.limits import WARM_UP
from everstep.errors import ConfigError
from everstep.monitor.beats import Beats
from everstep.monitor.client import RankMonitorClient, RankMonitorClientError

SECTIONS = ("step", "save")


def used(client: RankMonitorClient, sections: int = WARM_UP + 2) -> RankMonitorClient:
    client.init_workload_monitoring()
    for _ in range(sections):
        client.send_heartbeat()
        for name in SECTIONS:
            client.start_section(name)
            client.end_section(name)
    return client


def test_what_was_calculated_and_seen_goes_through_json_into_the_next_process() -> None:
    beats, later = Beats(), Beats()
    client = used(RankMonitorClient(beats=beats))
    assert client.calculate_and_set_hb_timeouts()
    assert client.calculate_and_set_section_timeouts(["step"], calc_out_of_section=False)
    state = json.loads(json.dumps(client.state_dict()))
    successor = RankMonitorClient(beats=later)
    successor.load_state_dict(state)
    assert successor.hb_timeouts == client.hb_timeouts
    assert successor.section_timeouts == client.section_timeouts
    assert later.observed() == beats.observed()


def test_too_few_intervals_are_an_error_or_skipped() -> None:
    client = used(RankMonitorClient(beats=Beats()), sections=WARM_UP)
    with pytest.raises(RankMonitorClientError, match="too few intervals to calculate timeouts: save, step"):
        client.calculate_and_set_section_timeouts(SECTIONS, calc_out_of_section=False)
    assert not client.calculate_and_set_hb_timeouts(skip_if_not_ready=True)
    assert client.hb_timeouts.subsequent is None


def test_the_selected_sections_are_calculated_and_all_by_default() -> None:
    client = used(RankMonitorClient(beats=Beats()))
    client.calculate_and_set_section_timeouts(["step"], calc_out_of_section=False)
    assert client.section_timeouts.calculated_sections == {"step"}
    client.calculate_and_set_section_timeouts()
    assert client.section_timeouts.calculated_sections == set(SECTIONS)
    assert client.section_timeouts.were_calculated


def test_what_is_calculated_again_is_merged_with_what_was_before() -> None:
    numbers = [2.0]
    client = RankMonitorClient(lambda _: numbers, safety_factor=5.0, beats=Beats())
    assert client.calculate_and_set_hb_timeouts()
    assert client.hb_timeouts.subsequent == 10.0
    numbers[:] = [4.0]
    client.calculate_and_set_hb_timeouts()
    assert client.hb_timeouts.subsequent == 15.0


def test_a_section_that_is_open_cannot_be_opened_and_one_that_is_not_cannot_be_closed() -> None:
    client = RankMonitorClient(beats=Beats())
    client.start_section("step")
    with pytest.raises(ConfigError, match="'step' is open already"):
        client.start_section("step")
    client.end_section("step")
    with pytest.raises(ConfigError, match="'step' is not open"):
        client.end_section("step")


def test_timeouts_that_the_other_librarys_client_saved_are_taken_over() -> None:
    theirs = {
        "current_timeouts": {
            "heartbeat": {"initial": 60.0, "subsequent": 30.0, "were_calculated": True},
            "section": {
                "section": {"step": 12.5, "setup": 600.0},
                "out_of_section": 77.0,
                "calculated_sections": ["step"],
                "is_out_of_section_calculated": True,
            },
        }
    }
    client = RankMonitorClient(beats=Beats())
    client.load_state_dict(theirs)
    assert client.hb_timeouts.subsequent == 30.0
    assert client.section_timeouts.section == {"step": 12.5}
    assert client.section_timeouts.out_of_section == 77.0
    client.load_state_dict({})
    assert client.hb_timeouts.subsequent == 30.0


def test_the_state_of_another_version_is_an_error() -> None:
    with pytest.raises(RankMonitorClientError, match="version 99, not 1"):
        RankMonitorClient(beats=Beats()).load_state_dict({"version": 99})
