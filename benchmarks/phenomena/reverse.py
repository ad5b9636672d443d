"""Reverse distillation: a model that learnt something, distilled from ones that did not.

    python -m benchmarks.phenomena.reverse --model demo/models/teacher --out new-knowledge

The student is the model that was tuned on right answers; its weak teachers are the model before,
the same tuned as much on answers of its own (see ``new_knowledge``, whose folder this one may
share), and the model before without four of its layers, which answers otherwise. Beforehand
``opdcache compare`` says of the first round's rollouts which of them can be told apart. Afterwards
the curves are compared round by round, on the same held-out prompts.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from opdcache.accuracy import estimate, resampled_means

from .common import (
    Bench,
    Scores,
    accuracy,
    arguments,
    by_round,
    compared,
    opdcache,
    pooled,
    verified,
)
from .damaged import damaged
from .plots import Values, by_panel, lines, save
from .results import written

WEAK = {
    "base": "the model before",
    "idle": "the same tuned on its own answers",
    "pruned": "the model before, without four layers",
}
PAIRS = (("base", "idle"), ("base", "pruned"), ("base", "taught"), ("idle", "taught"))


def preflight(bench: Bench, teachers: Mapping[str, Path]) -> dict[str, Any]:
    """Pairs of teachers on the student's first rollouts."""
    named = {
        n: {"model": str(f), "dtype": bench.asked.dtype} for n, f in teachers.items() if n != "base"
    }
    config = bench.config(teachers["taught"], teachers["base"], rounds=1, references=named)
    bench.run("preflight", config, "rollout", "score")
    part, found = f"{bench.out / 'preflight.yaml'}@0", {}
    for pair in PAIRS:
        of = [part if name == "base" else f"{part}#{name}" for name in pair]
        said = json.loads(opdcache("compare", *of, "--json", fine=(0, 3)))
        found[", ".join(pair)] = said["shared"]
    return found


def apart(one: Scores, other: Scores) -> list[dict[str, float]]:
    """How much more accurate one run's students are than another's, by round, and the interval: a
    bootstrap over the prompts, which are the same."""
    told = list[dict[str, float]]()
    for index in range(sum(key is not None for key in one)):
        both = zip(one[index], other[index], strict=True)
        if any(a.prompt_id != b.prompt_id for a, b in both):
            raise SystemExit("the runs were not asked the same held-out prompts")
        mean_P, other_mean_P = (
            np.array([np.mean(prompt.scores) for prompt in of[index]]) for of in (one, other)
        )
        ahead_P = mean_P - other_mean_P
        told.append(estimate(ahead_P.mean(), resampled_means(ahead_P)).model_dump())
    return told


def main() -> None:
    """Compare, distil, and write ``reverse.json`` and ``.png``."""
    parser = arguments(__doc__)
    parser.set_defaults(rounds=8)
    asked = parser.parse_args()
    bench, runs = Bench(asked), list[dict[str, Any]]()
    taught = bench.taught
    weak = {"base": bench.model, "idle": bench.idle, "pruned": damaged(bench, "base", bench.model)}
    told = preflight(bench, {**weak, "taught": taught})
    scores: dict[str, list[Scores]] = {name: [] for name in weak}
    for seed in asked.seeds:
        for name, teacher in weak.items():
            run = f"reverse-{name}-{seed}"
            bench.run(run, bench.config(taught, teacher, seed))
            scores[name].append(verified(bench.out, run))
            models = compared(scores[name][-1])
            about = {"seed": seed, "teacher": name, "models": models}
            runs.append({**about, **by_round(bench.out, run)})
        every = {name: pooled(of) for name, of in scores.items()}
        less = {name: apart(every["base"], every[name]) for name in ("idle", "pruned")}
        written(bench, "reverse", compare=told, accuracy_of_base_minus=less, runs=runs)
    for pair, shared in told.items():
        print(f"{pair}: {', '.join(one['verdict'] for one in shared)}")
    for one in runs:
        rounds = ", ".join(f"{value:.3f}" for value in accuracy(one))
        print(f"seed {one['seed']} from {one['teacher']}: accuracy by round {rounds}")
    for name, by in less.items():
        ahead = ", ".join("{value:+.3f} [{low:+.3f}, {high:+.3f}]".format(**each) for each in by)
        print(f"base minus {name}, by round: {ahead}")
    panels: dict[str, Callable[[dict[str, Any]], Values]] = {
        "accuracy (avg@4)": accuracy,
        "overlap of the top 16": lambda run: [r["overlap"] for r in run["rounds"]],
        "reverse KL while training (nats)": lambda run: [
            r["reverse_kl_tail"] for r in run["rounds"]
        ],
    }
    curves = by_panel(panels, runs, lambda run: f"teacher: {WEAK[run['teacher']]}")
    save(lines(curves, "policy rounds trained"), bench.out / "reverse.png")


if __name__ == "__main__":
    main()
