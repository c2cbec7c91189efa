"""`python -m everstep.sim`: run seeds, one line each; a failing seed prints the command that reproduces it."""

import argparse
import concurrent.futures
import functools
import gc
import sys
import time
from collections.abc import Iterable

from everstep.core.replica import Replica
from everstep.sim.scale import ScaleWorld
from everstep.sim.world import Outcome, World

SCALE_GROUPS_MIN = 1000  # from here on it is about cost: one quorum, one failure, one join


CHUNK = 100  # seeds that a worker process gets at a time


def main(argv: list[str] | None = None, *, replica_type: type[Replica] = Replica) -> int:
    parser = argparse.ArgumentParser(prog="python -m everstep.sim", description=__doc__)
    parser.add_argument("--seed", type=int, help="run this one and say what happened")
    parser.add_argument("--seeds", help="FROM:TO, run each and say what failed", default="0:100")
    parser.add_argument("--groups", default="2:5", help="replica groups, or FROM:TO, drawn from the seed; default 2:5")
    parser.add_argument("--steps", type=int, default=12, help="length of the faulty part, and steps to go after it")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the seeds")
    parser.add_argument("--trace", action="store_true", help="print every state change")
    args = parser.parse_args(argv)
    fewest, _, most = args.groups.partition(":")
    groups = (int(fewest), int(most or fewest))
    if groups[0] >= SCALE_GROUPS_MIN:
        return _run_at_scale(groups[0])
    if args.seed is not None:
        return 0 if _run(args.seed, groups, args.steps, args.trace, replica_type).is_ok else 1
    first, last = map(int, args.seeds.split(":"))
    chunks = [range(at, min(at + CHUNK, last)) for at in range(first, last, CHUNK)]
    run_chunk = functools.partial(_run_chunk, groups=groups, steps=args.steps, replica_type=replica_type)
    counts: dict[str, int] = {}
    if args.jobs > 1:
        with concurrent.futures.ProcessPoolExecutor(args.jobs) as pool:
            failed = _sum_up(pool.map(run_chunk, chunks), counts)
    else:
        failed = _sum_up(map(run_chunk, chunks), counts)
    _print_line(f"{last - first} seeds: " + ", ".join(f"{n} {verdict}" for verdict, n in sorted(counts.items())))
    return 1 if failed else 0


def _run(seed: int, groups: tuple[int, int], steps: int, is_traced: bool, replica_type: type[Replica]) -> Outcome:
    fewest, most = groups
    number = fewest + seed % (most - fewest + 1)
    world = World(seed, groups=number, steps=steps, replica_type=replica_type)
    if is_traced:
        world.trace = _print_line
    outcome = world.run()
    _print_line(str(outcome))
    if not outcome.is_ok:
        _print_line(_how_to_reproduce(seed, number, steps))
    return outcome


def _how_to_reproduce(seed: int, groups: int, steps: int) -> str:
    return f"reproduce: python -m everstep.sim --seed {seed} --groups {groups} --steps {steps} --trace"


def _run_chunk(
    seeds: range, *, groups: tuple[int, int], steps: int, replica_type: type[Replica]
) -> tuple[dict[str, int], list[str]]:
    """How often each verdict came, and what to say of the seeds that failed."""
    fewest, most = groups
    counts: dict[str, int] = {}
    said: list[str] = []
    gc.disable()  # a world is a web of cycles that lives for one seed
    for seed in seeds:
        number = fewest + seed % (most - fewest + 1)
        outcome = World(seed, groups=number, steps=steps, replica_type=replica_type).run()
        word = outcome.verdict.split(" ")[0]
        counts[word] = counts.get(word, 0) + 1
        if not outcome.is_ok:
            said += [str(outcome), _how_to_reproduce(seed, number, steps)]
        gc.collect()
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
