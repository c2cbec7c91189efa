"""The lighthouse that an agent has in it, where the job is given no other one: on a thread, it dies with the agent.

What it knows is worth nothing after that: its clients say all of it again to the next one.
"""

import contextlib
import logging
import time
from collections.abc import Iterator

from everstep.config import LighthouseSettings
from everstep.errors import ConfigError
from everstep.launcher.settings import JobSettings
from everstep.lighthouse.app import Lighthouse

__all__ = ["lighthouse_of"]

OTHERS_S = 5.0  # at the end, for the other nodes to hear of it and to go
LOOK_S = 0.02

log = logging.getLogger("everstep.launcher")


@contextlib.contextmanager
def lighthouse_of(settings: JobSettings) -> Iterator[str]:
    """The URL of the lighthouse to connect to. Raises ConfigError where one is to run here, and cannot."""
    if not settings.hosts_lighthouse:
        assert settings.lighthouse is not None
        yield settings.lighthouse
        return
    with contextlib.ExitStack() as stack:
        hosted = LighthouseSettings(
            bind=settings.lighthouse_bind,
            port=settings.lighthouse_port,
            token=settings.token,
            jobs=(settings.job_id,),
        )
        try:
            lighthouse = stack.enter_context(Lighthouse.in_thread(hosted))
        except ConfigError as error:
            if not settings.hosts_only_if_free or settings.lighthouse is None:
                raise
            log.info("another process has the lighthouse: %s", error)
            yield settings.lighthouse
            return
        here, job = lighthouse.address, settings.job_id
        log.info("lighthouse in this agent: everstep status --lighthouse %s --job %s", here, job)
        yield settings.lighthouse or lighthouse.url
        deadline = time.monotonic() + OTHERS_S
        while lighthouse.links > 0 and time.monotonic() < deadline:
            time.sleep(LOOK_S)
