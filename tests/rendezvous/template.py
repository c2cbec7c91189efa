"""A process that forks nodes: `python -m tests.rendezvous.template`. Each forked process is one agent without workers.

Commands on stdin, a JSON list a line: ["start", NAME, {settings}] forks a node; ["tell", NAME, WORD] tells it one of
`leave`, `close`, `again` (it joins anew, as a worker's failure makes an agent do), `host` (it may open the store).
What the nodes say is a JSON object a line on the one stdout.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from typing import Any

from everstep.core.node_messages import NodeSpec
from everstep.errors import EverstepError, NodeEvicted
from everstep.link.auth import Credentials
from everstep.link.dial import LinkTarget
from everstep.link.node import NodeClient

FOR_EVER_S = 3600.0


class Agent:
    """Joins, says its place, and joins again whenever its round is over or others wait."""

    def __init__(self, name: str, settings: dict[str, Any], words: int) -> None:
        self.name = name
        self._waits_to_host = settings.pop("waits_to_host", False)
        self._may_host = threading.Event()
        self._is_again = False
        self._stores = 0
        url = settings.pop("url")
        spec = NodeSpec(node_id=settings.pop("node_id", name), nonce=f"{name} {os.getpid()}", **settings)
        target = LinkTarget(url=url, credentials=Credentials(job_id="job", role="node"), connect_timeout_s=FOR_EVER_S)
        self.client = NodeClient(target, "", spec)
        self._words = os.fdopen(words)

    def say(self, event: str, **more: object) -> None:
        line = json.dumps({"node": self.name, "event": event, "pid": os.getpid(), "at": time.monotonic(), **more})
        os.write(1, line.encode() + b"\n")

    def run(self) -> None:
        threading.Thread(target=self._listen, daemon=True).start()
        self.say("started")
        with self.client:
            while self._one_round():
                pass

    def _one_round(self) -> bool:
        """Whether another may follow."""
        try:
            info = self.client.next_round(self._open_store)
            round_ = str(info.round)
            self.say("round", round=round_, n=info.round.n, rank=info.rank, size=info.size, store=info.store)
            self.client.wait_changed(self._is_over, FOR_EVER_S)
            self.say("over", round=round_, why=self.client.why_dissolved)
        except EverstepError as error:
            self.say("error", kind=type(error).__name__, why=str(error))
            return isinstance(error, NodeEvicted)
        return True

    def _is_over(self, client: NodeClient) -> bool:
        is_again, self._is_again = self._is_again, False
        return is_again or client.needs_new_round

    def _open_store(self) -> str:
        self.say("hosting")
        if self._waits_to_host:
            self._may_host.wait(FOR_EVER_S)
        self._stores += 1
        return f"{self.name}-{os.getpid()}:{self._stores}"

    def _listen(self) -> None:
        for line in self._words:
            match line.strip():
                case "leave":
                    self.client.shutdown("asked to")
                case "close":
                    self.say("closing", confirmed=self.client.close(reason="asked to", timeout_s=FOR_EVER_S))
                case "host":
                    self._may_host.set()
                case "again":
                    self._is_again = True
                    self.client.poke()


def _set_wall_clock(offset_s: float) -> None:
    """This process's wall clock is off by so much."""
    real = time.time
    time.time = lambda: real() + offset_s


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the nodes are reaped as they end
    tongues: dict[str, int] = {}
    for line in sys.stdin:
        verb, name, what = json.loads(line)
        if verb == "tell":
            with contextlib.suppress(BrokenPipeError):  # it has ended; it may have been killed just now
                os.write(tongues[name], what.encode() + b"\n")
            continue
        reads, tongues[name] = os.pipe()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _set_wall_clock(what.pop("clock_offset_s", 0.0))
            try:
                Agent(name, what, reads).run()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        os.close(reads)


if __name__ == "__main__":
    main()
