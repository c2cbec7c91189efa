"""How fast nodes agree on a round: this rendezvous beside torch's c10d backend, in one run, by torch's own interface.

    python bench/rendezvous.py [--nodes 64] [--times 5] [--torch-times 1] [--without-torch] [--json]

Each node is a process of its own, forked from one that has imported torch, so that importing counts on neither side.
Join: from the instant at which all are let go until the last has its rank. Loss: one of 4 is killed by SIGKILL, the
others call `next_rendezvous` at once, as their workers fail; until the last of them has its new rank. Milliseconds,
min / median / max.
"""

import argparse
import contextlib
import json
import logging
import os
import platform
import select
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler as create_c10d

from everstep.integrations.torchrun import create_handler

START_S = 30.0
DEADLINE_S = 180.0
HOST = "127.0.0.1"


class Node:
    """A forked process that does what it is told, a line at a time, and says when it has done it."""

    def __init__(self, backend: str, params: dict[str, Any]) -> None:
        commands, self._commands = os.pipe()
        self.results, results = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._commands)
            os.close(self.results)
            try:
                _serve(backend, params, commands, results)
            finally:
                os._exit(0)
        os.close(commands)
        os.close(results)

    def tell(self, command: bytes) -> None:
        os.write(self._commands, command)

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._commands)
        os.close(self.results)


def _serve(backend: str, params: dict[str, Any], commands: int, results: int) -> None:
    logging.disable(logging.CRITICAL)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    parameters = RendezvousParameters(backend=backend, **params)
    handler = None
    while os.read(commands, 1) == b"n":
        if handler is None:
            handler = create_handler(parameters) if backend == "everstep" else _c10d(parameters)
        info = handler.next_rendezvous()
        said = {"rank": info.rank, "size": info.world_size, "at": time.monotonic()}
        os.write(results, json.dumps(said).encode().ljust(128))


def _c10d(parameters: RendezvousParameters) -> Any:
    backend, store = create_backend(parameters)
    return create_c10d(store, backend, parameters)


def _round(nodes: list[Node], size: int) -> float:
    """Let them go; milliseconds until the last has its rank. Ranks must be unique."""
    began_at = time.monotonic()
    for node in nodes:
        node.tell(b"n")
    said = []
    waiting = {node.results for node in nodes}
    while waiting:
        ready, _, _ = select.select(list(waiting), [], [], began_at + DEADLINE_S - time.monotonic())
        if not ready:
            raise SystemExit(f"{len(waiting)} of {len(nodes)} nodes had no rank after {DEADLINE_S:g} s")
        for fd in ready:
            line = os.read(fd, 128)
            if not line:
                raise SystemExit("a node ended")
            said.append(json.loads(line))
            waiting.discard(fd)
    assert sorted(row["rank"] for row in said) == list(range(size)), said
    return 1e3 * (max(row["at"] for row in said) - began_at)


class Rounds:
    """Rendezvous after rendezvous, each with an id of its own."""

    def __init__(self, backend: str, endpoint: str) -> None:
        self.backend = backend
        self._endpoint = endpoint
        self._count = 0

    def _nodes(self, count: int, least: int) -> list[Node]:
        self._count += 1
        endpoint = self._endpoint or f"{HOST}:{_free_port()}"
        params = {"endpoint": endpoint, "run_id": f"bench{self._count}", "min_nodes": least, "max_nodes": count}
        hosts = [{"is_host": str(i == 0).lower()} if self.backend == "c10d" else {} for i in range(count)]
        return [Node(self.backend, {**params, "local_addr": HOST, **hosts[i]}) for i in range(count)]

    def join(self, count: int) -> float:
        nodes = self._nodes(count, count)
        try:
            return _round(nodes, count)
        finally:
            for node in nodes:
                node.end()

    def lose_one(self, count: int = 4) -> float:
        nodes = self._nodes(count, 1)
        try:
            _round(nodes, count)
            os.kill(nodes[-1].pid, signal.SIGKILL)  # not the first: c10d would lose its store with it
            return _round(nodes[:-1], count - 1)
        finally:
            for node in nodes:
                node.end()


@contextlib.contextmanager
def lighthouse() -> Iterator[str]:
    command = [sys.executable, "-m", "everstep.cli", "lighthouse", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], START_S)
        if not ready:
            raise SystemExit(f"the lighthouse did not start within {START_S:g} s")
        yield process.stdout.readline().rpartition(" ")[2].strip()
    finally:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def measure(nodes: int, times: int, torch_times: int) -> dict[str, dict[str, list[float]]]:
    found: dict[str, dict[str, list[float]]] = {}
    with lighthouse() as endpoint:
        for rounds, repeats in ((Rounds("everstep", endpoint), times), (Rounds("c10d", ""), torch_times)):
            if repeats:
                found[rounds.backend] = {
                    "join_ms": _three([rounds.join(nodes) for _ in range(repeats)]),
                    "loss_ms": _three([rounds.lose_one() for _ in range(repeats)]),
                }
    return found


def _three(values: list[float]) -> list[float]:
    return [round(value, 1) for value in (min(values), statistics.median(values), max(values))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=64)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--torch-times", type=int, default=1)
    parser.add_argument("--without-torch", action="store_true", help="leave the c10d backend out")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = measure(args.nodes, args.times, 0 if args.without_torch else args.torch_times)
    result = {"nodes": args.nodes, "cores": os.cpu_count(), "torch": torch.__version__, **found}
    if args.json:
        print(json.dumps(result))
        return
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}; ms, min / median / max")
    for backend, rows in found.items():
        print(
            f"{backend:10} {args.nodes} nodes join {_shown(rows['join_ms'])}   one of 4 lost {_shown(rows['loss_ms'])}"
        )


def _shown(three: list[float]) -> str:
    return " / ".join(f"{value:.0f}" for value in three)


if __name__ == "__main__":
    main()
