"""A lighthouse in a process of its own that kills itself at a point of its work once a test has asked for it.

`python -m tests.train.doomed SETTINGS` (JSON) serves until it dies. A line on its stdin names the point of POINTS where
it is to die; it answers `dies at ...`. The product's journal and links run beneath: only the instant is the test's.
"""

import asyncio
import json
import os
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from everstep.config import LighthouseSettings
from everstep.core.messages import Grant, JournalRecord, Notice, Proposal, Switch, ToMember
from everstep.core.types import Quorum
from everstep.lighthouse.app import Lighthouse, run_until_complete
from everstep.lighthouse.journal import Journal, StateDir
from everstep.link.server import LinkServer
from everstep.logs import configure_logging

TORN_BYTES = 7
POINTS = (
    "one notice sent",
    "before the record",  # of the quorum that the round comes to
    "record torn",
    "record on disk",
    "one grant sent",
    "all grants sent",
)
_NAMES: dict[type, str] = {Notice: "notice", Grant: "grant", Proposal: "proposal", Switch: "switch"}


class Fate:
    """Where this process dies; set on the thread that reads stdin."""

    def __init__(self) -> None:
        self.point = ""

    def reached(self, point: str) -> None:
        if self.point == point:
            os.kill(os.getpid(), signal.SIGKILL)

    def listen(self) -> None:
        for line in sys.stdin:
            self.point = line.strip()
            print("dies at", self.point)
        os._exit(0)  # the test has gone


class DoomedJournal(Journal):
    def __init__(self, path: Path, job_id: str, fate: Fate) -> None:
        super().__init__(path, job_id)
        self._fate = fate
        self._quorum: Quorum | None = None

    def append(self, record: JournalRecord) -> None:
        is_new, self._quorum = record.current != self._quorum, record.current
        if is_new:
            self._fate.reached("before the record")
        super().append(record)
        if is_new and self._fate.point == "record torn":
            os.truncate(self.path, self.path.stat().st_size - TORN_BYTES)
            self._fate.reached("record torn")
        if is_new:
            self._fate.reached("record on disk")


class DoomedStateDir(StateDir):
    def __init__(self, path: Path, fate: Fate) -> None:
        super().__init__(path)
        self._fate = fate

    def journal(self, job_id: str) -> Journal:
        path = super().journal(job_id).path
        return DoomedJournal(path, job_id, self._fate)


class DoomedLinks:
    """In the place of the LinkServer: a message for many goes to one link after the other."""

    def __init__(self, links: LinkServer, fate: Fate) -> None:
        self._links = links
        self._fate = fate

    def send(self, message: ToMember, links: Iterable[int]) -> None:
        kind = _NAMES.get(type(message), "")
        for link in links:
            self._links.send(message, (link,))
            self._fate.reached(f"one {kind} sent")
        self._fate.reached(f"all {kind}s sent")

    def close_link(self, number: int, reason: str) -> None:
        self._links.close_link(number, reason)


class DoomedLighthouse(Lighthouse):
    def __init__(self, settings: LighthouseSettings, fate: Fate) -> None:
        super().__init__(settings)
        assert settings.state_dir is not None
        self._state_dir = DoomedStateDir(settings.state_dir, fate)
        self._fate = fate

    async def _serve(self, listener: socket.socket, tls: ssl.SSLContext | None) -> None:
        await super()._serve(listener, tls)
        assert self._jobs is not None
        assert self._server is not None
        self._jobs.attach(DoomedLinks(self._server, self._fate))  # type: ignore[arg-type]


def main(settings: dict[str, Any]) -> None:
    os.dup2(1, 2)  # the log goes where the test reads lines
    configure_logging()
    fate = Fate()
    settings["state_dir"] = Path(settings["state_dir"])

    async def serve() -> None:
        async with DoomedLighthouse(LighthouseSettings(**settings), fate) as lighthouse:
            print("listening on", lighthouse.address)
            threading.Thread(target=fate.listen, daemon=True).start()
            await asyncio.Event().wait()

    run_until_complete(serve)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
