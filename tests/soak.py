"""`make soak`: the soak tests, and beside them the simulator over many seeds, which takes what time they leave.

Most soak tests wait for real time to pass (a partition, ten minutes of churn), so the seeds, at the lowest priority,
cost hardly any time of their own. Exit status 0 when both passed; ends what it started when it is interrupted.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import IO

PYTEST = ("pytest", "-m", "soak", "--hypothesis-profile=soak", "-o", "faulthandler_timeout=0", "--durations=15")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--seeds", default="0:100000", help="FROM:TO")
    parser.add_argument("tests", nargs="*", help="what to give to pytest; default: all")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    # A shell's background job ignores it, and would hand that on to those who are interrupted by it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    began_at = time.monotonic()
    with (
        tempfile.TemporaryFile() as log,
        _started("tests.soak_seeds", args.seeds, str(os.cpu_count() or 1), output=log) as seeds,
    ):
        with _started(*PYTEST, *args.tests) as tests:
            tests_status = tests.wait()
        _say(f"the tests ended with status {tests_status} after {(time.monotonic() - began_at) / 60:.1f} min")
        seeds_status = seeds.wait()
        log.seek(0)
        _say(log.read().decode(errors="replace").rstrip())
        _say(f"the seeds ended with status {seeds_status} after {(time.monotonic() - began_at) / 60:.1f} min")
    return tests_status or seeds_status


@contextlib.contextmanager
def _started(module: str, *arguments: str, output: IO[bytes] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """In a session of its own, which a Ctrl-C in the terminal does not reach: it is interrupted here, once."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments], stdout=output, stderr=output, start_new_session=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
        process.wait()


def _say(line: str) -> None:
    sys.stdout.write(f"== {line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
