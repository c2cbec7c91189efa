"""Nodes as real processes on a lighthouse that is one too, for tests: each line they say is an event to wait for."""

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from typing import Any

from tests.support import proc
from tests.support.processes import Spawned, Spawner
from tests.support.waiting import wait_until

DEADLINE_S = 30.0


class Agents:
    """`url` is the lighthouse's. Events that nobody waited for are kept, in order, for each node."""

    def __init__(self, template: Spawned, url: str) -> None:
        self._template = template
        self.url = url
        self.pids: dict[str, int] = {}
        self.said: list[dict[str, Any]] = []
        self._unread: list[dict[str, Any]] = []

    def start(self, *names: str, **settings: object) -> None:
        wants = {"url": self.url, "max_nodes": 3, "join_timeout_s": 60.0, "last_call_s": 60.0, **settings}
        for name in names:
            self._template.send(json.dumps(["start", name, wants]))
        for name in names:
            self.pids[name] = int(self.expect(name, "started")["pid"])

    def tell(self, name: str, word: str) -> None:
        self._template.send(json.dumps(["tell", name, word]))

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        os.kill(self.pids[name], number)

    def expect(self, name: str, event: str, deadline_s: float = DEADLINE_S, **more: object) -> dict[str, Any]:
        """The next such event of this node; other events of it before that are passed over."""
        wanted = {"node": name, "event": event, **more}
        while True:
            for index, row in enumerate(self._unread):
                if row["node"] == name:
                    del self._unread[index]
                    if all(row.get(key) == value for key, value in wanted.items()):
                        return row
                    break
            else:
                row = json.loads(self._template.read_line(deadline_s))
                self.said.append(row)
                self._unread.append(row)

    def round_of(self, *names: str, size: int | None = None) -> dict[str, dict[str, Any]]:
        """The next round in which all of them are (and `size`): same for all, ranks unique."""
        size = len(names) if size is None else size
        found = {name: self.expect(name, "round", size=size) for name in names}
        newest = max(row["n"] for row in found.values())
        for name in names:
            while found[name]["n"] < newest:
                found[name] = self.expect(name, "round", size=size)
        assert len({(row["round"], row["size"], row["store"]) for row in found.values()}) == 1, found
        assert len({row["rank"] for row in found.values()}) == len(found), found
        return found

    def end(self) -> None:
        """All nodes at once, also where the process that forked them has ended."""
        left = [stat for stat in proc.of_session(self._template.pid) if stat.pid != self._template.pid]
        for stat in left:
            if proc.is_same_alive(stat):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(stat.pid, signal.SIGKILL)
        wait_until(lambda: not any(map(proc.is_same_alive, left)), what="the end of all nodes")


@contextlib.contextmanager
def agents_on(spawn: Spawner, address: str) -> Iterator[Agents]:
    agents = Agents(spawn(["-m", "tests.rendezvous.template"], until_teardown=True), f"http://{address}")
    try:
        yield agents
    finally:
        agents.end()


def check_all_rounds(said: list[dict[str, Any]]) -> int:
    """What must hold of everything that nodes ever said; returns how many rounds there were."""
    rounds: dict[str, tuple[int, str]] = {}
    ranks: dict[tuple[str, int], str] = {}
    stores: dict[str, str] = {}
    newest: dict[int, int] = {}
    for row in said:
        if row["event"] != "round":
            continue
        assert rounds.setdefault(row["round"], (row["size"], row["store"])) == (row["size"], row["store"]), row
        assert ranks.setdefault((row["round"], row["rank"]), row["node"]) == row["node"], row
        assert 0 <= row["rank"] < row["size"], row
        assert stores.setdefault(row["store"], row["round"]) == row["round"], row
        assert newest.get(row["pid"], 0) < row["n"], row
        newest[row["pid"]] = row["n"]
    return len(rounds)
