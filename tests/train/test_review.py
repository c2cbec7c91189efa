"""A process that is asked to leave, or told to end, does so though nobody reads its stderr."""

import os
import subprocess
import sys

from everstep.exit_codes import ExitCode

LIMIT_S = 60.0

ASKED = """
import os, signal
from everstep.train.drain import DrainOnSigterm
DrainOnSigterm(lambda: os.write(1, b"asked")).install()
os.close(2)
os.kill(os.getpid(), signal.SIGTERM)
os.write(1, b" and goes on")
"""

STUCK = """
import sys
from everstep.train.presence import _exit_stuck
_exit_stuck("of " + "x" * 200_000)
"""


def test_sigterm_asks_to_leave_though_stderr_is_closed() -> None:
    asked = subprocess.run([sys.executable, "-c", ASKED], stdout=subprocess.PIPE, timeout=LIMIT_S, check=True)
    assert asked.stdout == b"asked and goes on"


def test_a_stuck_process_ends_though_nobody_reads_its_stderr() -> None:
    reading, writing = os.pipe()
    try:
        ended = subprocess.run([sys.executable, "-c", STUCK], stderr=writing, timeout=LIMIT_S, check=False)
    finally:
        os.close(reading)
        os.close(writing)
    assert ended.returncode == ExitCode.STUCK
