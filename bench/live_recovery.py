"""How fast does a joiner get the live state, and what does it cost the others?

    python bench/live_recovery.py [--mib 1024] [--times 5] [--donors 3] [--with torchft] [--series 0] [--json]

All in one run, on loopback, each figure the median of --times rounds in which the candidates take turns.

    bare         a plain socket copy into touched memory, no digests: what the machine can do
    bare tuned   the same, its sender's socket with the options that ours has on one host
    one, three   Everstep from one donor and from --donors, into the joiner's own tensors, every digest verified;
                 from one again in the same round, which shows how far two measurements of the same thing are apart
    same host    Everstep reading the donor's memory, as it chooses by itself on one host (the others are kept to HTTP)
    group        Everstep over a process group from one donor, and from --donors, the building of the group included
    growth       MiB by which the receiver's memory grew beyond the state, at its peak
    slow reader  the median step of a donor while somebody reads its snapshot with 64 KiB/s, over that without
    pause        a job of two survivors and a joiner: milliseconds that the step with the join took longer than others,
                 less the joiner's transfer; the slower survivor's (join_pause.py)
    first step   seconds from a process's start to the first step that it contributed to, with 1 MB of state, less those
                 of one that imports torch and ends (first_step.py)

`--series N` measures nothing but one, one again and --donors, N times each, shuffled, and compares the means.

Beside each figure stand the aim and the least that will do. `--with torchft` lets the rival's transports (HTTP; process
group; process group in place) take turns with ours.
"""

import argparse
import contextlib
import datetime
import json
import math
import os
import platform
import random
import re
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

import first_step
from group_transfer import GroupDonor, GroupJoiner
from join_pause import pauses, spawn
from rival_transfer import NAMES as RIVALS

from everstep.recovery import Fetch, FetchRequest, InPlace, RecoveryServer, Snapshot, Transfer
from everstep.recovery.http import ChunksRequest
from everstep.recovery.snapshot import memory_of
from everstep.recovery.wire import suit_one_host

if TYPE_CHECKING:
    from rival_transfer import Receiver

KEY = "bench"
TENSORS = 64
CHUNK = 4 << 20
SLOW_BYTES_S = 64 << 10
DEADLINE_S = 300.0
STEPS = 40


def state_of(mib: int, fill: int = 0) -> dict[str, Any]:
    size = (mib << 20) // TENSORS // 4
    return {"model": {f"layer{i}.weight": torch.full((size,), fill, dtype=torch.int32) for i in range(TENSORS)}}


# ---- donors, each a process of its own


def donate(mib: int, pipe: Any) -> None:
    """Serves the state over a bare socket and over Everstep, and makes steps when it is told to."""
    torch.set_num_threads(1)
    state = state_of(mib, 1)
    plain, tuned = (socket.create_server(("127.0.0.1", 0)) for _ in range(2))
    threading.Thread(target=_serve_bare, args=(plain, state, lambda _: None), daemon=True).start()
    threading.Thread(target=_serve_bare, args=(tuned, state, suit_one_host), daemon=True).start()
    with RecoveryServer() as server, contextlib.closing(GroupDonor()) as over_group:
        url = server.start("127.0.0.1", "127.0.0.1")
        pipe.send((url, plain.getsockname()[1], tuned.getsockname()[1]))
        while (order := pipe.recv()) != "end":
            if order == "offer":
                # A loan of its own for every fetch: its digests have to be computed again.
                server.offer(KEY, Snapshot.lend(state))
            elif isinstance(order, Transfer):
                over_group.offer(state, order)
            elif order == "offer a copy":
                small = {"model": {"w": torch.zeros(64 << 18)}}
                server.offer(KEY, snapshot := Snapshot.take(small))
                pipe.send((snapshot.id, snapshot.chunk_count))
                continue
            elif order == "steps":
                pipe.send(_steps())
                continue
            pipe.send("done")


def _serve_bare(listener: socket.socket, state: dict[str, Any], tune: Callable[[socket.socket], None]) -> None:
    pieces = [memory_of(tensor.view(torch.uint8)) for tensor in state["model"].values()]
    while True:
        connection, _ = listener.accept()
        with connection:
            tune(connection)
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
        self.url, self.bare_port, self.tuned_port = "", 0, 0

    def wait_started(self) -> None:
        self.url, self.bare_port, self.tuned_port = self.say(None)

    def say(self, order: str | Transfer | None) -> Any:
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


def transfers(mib: int, times: int, count: int, rival: "Receiver | None", own: dict[str, Any]) -> dict[str, Any]:
    touched = torch.zeros(mib << 20, dtype=torch.uint8)
    ours = (("one", 1, False), ("donors", count, False), ("one_again", 1, False), ("same_host", 1, True))
    over_group = (("group", 1), ("group_donors", count))
    names = ("bare", "bare_tuned", *(name for name, *_ in (*ours, *over_group)))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    growth: list[float] = []
    with donors(count, mib) as made, GroupJoiner() as joiner:
        urls = [donor.url for donor in made]
        for _ in range(times):
            seconds["bare"].append(_bare(made[0].bare_port, touched))
            seconds["bare_tuned"].append(_bare(made[0].tuned_port, touched))
            for name, used, is_local in ours:
                for donor in made[:used]:
                    donor.say("offer")
                took_s, grown_mib = _fetch(urls[:used], own, is_local=is_local)
                seconds[name].append(took_s)
                growth.append(grown_mib)
            for name, used in over_group:
                _clear(own)
                seconds[name].append(joiner.fetch([donor.say for donor in made[:used]], own))
                _check(own)
            for name in RIVALS if rival is not None else ():
                assert rival is not None
                seconds.setdefault(f"torchft_{name}", []).append(rival.fetch(name))
    return {
        "gb_s": {name: (mib << 20) / statistics.median(took) / 1e9 for name, took in seconds.items()},
        "of_bare": {name: _ratio(seconds["bare"], took) for name, took in seconds.items()},
        "of_tuned": _ratio(seconds["bare_tuned"], seconds["one"]),
        "of_one": _ratio(seconds["one"], seconds["donors"]),
        "of_one_quartiles": _quartiles(seconds["one"], seconds["donors"]),
        "one_again_of_one": _ratio(seconds["one"], seconds["one_again"]),
        "one_again_quartiles": _quartiles(seconds["one"], seconds["one_again"]),
        "of_rival": min(
            (_ratio(took, seconds["one"]) for name, took in seconds.items() if "torchft" in name), default=0
        ),
        "growth_mib": max(growth),
    }


def series(options: argparse.Namespace) -> dict[str, Any]:
    """Rates as shares of one donor's, by mean times: that ratio, and between what 95 of 100 resamplings have it."""
    own, rng = state_of(options.mib), random.Random(1)
    used = {"one": 1, "one_again": 1, "donors": options.donors}
    seconds: dict[str, list[float]] = {name: [] for name in used}
    with donors(options.donors, options.mib) as made:
        for name in rng.sample([*used] * options.series, len(used) * options.series):
            for donor in made[: used[name]]:
                donor.say("offer")
            seconds[name].append(_fetch([donor.url for donor in made[: used[name]]], own, is_local=False)[0])
    one = seconds["one"] + seconds["one_again"]
    compared = {"donors": one, "one_again": seconds["one"]}
    return {name: _mean_ratio(theirs, seconds[name], rng) for name, theirs in compared.items()}


def _mean_ratio(theirs: list[float], ours: list[float], rng: random.Random) -> tuple[float, float, float]:
    drawn = sorted(
        statistics.fmean(rng.choices(theirs, k=len(theirs))) / statistics.fmean(rng.choices(ours, k=len(ours)))
        for _ in range(2000)
    )
    return statistics.fmean(theirs) / statistics.fmean(ours), drawn[50], drawn[1950]


def _ratio(theirs: list[float], ours: list[float]) -> float:
    """How many times as fast, the median over the rounds."""
    return statistics.median(their / our for their, our in zip(theirs, ours, strict=True))


def _quartiles(theirs: list[float], ours: list[float]) -> tuple[float, float]:
    """Of the same: between these are half of the rounds."""
    ratios = [their / our for their, our in zip(theirs, ours, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return low, high


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
    _clear(own)
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
    _check(own)
    return took_s, grown


def _clear(own: dict[str, Any]) -> None:
    for tensor in own["model"].values():
        tensor.zero_()


def _check(own: dict[str, Any]) -> None:
    assert all(tensor[0] == 1 == tensor[-1] for tensor in own["model"].values())


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


def measure(options: argparse.Namespace) -> dict[str, Any]:
    own = state_of(options.mib)
    with contextlib.ExitStack() as stack:
        rival = None
        if options.rival:
            from rival_transfer import receiver

            rival = stack.enter_context(receiver(options.mib, own))
        found = transfers(options.mib, options.times, options.donors, rival, own)
    del own
    return found | {
        "slow_reader": slow_reader(),
        "pause": pauses(options.job_mib, options.times),
        "first_step": first_step.measure(options.times),
    }


def tell(result: dict[str, Any], options: argparse.Namespace) -> None:
    print(f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores; {' '.join(sys.argv)}")
    for name, rate in result["gb_s"].items():
        print(f"{name:>24}  {rate:5.2f} GB/s  {result['of_bare'][name]:5.2f} of bare")
    pause, first = result["pause"], result["first_step"]
    pause_of = f"pause beyond {pause['fetch_ms']:.0f} ms for {options.job_mib} MiB, ms"
    rows = [
        ("one donor, of bare", f"{result['of_bare']['one']:.2f}", "0.85", "0.70"),
        ("the same, of bare tuned", f"{result['of_tuned']:.2f}", "", ""),
        (f"{options.donors} donors, of one", f"{result['of_one']:.2f}", "1.00", "1.00"),
        ("same host, of bare", f"{result['of_bare']['same_host']:.2f}", "1.50", "1.50"),
        ("receiver grew beyond the state, MiB", f"{result['growth_mib']:.0f}", "64", "64"),
        ("donor's step beside a slow reader", f"{result['slow_reader']:.2f}", "1.10", "1.10"),
        (pause_of, f"{pause['beyond_ms']:.0f}", "30", "60"),
        (f"first step beyond {first['torch_s']:.1f} s for torch, s", f"{first['beyond_s']:.2f}", "0.3", "0.6"),
    ]
    if options.rival:
        rows.insert(2, ("one donor, of torchft's best", f"{result['of_rival']:.2f}", "1.00", "0.90"))
    print(f"\n{'':>40}  measured  aim   at least (at most)")
    for what, measured, aim, least in rows:
        print(f"{what:>40}  {measured:>8}  {aim:>4}  {least:>4}")
    print("\nhow much a second measurement of the same differs; half of the rounds are between")
    for what, key, of in (
        (f"{options.donors} donors, of one", "of_one_quartiles", "of_one"),
        ("one donor again, of one", "one_again_quartiles", "one_again_of_one"),
    ):
        low, high = result[key]
        print(f"{what:>40}  {result[of]:>8.2f}  {low:.2f} to {high:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--donors", type=int, default=3)
    parser.add_argument("--job-mib", type=int, default=256, help="state of the job whose survivors' pause is measured")
    parser.add_argument("--with", dest="rival", choices=["torchft"], help="measure it in the same run")
    parser.add_argument("--series", type=int, default=0, help="compare one donor with --donors by so many transfers")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.rival:
        from rival import require

        require()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"benchmark": "live_recovery", "mib": options.mib, "donors": options.donors}
    if options.series:
        found = series(options)
        if options.json:
            print(json.dumps(result | found))
            return
        for what, key in ((f"{options.donors} donors, of one", "donors"), ("one donor again, of one", "one_again")):
            print(f"{what:>24}  {found[key][0]:.2f}  ({found[key][1]:.2f} to {found[key][2]:.2f})")
        return
    result |= measure(options)
    if options.json:
        print(json.dumps(result))
    else:
        tell(result, options)


if __name__ == "__main__":
    main()
