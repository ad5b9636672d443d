"""A teacher that knows something new, and one that does not, distilled into the same student.

    opdcache demo demo
    python -m benchmarks.phenomena.new_knowledge --model demo/models/teacher --out new-knowledge

The student is SmolLM2-135M-Instruct on sums of three terms of one digit, which it mostly fails.
Teacher A is the student tuned on right answers; teacher B is the student tuned as much on answers
of its own. Both distil into the same student on the same prompts for as many rounds, by forward or
reverse KL on the teacher's top 16 with a tail. The gap of both is that to teacher A, on prompts
that nobody was tuned or trained on; intervals are bootstraps over them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .common import (
    Bench,
    Scores,
    accuracy,
    arguments,
    by_round,
    compared,
    pooled,
    verified,
)
from .plots import Values, by_panel, lines, save
from .results import written

SAMPLES = 2
"""Answers a held-out prompt: they are most of what a round samples."""
ENDS = ("value", "low", "high")
ARMS = {"A": "new knowledge", "B": "nothing new"}
DIRECTIONS = ("forward", "reverse")


def arm(bench: Bench, name: str, teacher: Path, seed: int) -> str:
    """Distil a teacher; the run's name."""
    direction = bench.asked.direction
    run = f"{name}-{direction}-{seed}"
    answers = {"samples_per_prompt": SAMPLES}
    config = bench.config(bench.model, teacher, seed, evaluation=answers)
    config["train"]["loss"] |= {"direction": direction}
    bench.run(run, config)
    return run


def main() -> None:
    """Tune the teachers, distil them, and write ``new_knowledge-DIRECTION.json`` and ``.png``."""
    parser = arguments(__doc__)
    parser.add_argument("--direction", choices=DIRECTIONS, default="forward")
    parser.add_argument("--alone", action="store_true", help="teacher A, and no B")
    asked = parser.parse_args()
    bench, runs = Bench(asked), list[dict[str, Any]]()
    teachers = {"A": bench.taught} | ({} if asked.alone else {"B": bench.idle})
    scores: dict[str, list[Scores]] = {name: [] for name in teachers}
    for seed in asked.seeds:
        for name, teacher in teachers.items():
            run = arm(bench, name, teacher, seed)
            own = verified(bench.out, run)
            # The gap of both arms is that to teacher A, who comes first.
            best = own[None] if name == "A" else scores["A"][-1][None]
            scores[name].append({**own, None: best})
            runs.append(
                {
                    "seed": seed,
                    "arm": name,
                    "models": compared(scores[name][-1]),
                    "own_teacher": compared(own)[-1],
                    **by_round(bench.out, run),
                }
            )
        every = {name: compared(pooled(of)) for name, of in scores.items()}
        written(bench, f"new_knowledge-{asked.direction}", pooled=every, runs=runs)
    for one in runs:
        about = f"seed {one['seed']}, teacher {one['arm']} ({ARMS[one['arm']]})"
        print(f"{about}: {said(one['models'])}")
    for name, models in every.items():
        print(f"all seeds, teacher {name} ({ARMS[name]}): {said(models)}")
    draw(bench, runs)


def said(models: list[dict[str, Any]]) -> str:
    """What a student gained by its last round."""
    first, last, best = (models[i]["mean_score"] for i in (0, -2, -1))
    gained = models[-2]["recovery"]
    shares = ("none" if gained[end] is None else f"{gained[end]:.0%}" for end in ENDS)
    return (
        f"accuracy {first['value']:.3f} -> {last['value']:.3f} [{last['low']:.3f}, "
        f"{last['high']:.3f}], teacher A {best['value']:.3f}; gap recovery "
        + "{} [{}, {}]".format(*shares)
    )


def draw(bench: Bench, runs: list[dict[str, Any]]) -> None:
    """A panel of accuracy, and one of each diagnostic, by round."""
    panels: dict[str, Callable[[dict[str, Any]], Values]] = {
        f"accuracy (avg@{SAMPLES})": accuracy,
        "overlap of the top 16": lambda run: [r["overlap"] for r in run["rounds"]],
        "student's mass on it": lambda run: [r["overlap_mass_student"] for r in run["rounds"]],
        "entropy gap (nats)": lambda run: [r["entropy_gap"] for r in run["rounds"]],
    }
    curves = by_panel(panels, runs, lambda run: f"teacher {run['arm']}: {ARMS[run['arm']]}")
    file = bench.out / f"new_knowledge-{bench.asked.direction}.png"
    save(lines(curves, "policy rounds trained"), file)


if __name__ == "__main__":
    main()
