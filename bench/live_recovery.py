"""How fast does a joiner get the live state, and what does it cost the others?

    python bench/live_recovery.py [--mib 1024] [--times 5] [--donors 3] [--with torchft] [--json]

All in one run, on loopback, each figure the median of --times rounds in which the candidates take turns.

    bare         a plain socket copy into touched memory, no digests: what the machine can do
    one, three   Everstep from one donor and from --donors, into the joiner's own tensors, every digest verified
    same host    Everstep reading the donor's memory, as it chooses by itself on one host (the others are kept to HTTP)
    growth       MiB by which the receiver's memory grew beyond the state, at its peak
    slow reader  the median step of a donor while somebody reads its snapshot with 64 KiB/s, over that without
    pause        a job of two survivors and a joiner: milliseconds that the step with the join took longer than others,
                 less the joiner's transfer; the slower survivor's

`--with torchft` measures the rival's transports (HTTP; process group; process group in place) as well.
"""

import argparse
import datetime
import json
import logging
import math
import multiprocessing
import os
import platform
import re
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

import everstep as es
from everstep.config import LighthouseSettings
from everstep.lighthouse.app import Lighthouse
from everstep.recovery import Fetch, FetchRequest, InPlace, RecoveryServer, Snapshot
from everstep.recovery.http import ChunksRequest
from everstep.recovery.snapshot import memory_of

KEY = "bench"
TENSORS = 64
CHUNK = 4 << 20
SLOW_BYTES_S = 64 << 10
DEADLINE_S = 300.0
STEPS = 40

spawn = multiprocessing.get_context("spawn")


def state_of(mib: int, fill: int = 0) -> dict[str, Any]:
    size = (mib << 20) // TENSORS // 4
    return {"model": {f"layer{i}.weight": torch.full((size,), fill, dtype=torch.int32) for i in range(TENSORS)}}


# ---- donors, each a process of its own


def donate(mib: int, pipe: Any) -> None:
    """Serves the state over a bare socket and over Everstep, and makes steps when it is told to."""
    torch.set_num_threads(1)
    state = state_of(mib, 1)
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_serve_bare, args=(listener, state), daemon=True).start()
    with RecoveryServer() as server:
        url = server.start("127.0.0.1", "127.0.0.1")
        pipe.send((url, listener.getsockname()[1]))
        while (order := pipe.recv()) != "end":
            if order == "offer":
                # A loan of its own for every fetch: its digests have to be computed again.
                server.offer(KEY, Snapshot.lend(state))
            elif order == "offer a copy":
                small = {"model": {"w": torch.zeros(64 << 18)}}
                server.offer(KEY, snapshot := Snapshot.take(small))
                pipe.send((snapshot.id, snapshot.chunk_count))
                continue
            elif order == "steps":
                pipe.send(_steps())
                continue
            pipe.send("done")


def _serve_bare(listener: socket.socket, state: dict[str, Any]) -> None:
    pieces = [memory_of(tensor.view(torch.uint8)) for tensor in state["model"].values()]
    while True:
        connection, _ = listener.accept()
        with connection:
            for piece in pieces:
                for begin in range(0, len(piece), CHUNK):
                    connection.sendall(piece[begin : begin + CHUNK])


def _steps() -> list[float]:
    weights, x = torch.rand(700, 700), torch.rand(700, 700)
    took = []
    for _ in range(STEPS):
        began_at = time.perf_counter()
        for _ in range(4):
            x = torch.tanh(x @ weights)
        took.append(time.perf_counter() - began_at)
    return took


class Donor:
    def __init__(self, mib: int) -> None:
        self._pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=donate, args=(mib, theirs), daemon=True)
        self.process.start()
        self.url, self.bare_port = "", 0

    def wait_started(self) -> None:
        self.url, self.bare_port = self.say(None)

    def say(self, order: str | None) -> Any:
        if order is not None:
            self._pipe.send(order)
        if not self._pipe.poll(DEADLINE_S):
            raise TimeoutError("a donor does not answer")
        return self._pipe.recv()

    def end(self) -> None:
        self._pipe.send("end")
        self.process.join(10)


@contextmanager
def donors(count: int, mib: int) -> Iterator[list[Donor]]:
    made = [Donor(mib) for _ in range(count)]
    try:
        for donor in made:
            donor.wait_started()
        yield made
    finally:
        for donor in made:
            donor.end()


# ---- transfers


def transfers(mib: int, times: int, count: int) -> dict[str, Any]:
    own = state_of(mib)
    touched = torch.zeros(mib << 20, dtype=torch.uint8)
    seconds: dict[str, list[float]] = {"bare": [], "one": [], "donors": [], "same_host": []}
    growth: list[float] = []
    with donors(count, mib) as made:
        urls = [donor.url for donor in made]
        for _ in range(times):
            seconds["bare"].append(_bare(made[0].bare_port, touched))
            for name, used, is_local in (("one", 1, False), ("donors", count, False), ("same_host", 1, True)):
                for donor in made[:used]:
                    donor.say("offer")
                took_s, grown_mib = _fetch(urls[:used], own, is_local=is_local)
                seconds[name].append(took_s)
                growth.append(grown_mib)
    gbs = {name: (mib << 20) / statistics.median(took) / 1e9 for name, took in seconds.items()}
    ratio = {
        name: statistics.median(b / t for b, t in zip(seconds["bare"], took, strict=True))
        for name, took in seconds.items()
    }
    return {"gb_s": gbs, "of_bare": ratio, "growth_mib": max(growth)}


def _bare(port: int, target: torch.Tensor) -> float:
    memory = memory_of(target)
    began_at = time.perf_counter()
    with socket.create_connection(("127.0.0.1", port)) as connection:
        at = 0
        while at < len(memory):
            received = connection.recv_into(memory[at : at + CHUNK], 0, socket.MSG_WAITALL)
            if not received:
                raise ConnectionError("the bare donor ended early")
            at += received
    return time.perf_counter() - began_at


def _fetch(urls: list[str], own: dict[str, Any], *, is_local: bool) -> tuple[float, float]:
    for tensor in own["model"].values():
        tensor.zero_()
    request = FetchRequest(
        source_url=urls[0],
        other_urls=tuple(urls[1:]),
        key=KEY,
        deadline=math.inf,
        expected=own,
        **({} if is_local else {"may_read_memory": False}),
    )
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = _status_mib("VmRSS")
    began_at = time.perf_counter()
    Fetch(request, landing=InPlace(own)).run()
    took_s = time.perf_counter() - began_at
    grown = _status_mib("VmHWM") - before
    assert all(tensor[0] == 1 == tensor[-1] for tensor in own["model"].values())
    return took_s, grown


def _status_mib(name: str) -> float:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def slow_reader() -> float:
    """The donor's median step beside a reader of 64 KiB/s, over that without one; they take turns."""
    with donors(1, 1) as (donor,):
        snapshot_id, chunks = donor.say("offer a copy")
        donor.say("steps")
        ratios = []
        for _ in range(5):
            alone = statistics.median(donor.say("steps"))
            with _reading_slowly(donor.url, ChunksRequest(snapshot_id, 0, chunks).target):
                beside = statistics.median(donor.say("steps"))
            ratios.append(beside / alone)
        return statistics.median(ratios)


@contextmanager
def _reading_slowly(url: str, target: str) -> Iterator[None]:
    over = threading.Event()
    with socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.connect(("127.0.0.1", int(url.rpartition(":")[2])))
        reader.sendall(f"GET {target} HTTP/1.1\r\n\r\n".encode())

        def read() -> None:
            while not over.wait(1 / 16):
                reader.recv(SLOW_BYTES_S // 16)

        thread = threading.Thread(target=read)
        thread.start()
        yield
        over.set()
        thread.join()


# ---- a job


def train(address: str, group: int, mib: int, pipe: Any) -> None:
    """A replica group whose steps are quick and whose state is large: most of it is frozen."""
    torch.set_num_threads(1)
    ballast = torch.nn.ParameterList(
        torch.nn.Parameter(tensor.float() + group, requires_grad=False) for tensor in state_of(mib)["model"].values()
    )
    net = torch.nn.Linear(16, 16)
    fetched = _Lines(pipe)
    logging.getLogger("everstep").addHandler(fetched)
    logging.getLogger("everstep").setLevel(logging.INFO)
    with es.Manager(lighthouse=address, replica_group_id=group, min_replicas=2) as manager:
        model = es.DistributedDataParallel(manager, net)
        manager.register("ballast", ballast)
        optimizer = es.Optimizer(manager, torch.optim.SGD(net.parameters(), lr=0.1))
        while not pipe.poll():
            began_at = time.monotonic()
            optimizer.zero_grad()
            model(torch.ones(4, 16)).sum().backward()
            time.sleep(0.01)  # stands for an accelerator that is busy
            optimizer.step()
            pipe.send(("step", manager.num_participants(), time.monotonic() - began_at))


class _Lines(logging.Handler):
    def __init__(self, pipe: Any) -> None:
        super().__init__()
        self._pipe = pipe

    def emit(self, record: logging.LogRecord) -> None:
        if (found := re.search(r"recovered step=.* fetch_ms=([\d.]+)", record.getMessage())) is not None:
            self._pipe.send(("fetched", 0, float(found[1]) / 1e3))


def pauses(mib: int, times: int) -> dict[str, Any]:
    found: list[float] = []
    fetches: list[float] = []
    for _ in range(times):
        fetch_s, longest_s = _join_once(mib)
        found.append((longest_s - fetch_s) * 1e3)
        fetches.append(fetch_s * 1e3)
    return {"beyond_ms": statistics.median(found), "worst_ms": max(found), "fetch_ms": statistics.median(fetches)}


def _join_once(mib: int) -> tuple[float, float]:
    """Seconds of the joiner's transfer, and by which the slower survivor's longest step exceeded its others."""
    heard: list[list[Any]] = [[], [], []]
    groups: list[tuple[Any, Any]] = []
    with Lighthouse.in_thread(LighthouseSettings(port=0)) as lighthouse:
        try:
            groups += [_start(lighthouse.address, group, mib) for group in (0, 1)]
            _hear(groups, heard, lambda: min(_count(heard[g], 2) for g in (0, 1)) > 50)
            groups.append(_start(lighthouse.address, 2, mib))
            _hear(groups, heard, lambda: min(_count(h, 3) for h in heard) > 10)
        finally:
            for process, pipe in groups:
                process.kill()
                process.join()
                pipe.close()
    steps = [[value for kind, _, value in heard[group][50:] if kind == "step"] for group in (0, 1)]
    fetch_s = max(value for kind, _, value in heard[2] if kind == "fetched")
    return fetch_s, max(max(took) - statistics.median(took) for took in steps)


def _start(address: str, group: int, mib: int) -> tuple[Any, Any]:
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=train, args=(address, group, mib, theirs), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _count(heard: list[Any], participants: int) -> int:
    return sum(kind == "step" and count == participants for kind, count, _ in heard)


def _hear(groups: list[tuple[Any, Any]], heard: list[list[Any]], is_enough: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not is_enough():
        if time.monotonic() > deadline:
            raise TimeoutError("the job does not get on")
        for number in range(len(groups)):
            while groups[number][1].poll(0.005):
                heard[number].append(groups[number][1].recv())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--donors", type=int, default=3)
    parser.add_argument("--job-mib", type=int, default=256, help="state of the job whose survivors' pause is measured")
    parser.add_argument("--with", dest="rival", choices=["torchft"], help="measure it in the same run")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.rival:
        from rival import require

        require()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"benchmark": "live_recovery", "mib": options.mib, "donors": options.donors}
    result |= transfers(options.mib, options.times, options.donors)
    result["slow_reader"] = slow_reader()
    result["pause"] = pauses(options.job_mib, options.times)
    if options.rival:
        from rival_transfer import measure

        result["torchft_gb_s"] = measure(options.mib, options.times)
    if options.json:
        print(json.dumps(result))
        return
    print(f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores; {' '.join(sys.argv)}")
    for name, rate in result["gb_s"].items():
        print(f"{name:>10}  {rate:5.2f} GB/s  {result['of_bare'][name]:5.2f} of bare")
    for name, rate in result.get("torchft_gb_s", {}).items():
        print(f"{name:>10}  {rate:5.2f} GB/s  torchft")
    print(f"growth beyond the state {result['growth_mib']:.0f} MiB; beside a slow reader {result['slow_reader']:.2f}")
    pause = result["pause"]
    print(
        f"survivors' pause beyond the transfer {pause['beyond_ms']:.0f} ms (worst {pause['worst_ms']:.0f}), "
        f"transfer of {options.job_mib} MiB {pause['fetch_ms']:.0f} ms"
    )


if __name__ == "__main__":
    main()
