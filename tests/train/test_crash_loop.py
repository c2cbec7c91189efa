"""A group whose processes die again and again soon after they start: held, then left out, then admitted again."""

import time

from everstep.core.events import EventKind
from everstep.link.auth import Credentials
from everstep.link.dial import LinkTarget
from everstep.link.operate import admit_group
from tests.train.job import Job, assert_nothing_lost, assert_same_bits

LIMIT = 4


def test_a_group_in_a_crash_loop_is_held_then_left_out_and_the_other_trains_on() -> None:
    with Job(2, crash_loop_limit=LIMIT) as job:
        job.start_all({1: {"die_in": "backward", "after_steps": 2}})
        survivor = job.running[0]
        for _ in range(LIMIT - 2):
            job.until_gone(job.running[1])
            job.start(1, die_in="backward", after_steps=2)
        job.until_gone(job.running[1])
        started_at = time.monotonic()
        held = job.start(1, die_in="backward", after_steps=2)
        job.until_gone(held)
        assert time.monotonic() - started_at > 1.0
        assert any("it is let in after 1.0 s" in line for line in held.logs)
        left_out = job.start(1)
        job.until_gone(left_out)
        assert left_out.error.startswith("LighthouseRefused"), left_out
        assert "its node, or its data, is suspect; it is left out" in left_out.error
        step = survivor.step
        job.until(lambda: survivor.step >= step + 20, "the other goes on")
        (event,) = [event for event in job.events() if event.kind is EventKind.GROUP_LEFT_OUT]
        assert event.replica_id == "1"
        target = LinkTarget(url=f"http://{job.address}", credentials=Credentials(job_id="default"))
        assert "is let in again" in admit_group(target, "1")
        mended = job.start(1)
        job.until(lambda: mended.participants == 2, "it trains again")
        job.stop()
        assert_nothing_lost([survivor])
        assert_same_bits([survivor, mended])
