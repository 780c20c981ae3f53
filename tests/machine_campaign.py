"""State machines over the store and the cache, by the million steps, checked after each one.

    python -m tests.machine_campaign --steps 1000000 --seed 1 --processes 2

Batches are independent: `--seed 1 --batch 37` sees one again. What fails is shrunk by Hypothesis
and printed as the steps that lead there; the first of them has the integer that decides the order
of the background work.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from tests.cache_machine import CacheMachine
from tests.pager_machine import PagerMachine

MACHINES: dict[str, type[RuleBasedStateMachine]] = {"pager": PagerMachine, "cache": CacheMachine}
EXAMPLES = {"pager": 25, "cache": 10}
STEPS = {"pager": 200, "cache": 60}
CACHE_SHARE = 10
"""Every so many batches one is of caches; it has fewer steps and takes as long."""


class Outcome(NamedTuple):
    """Of a batch: steps by rule, what else was seen, and what went wrong."""

    counts: Counter[str]
    seen: Counter[str]
    wrong: str | None


def run(
    machine: type[RuleBasedStateMachine],
    number: int,
    examples: int,
    steps: int,
    shrink: bool = True,
    without: Iterable[str] = (),
) -> Outcome:
    """Examples of a machine, all from one seed.

    Args:
        machine: which.
        number: the seed.
        examples: how many.
        steps: of each, at most.
        shrink: whether to look for the shortest example if one fails.
        without: rules that are left out.
    """
    own = {"counts": Counter(), "seen": Counter(), **dict.fromkeys(without)}
    fresh = type(machine.__name__, (machine,), own)
    phases = [Phase.generate, Phase.shrink] if shrink else [Phase.generate]
    chosen = settings(
        max_examples=examples,
        stateful_step_count=steps,
        phases=phases,
        database=None,
        deadline=None,
        derandomize=False,  # `seed` decides
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    try:
        run_state_machine_as_test(seed(number)(fresh), settings=chosen)
    except Exception as e:
        wrong = "".join(traceback.format_exception(e))
        notes = "\n".join(getattr(e, "__notes__", []))
        return Outcome(fresh.counts, fresh.seen, wrong if notes in wrong else f"{wrong}\n{notes}")
    return Outcome(fresh.counts, fresh.seen, None)


def run_batch(first: int, only: str | None, number: int) -> tuple[int, str, Outcome]:
    """A batch of a campaign."""
    name = only or ("cache" if number % CACHE_SHARE == CACHE_SHARE - 1 else "pager")
    outcome = run(MACHINES[name], first * 1_000_003 + number, EXAMPLES[name], STEPS[name])
    return number, name, outcome


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--machine", choices=MACHINES, help="only this one")
    parser.add_argument("--batch", type=int, help="only this one")
    args = parser.parse_args(argv)
    batch = partial(run_batch, args.seed, args.machine)
    started = time.monotonic()
    if args.batch is not None:
        return follow([batch(args.batch)], args, started)
    if args.processes < 2:
        return follow(map(batch, range(args.steps)), args, started)
    context = multiprocessing.get_context("spawn")
    with context.Pool(args.processes) as pool:
        return follow(pool.imap_unordered(batch, range(args.steps)), args, started)


def follow(
    batches: Iterable[tuple[int, str, Outcome]], args: argparse.Namespace, started: float
) -> int:
    """Add batches up until there are steps enough, or one has failed; the exit status."""
    counts, seen = Counter[str](), Counter[str]()
    for number, name, outcome in batches:
        if outcome.wrong:
            print(outcome.wrong)
            again = f"--seed {args.seed} --batch {number}"
            only = f" --machine {args.machine}" if args.machine else ""
            print(f"again: python -m tests.machine_campaign {again}{only}")
            return 1
        counts.update({f"{name}: {rule}": n for rule, n in outcome.counts.items()})
        seen.update({f"{name}: {what}": n for what, n in outcome.seen.items()})
        total, seconds = counts.total(), time.monotonic() - started
        print(f"{total:,} steps, {seconds:.0f} s, {total / seconds:.0f} a second", flush=True)
        if total >= args.steps:
            break
    print(table("steps", counts), table("seen", seen), sep="\n\n")
    print(f"\nseed {args.seed}: {counts.total():,} steps, every one checked, no violation")
    return 0


def table(title: str, counts: Counter[str]) -> str:
    rows = [f"  {what:<36}{n:>12,}" for what, n in sorted(counts.items())]
    return "\n".join([f"{title}:", *rows])


if __name__ == "__main__":
    sys.exit(main())
