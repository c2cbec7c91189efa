"""`python -m everstep.sim`: run seeds, one line each; a failing seed prints the command that reproduces it."""

import argparse
import dataclasses
import functools
import gc
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable

from everstep.core.replica import Replica
from everstep.sim.rendezvous import RendezvousWorld
from everstep.sim.rendezvous_scale import scale_rounds
from everstep.sim.scale import ScaleWorld
from everstep.sim.world import Outcome, World

SCALE_GROUPS_MIN = 1000  # from here on it is about cost: one quorum, one failure, one join


CHUNK = 100  # seeds that a worker process gets at a time
RunChunk = Callable[[range], tuple[dict[str, int], list[str]]]  # how often each verdict came, and what to say
CHUNK_TIMEOUT_S = 3600.0  # for the worst: a killed process gives no answer
COLLECT_EVERY = 16  # seeds; a world is a few MB


@dataclasses.dataclass(frozen=True)
class Size:
    """Of a schedule: replica groups and ranks of each, both from and to, of which the seed takes one; and steps."""

    groups: tuple[int, int]
    ranks: tuple[int, int]
    steps: int
    agents: bool = False

    def world(self, seed: int, replica_type: type[Replica]) -> World:
        (fewest, most), (few, many) = self.groups, self.ranks
        span = most - fewest + 1
        ranks = few + seed // span % (many - few + 1)
        groups = fewest + seed % span
        return World(seed, groups=groups, steps=self.steps, replica_type=replica_type, ranks=ranks, agents=self.agents)


def _span(text: str) -> tuple[int, int]:
    first, _, last = text.partition(":")
    return int(first), int(last or first)


def main(argv: list[str] | None = None, *, replica_type: type[Replica] = Replica) -> int:
    parser = argparse.ArgumentParser(prog="python -m everstep.sim", description=__doc__)
    parser.add_argument("--seed", type=int, help="run this one and say what happened")
    parser.add_argument("--seeds", help="FROM:TO, run each and say what failed", default="0:100")
    parser.add_argument("--groups", default="2:5", help="replica groups, or FROM:TO, drawn from the seed; default 2:5")
    parser.add_argument("--ranks", default="1", help="of a replica group, or FROM:TO; default 1")
    parser.add_argument("--steps", type=int, default=12, help="of the faulty part; half as many are to go after it")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the seeds")
    parser.add_argument("--trace", action="store_true", help="print every state change")
    parser.add_argument("--agents", action="store_true", help="an agent watches over each process, and fails, too")
    parser.add_argument("--rendezvous", action="store_true", help="nodes that agree on rounds, in place of members")
    parser.add_argument("--nodes", type=int, default=0, help="for --rendezvous; 0 draws 2 to 7 from the seed")
    args = parser.parse_args(argv)
    if args.rendezvous:
        return _run_rendezvous(args)
    groups, ranks = _span(args.groups), _span(args.ranks)
    if groups[0] >= SCALE_GROUPS_MIN:
        return _run_at_scale(groups[0])
    size = Size(groups, ranks, args.steps, args.agents)
    if args.seed is not None:
        return 0 if _run(args.seed, size, args.trace, replica_type).is_ok else 1
    run_chunk = functools.partial(_run_chunk, size=size, replica_type=replica_type, collects=args.jobs == 1)
    return 1 if _run_chunks(run_chunk, args) else 0


def _run_chunks(run_chunk: RunChunk, args: argparse.Namespace) -> int:
    """All of `--seeds` in `--jobs` processes; sums up and says the counts, returns how many lines told of failures."""
    counts: dict[str, int] = {}
    first, last = map(int, args.seeds.split(":"))
    chunks = [range(at, min(at + CHUNK, last)) for at in range(first, last, CHUNK)]
    if args.jobs > 1:
        # A process for each chunk: what a world leaves behind goes with it, which costs less than to free it.
        with multiprocessing.get_context("fork").Pool(args.jobs, maxtasksperchild=1) as pool:
            results = pool.imap(run_chunk, chunks)
            failed = _sum_up((results.next(CHUNK_TIMEOUT_S) for _ in chunks), counts)
    else:
        failed = _sum_up(map(run_chunk, chunks), counts)
    _print_line(f"{last - first} seeds: " + ", ".join(f"{n} {verdict}" for verdict, n in sorted(counts.items())))
    return failed


def _run(seed: int, size: Size, is_traced: bool, replica_type: type[Replica]) -> Outcome:
    world = size.world(seed, replica_type)
    if is_traced:
        world.trace = _print_line
    outcome = world.run()
    _print_line(str(outcome))
    if not outcome.is_ok:
        _print_line(_how_to_reproduce(world))
    return outcome


def _how_to_reproduce(world: World) -> str:
    ranks = f" --ranks {world.ranks}" if world.ranks > 1 else ""
    agents = " --agents" if world.agents.are_there else ""
    size = f"--groups {world.groups}{ranks} --steps {world.steps}{agents}"
    return f"reproduce: python -m everstep.sim --seed {world.seed} {size} --trace"


def _run_chunk(
    seeds: range, *, size: Size, replica_type: type[Replica], collects: bool
) -> tuple[dict[str, int], list[str]]:
    """How often each verdict came, and what to say of the seeds that failed."""
    counts: dict[str, int] = {}
    said: list[str] = []
    gc.disable()  # a world is a web of cycles that lives for one seed
    gc.freeze()  # what was imported is not looked through each time
    for ran, seed in enumerate(seeds):
        world = size.world(seed, replica_type)
        outcome = world.run()
        word = outcome.verdict.split(" ")[0]
        counts[word] = counts.get(word, 0) + 1
        if not outcome.is_ok:
            said += [str(outcome), _how_to_reproduce(world)]
        del world
        if collects and ran % COLLECT_EVERY == COLLECT_EVERY - 1:
            gc.collect()
    if collects:
        gc.unfreeze()
        gc.enable()
    return counts, said


def _sum_up(results: Iterable[tuple[dict[str, int], list[str]]], counts: dict[str, int]) -> int:
    """Says what failed as soon as it is known; returns how many lines that were."""
    failed = 0
    for found, said in results:
        for word, count in found.items():
            counts[word] = counts.get(word, 0) + count
        for line in said:
            _print_line(line)
        failed += len(said)
    return failed


def _run_rendezvous(args: argparse.Namespace) -> int:
    if args.nodes >= SCALE_GROUPS_MIN:
        for call, describe in scale_rounds(args.nodes):
            began_at = time.perf_counter()
            call()
            wall_s = time.perf_counter() - began_at
            _print_line(f"{describe()}, {wall_s:.1f} s wall for all machines together")
        return 0
    if args.seed is not None:
        world = _round_world(args.seed, args.nodes)
        if args.trace:
            world.trace = _print_line
        outcome = world.run()
        _print_line(str(outcome))
        if not outcome.is_ok:
            _print_line(_how_to_reproduce_rounds(args.seed, args.nodes))
        return 0 if outcome.is_ok else 1
    failed = _run_chunks(functools.partial(_run_round_chunk, nodes=args.nodes), args)
    return 1 if failed else 0


def _round_world(seed: int, nodes: int) -> RendezvousWorld:
    return RendezvousWorld(seed, nodes=nodes or 2 + seed % 6)


def _run_round_chunk(seeds: range, *, nodes: int) -> tuple[dict[str, int], list[str]]:
    counts = {"ok": 0, "rounds": 0}
    said: list[str] = []
    for seed in seeds:
        outcome = _round_world(seed, nodes).run()
        counts["rounds"] += outcome.rounds
        counts["ok"] += outcome.is_ok
        if not outcome.is_ok:
            said += [str(outcome), _how_to_reproduce_rounds(seed, nodes)]
    return counts, said


def _how_to_reproduce_rounds(seed: int, nodes: int) -> str:
    return f"reproduce: python -m everstep.sim --rendezvous --seed {seed}{f' --nodes {nodes}' if nodes else ''} --trace"


def _run_at_scale(groups: int) -> int:
    began_at = time.perf_counter()
    for episode in ScaleWorld(groups).run():
        now = time.perf_counter()
        _print_line(
            f"{groups} groups, {episode.name}: {episode.virtual_s * 1e3:.0f} ms virtual, {episode.messages} messages "
            f"({episode.messages / groups:.2f} a group), {now - began_at:.1f} s wall for all machines together"
        )
        began_at = now
    return 0


def _print_line(line: str) -> None:
    sys.stdout.write(line + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
