"""How long a fuzz target runs: a fixed number of cases in `make test`, a share of the time in `make soak`.

    @rounds(150)
    def test_a_claim(fuzz: Fuzz) -> None:
        @given(...)
        def holds(...) -> None: ...
        fuzz(holds)

EVERSTEP_FUZZ_S is how long all soak targets take together (default 600 s). Memory is watched in both.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest

SOAK_S = float(os.environ.get("EVERSTEP_FUZZ_S", "600"))
CASES_A_SEED = 200
GROWTH_BYTES_MAX = 64 << 20  # of the peak, over where the target began; hypothesis's own notes are most of it

_soaks = 1  # how many share SOAK_S


class Fuzz:
    """Runs a property. `cases` None: over and over with other seeds, for this target's share of the time."""

    def __init__(self, cases: int | None) -> None:
        self._cases = cases

    def __call__(self, holds: Callable[[], Any]) -> None:
        before = _reset_peak()
        if self._cases is not None:
            _settled(self._cases)(holds)()
        else:
            settled = _settled(CASES_A_SEED, is_soak=True)(holds)
            end_at, number = time.monotonic() + SOAK_S / _soaks, 0
            while number == 0 or time.monotonic() < end_at:
                hypothesis.seed(number)(settled)()
                number += 1
        grown = _memory("VmHWM") - before
        assert grown < GROWTH_BYTES_MAX, f"memory grew by {grown >> 20} MiB at its peak"


def share_time(soaks: int) -> None:
    """How many soaks were collected: each gets an equal part of SOAK_S."""
    global _soaks
    _soaks = max(1, soaks)


def rounds(cases: int) -> pytest.MarkDecorator:
    """Parametrizes a test with `fuzz`: this many cases, and the soak."""
    soak = pytest.param(Fuzz(None), marks=pytest.mark.soak, id="soak")
    return pytest.mark.parametrize("fuzz", [pytest.param(Fuzz(cases), id=f"{cases}-cases"), soak])


def _settled(cases: int, is_soak: bool = False) -> hypothesis.settings:
    slow = [
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.data_too_large,
        hypothesis.HealthCheck.large_base_example,
    ]
    found = hypothesis.settings(max_examples=cases, suppress_health_check=slow)
    # In a soak a failure is found again by the seed that is printed.
    return hypothesis.settings(found, database=None) if is_soak else found


def _reset_peak() -> int:
    """Begin to measure the peak anew; returns the resident bytes now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _memory(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise AssertionError(f"no {field} in /proc/self/status")
