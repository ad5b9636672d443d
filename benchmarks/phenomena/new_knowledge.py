"""A teacher that knows something new, and one that does not, distilled into the same student.

    opdcache demo demo
    python -m benchmarks.phenomena.new_knowledge --model demo/models/teacher --out new-knowledge

The student is SmolLM2-135M-Instruct on sums of three digits, which it mostly fails. Teacher A is
the student tuned on right answers; teacher B is the student tuned as much on answers of its own.
Both distil into the same student on the same prompts for as many rounds. The gap of both is that to
teacher A, on prompts that nobody was tuned or trained on; intervals are bootstraps over them.
"""

import json
from typing import Any

from .common import Bench, Clock, arguments, by_round, compared, verified
from .plots import lines, save

ARMS = {"A": "new knowledge", "B": "nothing new"}


def arm(bench: Bench, name: str, teacher: Any, seed: int) -> str:
    """Distil a teacher; the run's name."""
    run = f"{name}-{seed}"
    bench.run(run, bench.config(bench.model, teacher, seed))
    return run


def main() -> None:
    """Tune the teachers, distil them, and write ``new_knowledge.json`` and ``.png``."""
    asked = arguments(__doc__).parse_args()
    bench, clock, results = Bench(asked), Clock(), []
    teachers = {"A": bench.taught(), "B": bench.idle()}
    tuning_minutes = clock.minutes
    for seed in asked.seeds:
        clock, found = Clock(), {}
        for name, teacher in teachers.items():
            run = arm(bench, name, teacher, seed)
            found[name] = (*verified(bench.out, run), by_round(bench.out, run))
        best = found["A"][1].prompts
        for name, (scores, own, rounds) in found.items():
            *students, _ = compared(scores, best)
            results.append(
                {
                    "seed": seed,
                    "arm": name,
                    "students": [one.model_dump(mode="json") for one in students],
                    "teacher": compared(scores, own.prompts)[-1].model_dump(mode="json"),
                    "rounds": rounds,
                }
            )
        results[-1]["minutes"] = clock.minutes
        whole = {"arguments": {k: str(v) for k, v in vars(asked).items()}}
        whole |= {"tuning_minutes": tuning_minutes, "runs": results}
        (bench.out / "new_knowledge.json").write_text(json.dumps(whole, indent=1) + "\n")
    report(bench, results)


def report(bench: Bench, results: list[dict[str, Any]]) -> None:
    """Print the last rounds, and draw all of them."""
    for run in results:
        first, last = run["students"][0], run["students"][-1]
        gained, ends = last["recovery"], ("value", "low", "high")
        print(
            f"seed {run['seed']} teacher {run['arm']} ({ARMS[run['arm']]}): "
            f"accuracy {first['mean_score']['value']:.3f} -> {last['mean_score']['value']:.3f}, "
            f"teacher {run['teacher']['mean_score']['value']:.3f}; gap recovery "
            + "{:.0%} [{:.0%}, {:.0%}]".format(*(gained[end] for end in ends))
        )
    panels = {
        "accuracy (avg@4)": lambda run: [s["mean_score"]["value"] for s in run["students"]],
        "overlap of the top 16": lambda run: [r["overlap"] for r in run["rounds"]],
        "student's mass on it": lambda run: [r["overlap_mass_student"] for r in run["rounds"]],
        "entropy gap (nats)": lambda run: [r["entropy_gap"] for r in run["rounds"]],
    }
    curves = {
        title: [(f"teacher {run['arm']}: {ARMS[run['arm']]}", of(run)) for run in results]
        for title, of in panels.items()
    }
    save(lines(curves, "policy rounds trained"), bench.out / "new_knowledge.png")


if __name__ == "__main__":
    main()
