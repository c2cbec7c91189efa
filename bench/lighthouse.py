"""The lighthouse under many members: real links, the server in a process on one core, members simulated in this one.

    python bench/lighthouse.py [--members 1000] [--failures 10] [--quiet-s 5] [--json]

Every failure closes one member's link (it connects again as a fresh process afterwards). Prints milliseconds (min /
median / max): the last Notice after the first, the last Grant after the last Ready; the server's CPU share for the
members' heartbeats alone, and its memory a member.
"""

import argparse
import asyncio
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import aiohttp

from everstep.core.messages import Grant, Heartbeat, Hello, Notice, Ready, Switch, Welcome
from everstep.core.types import Lineage, MemberId, Phase, QuorumId, Report, genesis
from everstep.link import codec
from everstep.link.auth import Credentials
from everstep.link.dial import LinkTarget, dial

HEARTBEAT_S = 0.5


class Instants:
    """When the messages of one failure came and went."""

    def __init__(self) -> None:
        self.notices: list[float] = []
        self.readies: list[float] = []
        self.grants: list[float] = []


class Member:
    """Enough of a member to be believed: it says Hello, freezes, answers, takes the grant."""

    def __init__(self, name: str, bench: "Bench") -> None:
        self.name = name
        self.bench = bench
        self.member = MemberId(name, 0)
        self.lighthouse = ""
        self.quorum_id: QuorumId | None = None
        self.lineage: Lineage | None = None
        self.websocket: Any = None

    async def connect(self, session: aiohttp.ClientSession, target: LinkTarget) -> None:
        self.websocket = await dial(session, target)
        hello = Hello(self.report(), nonce=f"{self.name}-{time.monotonic()}", expected_replicas=self.bench.count)
        await self.websocket.send_bytes(codec.encode(hello))

    def report(self, is_unsettled: bool = False) -> Report:
        return Report(self.member, self.quorum_id, is_unsettled, self.lineage, 0, Phase.RUNNING, vote=None, tag=None)

    async def serve(self) -> None:
        async for frame in self.websocket:
            message = codec.decode_to_member(frame.data)
            match message:
                case Welcome():
                    self.member, self.lighthouse = message.member, message.lighthouse
                case Switch():
                    self.quorum_id = message.quorum_id
                    self.lineage = genesis("bench") if message.founding is None else message.founding
                    self.bench.switched += 1
                case Notice(round):
                    self.bench.instants.notices.append(time.perf_counter())
                    await self.websocket.send_bytes(codec.encode(Ready(round, self.report(is_unsettled=True))))
                    self.bench.instants.readies.append(time.perf_counter())
                case Grant():
                    self.bench.instants.grants.append(time.perf_counter())
                    self.quorum_id = message.quorum_id
                case _:
                    pass


class Bench:
    def __init__(self, count: int) -> None:
        self.count = count
        self.switched = 0
        self.instants = Instants()

    async def run(self, address: str, server: int, failures: int, quiet_s: float) -> dict[str, Any]:
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        target = LinkTarget(url=f"http://{address}", credentials=Credentials(job_id="bench"))
        before = memory_of(server)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:
            members = [Member(f"g{i}", self) for i in range(self.count)]
            joined_at = time.perf_counter()
            for start in range(0, self.count, 100):
                await asyncio.gather(*(member.connect(session, target) for member in members[start : start + 100]))
            tasks = [asyncio.create_task(member.serve()) for member in members]
            await self._until(lambda: self.switched >= self.count)
            found: dict[str, Any] = {"members": self.count, "founded_s": round(time.perf_counter() - joined_at, 3)}
            found["memory_kb_a_member"] = round((memory_of(server) - before) / 1024 / self.count, 1)
            beats = asyncio.create_task(self._beat(members))
            await asyncio.sleep(1.0)
            cpu, began_at = cpu_of(server), time.perf_counter()
            await asyncio.sleep(quiet_s)
            share = (cpu_of(server) - cpu) / (time.perf_counter() - began_at)
            found["heartbeat_cpu_percent"] = round(100 * share, 1)
            notified, granted = [], []
            for _ in range(failures):
                victim = members.pop()
                self.instants = Instants()
                failed_at = time.perf_counter()
                victim.websocket._response.connection.transport.abort()
                await self._until(lambda: len(self.instants.grants) >= len(members))
                notified.append((max(self.instants.notices) - min(self.instants.notices)) * 1e3)
                granted.append((max(self.instants.grants) - max(self.instants.readies)) * 1e3)
                found.setdefault("failure_to_last_grant_ms", []).append((max(self.instants.grants) - failed_at) * 1e3)
            beats.cancel()
            for member in members:
                member.websocket._response.connection.transport.abort()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, beats, return_exceptions=True)
        found["notice_spread_ms"] = spread(notified)
        found["last_ready_to_last_grant_ms"] = spread(granted)
        found["failure_to_last_grant_ms"] = spread(found["failure_to_last_grant_ms"])
        return found

    async def _beat(self, members: list[Member]) -> None:
        """Spread over the interval, as members that started at different times are."""
        frame = codec.encode(Heartbeat())
        while True:
            slots = 20
            for slot in range(slots):
                for member in members[slot::slots]:
                    await member.websocket.send_bytes(frame)
                await asyncio.sleep(HEARTBEAT_S / slots)

    async def _until(self, is_done: Any) -> None:
        deadline = time.monotonic() + 60
        while not is_done():
            if time.monotonic() > deadline:
                raise TimeoutError("the lighthouse did not answer within 60 s")
            await asyncio.sleep(0.001)


def memory_of(pid: int) -> int:
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def cpu_of(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def spread(values: list[float]) -> list[float]:
    return [round(v, 1) for v in (min(values), statistics.median(values), max(values))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=1000)
    parser.add_argument("--failures", type=int, default=10)
    parser.add_argument("--quiet-s", type=float, default=5.0, help="how long only heartbeats are measured")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, options.members * 2 + 100)), hard))
    cores = sorted(os.sched_getaffinity(0))
    command = [sys.executable, "-m", "everstep.cli", "lighthouse", "--port", "0", "--heartbeat-timeout", "10"]
    server = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: os.sched_setaffinity(0, cores[:1]),
    )
    try:
        assert server.stdout is not None
        address = server.stdout.readline().decode().split()[-1]
        if len(cores) > 1:
            os.sched_setaffinity(0, cores[1:])
        found = asyncio.run(Bench(options.members).run(address, server.pid, options.failures, options.quiet_s))
    finally:
        server.terminate()
        server.wait(10)
    if options.json:
        print(json.dumps({"benchmark": "lighthouse"} | found))
        return
    print(f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores; {' '.join(sys.argv)}")
    for name, value in found.items():
        text = " / ".join(map(str, value)) if isinstance(value, list) else value
        print(f"{name:>32}  {text}")


if __name__ == "__main__":
    main()
