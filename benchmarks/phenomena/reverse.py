"""Reverse distillation: a model that learnt something, distilled from two that did not.

    python -m benchmarks.phenomena.reverse --model demo/models/teacher --out new-knowledge

The student is the model that was tuned on right answers; its teachers are the model before, and the
same tuned as much on answers of its own (see ``new_knowledge``, whose folder this one may share).
Beforehand ``opdcache compare`` says of the first round's rollouts whether the two weak teachers can
be told apart, and whether the strong one can be told from the first of them.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .common import Bench, accuracy, arguments, by_round, compared, opdcache, verified, written
from .plots import Values, by_panel, lines, save

WEAK = {"base": "the model before", "idle": "tuned on its own answers"}


def preflight(bench: Bench, teachers: dict[str, Path]) -> dict[str, Any]:
    """Pairs of teachers on the student's first rollouts."""
    named = {
        n: {"model": str(f), "dtype": bench.asked.dtype} for n, f in teachers.items() if n != "base"
    }
    config = bench.config(teachers["taught"], teachers["base"], rounds=1, references=named)
    bench.run("preflight", config, "rollout", "score")
    one, found = f"{bench.out / 'preflight.yaml'}@0", {}
    for name in named:
        said = json.loads(opdcache("compare", one, f"{one}#{name}", "--json", fine=(0, 3)))
        found[f"base, {name}"] = said["shared"]
    return found


def main() -> None:
    """Compare, distil, and write ``reverse.json`` and ``.png``."""
    asked = arguments(__doc__).parse_args()
    bench, runs = Bench(asked), list[dict[str, Any]]()
    taught, idle = bench.taught, bench.idle
    told = preflight(bench, {"base": bench.model, "idle": idle, "taught": taught})
    for seed in asked.seeds:
        for name, teacher in {"base": bench.model, "idle": idle}.items():
            run = f"reverse-{name}-{seed}"
            bench.run(run, bench.config(taught, teacher, seed))
            models = compared(verified(bench.out, run))
            about = {"seed": seed, "teacher": name, "models": models}
            runs.append({**about, **by_round(bench.out, run)})
        written(bench, "reverse", compare=told, runs=runs)
    for pair, shared in told.items():
        print(f"{pair}: {', '.join(one['verdict'] for one in shared)}")
    for one in runs:
        rounds = ", ".join(f"{value:.3f}" for value in accuracy(one))
        print(f"seed {one['seed']} from {one['teacher']}: accuracy by round {rounds}")
    panels: dict[str, Callable[[dict[str, Any]], Values]] = {
        "accuracy (avg@4)": accuracy,
        "overlap of the top 16": lambda run: [r["overlap"] for r in run["rounds"]],
        "reverse KL while training (nats)": lambda run: [
            r["reverse_kl_tail"] for r in run["rounds"]
        ],
    }
    curves = by_panel(panels, runs, lambda run: f"from {WEAK[run['teacher']]}")
    save(lines(curves, "policy rounds trained"), bench.out / "reverse.png")


if __name__ == "__main__":
    main()
