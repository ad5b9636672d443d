"""Which ids the loss looks at, and how many.

    python -m benchmarks.phenomena.supports --model demo/models/teacher --out new-knowledge

The policy gradient of the paper's public code (normalisation ``reference``) on five supports at
k = 16, on the student's top k for k of 1, 4 and 64, and on the sampled token alone. The teacher is
the model tuned on right answers (see ``new_knowledge``, whose folder this one may share). All begin
from the student after ``--begin`` rounds of forward KL from it: from the model itself, reverse KL
stands still for as many rounds as this takes. Told at the end: the exact reverse KL to the teacher
on fresh completions of held-out prompts (temperature 0.6), and the accuracy; by round: the accuracy
and overlap of its rollouts, the student's entropy in the mean over the updates, and the largest
gradient, before clipping.
"""

from collections.abc import Callable
from typing import Any

from .common import (
    BEGIN,
    LATER,
    VERIFIER,
    Bench,
    anew,
    arguments,
    beginning,
    begun,
    by_round,
    ended,
)
from .plots import Values, by_panel, lines, save
from .results import Rows

FORM = {"direction": "reverse", "normalisation": "reference"}
SUPPORTS = ("overlap", "student_topk", "teacher_topk", "union", "symmetric_difference")
KS = (1, 4, 64)
LOSSES: dict[str, dict[str, Any]] = {
    **{f"{support}, k = 16": {"support": support, "k": 16, **FORM} for support in SUPPORTS},
    **{f"student_topk, k = {k}": {"support": "student_topk", "k": k, **FORM} for k in KS},
    "sampled": {"support": "sampled", "normalisation": "none"},
}


def arm(bench: Bench, loss: str, seed: int) -> str:
    """Distil by a loss; the run's name."""
    run = f"{loss.replace(', k = ', '-')}-{seed}"
    student = beginning(bench, seed, bench.asked.begin)[-1]
    config = anew(bench, student, seed, LATER, rollout={"student_topk": max(KS)})
    config["train"]["loss"] = LOSSES[loss]
    bench.run(run, config)
    return run


def main() -> None:
    """Distil by every loss, and write ``supports.json`` and ``.png``."""
    parser = arguments(__doc__)
    parser.add_argument("--begin", type=int, default=8, help=BEGIN)
    parser.add_argument("--losses", nargs="+", default=list(LOSSES), choices=list(LOSSES))
    parser.set_defaults(rounds=8)
    asked = parser.parse_args()
    bench = Bench(asked)
    rows = Rows(bench, "supports", "seed", "loss")
    for seed in asked.seeds:
        for loss in asked.losses:
            run = arm(bench, loss, seed)
            rows.add(
                {
                    "seed": seed,
                    "loss": loss,
                    **ended(bench, run, bench.taught, asked.rounds),
                    **by_round(bench.out, run, VERIFIER),
                }
            )
        rows.begin(seed, begun(bench, seed, asked.begin))
    for one in rows.runs:
        last = one["accuracy"]
        print(
            f"seed {one['seed']} {one['loss']}: accuracy {last['value']:.3f} "
            f"[{last['low']:.3f}, {last['high']:.3f}], reverse KL {one['reverse_kl']:.4f}, "
            f"largest gradient {max(r['largest_gradient'] for r in one['rounds']):.1f}"
        )
    panels: dict[str, Callable[[dict[str, Any]], Values]] = {
        "accuracy of the rollouts": lambda of: [r["accuracy"] for r in of["rounds"]],
        "overlap of the top 16": lambda of: [r["overlap"] for r in of["rounds"]],
        "student's entropy (nats)": lambda of: [r["student_entropy"] for r in of["rounds"]],
        "largest gradient of a round": lambda of: [r["largest_gradient"] for r in of["rounds"]],
    }
    curves = by_panel(panels, rows.runs, lambda run: str(run["loss"]))
    save(lines(curves, "policy round"), bench.out / "supports.png")


if __name__ == "__main__":
    main()
