"""The storm, for as long as its faults need to meet the rare instants."""

import pytest

from tests.collectives.storm import GOES_ON_WITHIN_S, storm


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(4))
def test_survivors_of_random_kills_and_aborts_are_in_a_group_again_soon(seed: int) -> None:
    took = storm(120.0, seed)
    assert len(took) > 100
    assert max(took) < GOES_ON_WITHIN_S
