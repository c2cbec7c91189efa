"""`python -m everstep.sim`: run seeds, one line each; a failing seed prints the command that reproduces it."""

import argparse
import sys
import time

from everstep.core.replica import Replica
from everstep.sim.scale import ScaleWorld
from everstep.sim.world import World

SCALE_GROUPS_MIN = 1000  # from here on it is about cost: one quorum, one failure, one join


def main(argv: list[str] | None = None, *, replica_type: type[Replica] = Replica) -> int:
    parser = argparse.ArgumentParser(prog="python -m everstep.sim", description=__doc__)
    parser.add_argument("--seed", type=int, help="run this one and say what happened")
    parser.add_argument("--seeds", help="FROM:TO, run each and say what failed", default="0:100")
    parser.add_argument("--groups", type=int, default=0, help="replica groups; 0 draws 2 to 5 from the seed")
    parser.add_argument("--steps", type=int, default=12, help="length of the faulty part, and steps to go after it")
    parser.add_argument("--trace", action="store_true", help="print every state change")
    args = parser.parse_args(argv)
    if args.groups >= SCALE_GROUPS_MIN:
        return _run_at_scale(args.groups)
    seeds = [args.seed] if args.seed is not None else range(*map(int, args.seeds.split(":")))
    counts: dict[str, int] = {}
    failed = 0
    for seed in seeds:
        world = World(seed, groups=args.groups or 2 + seed % 4, steps=args.steps, replica_type=replica_type)
        if args.trace:
            world.trace = _print_line
        outcome = world.run()
        counts[outcome.verdict.split(" ")[0]] = counts.get(outcome.verdict.split(" ")[0], 0) + 1
        if args.seed is not None or not outcome.is_ok:
            _print_line(str(outcome))
        if not outcome.is_ok:
            failed += 1
            groups = f" --groups {args.groups}" if args.groups else ""
            _print_line(f"reproduce: python -m everstep.sim --seed {seed}{groups} --steps {args.steps} --trace")
    if args.seed is None:
        _print_line(f"{len(seeds)} seeds: " + ", ".join(f"{n} {verdict}" for verdict, n in sorted(counts.items())))
    return 1 if failed else 0


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
