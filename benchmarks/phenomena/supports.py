"""Which ids the loss looks at, and how many.

    python -m benchmarks.phenomena.supports --model demo/models/teacher --out new-knowledge

The policy gradient of the paper's public code on five supports at k = 16, on the student's top k
for k of 1, 4 and 64, and on the sampled token alone. The teacher is the model tuned on right
answers (see ``new_knowledge``, whose folder this one may share).
"""

from collections.abc import Callable
from typing import Any

from .common import Bench, arguments, by_round, compared, divergence, verified, written
from .plots import Values, by_panel, lines, save

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
    config = bench.config(bench.model, bench.taught, seed, rollout={"student_topk": max(KS)})
    config["train"]["loss"] = LOSSES[loss]
    bench.run(run, config)
    return run


def main() -> None:
    """Distil by every loss, and write ``supports.json`` and ``.png``."""
    parser = arguments(__doc__)
    parser.add_argument("--losses", nargs="+", default=list(LOSSES), choices=list(LOSSES))
    asked = parser.parse_args()
    bench, runs = Bench(asked), list[dict[str, Any]]()
    for seed in asked.seeds:
        for loss in asked.losses:
            run = arm(bench, loss, seed)
            metrics = bench.folder(run).metrics()
            runs.append(
                {
                    "seed": seed,
                    "loss": loss,
                    "models": compared(verified(bench.out, run)),
                    "reverse_kl": divergence(bench.out, run),
                    "grad_norm": [row["grad_norm"] for row in metrics],
                    **by_round(bench.out, run),
                }
            )
            written(bench, "supports", runs=runs)
    for one in runs:
        last = one["models"][-2]["mean_score"]
        print(
            f"seed {one['seed']} {one['loss']}: accuracy {last['value']:.3f} "
            f"[{last['low']:.3f}, {last['high']:.3f}], reverse KL {one['reverse_kl'][-1]:.4f}, "
            f"largest gradient {max(one['grad_norm']):.1f}"
        )
    panels: dict[str, Callable[[dict[str, Any]], Values]] = {
        "accuracy (avg@4)": lambda of: [m["mean_score"]["value"] for m in of["models"][:-1]],
        "exact reverse KL (nats)": lambda of: of["reverse_kl"],
        "overlap of the top 16": lambda of: [r["overlap"] for r in of["rounds"]],
    }
    curves = by_panel(panels, runs, lambda run: str(run["loss"]))
    save(lines(curves, "policy rounds trained"), bench.out / "supports.png")


if __name__ == "__main__":
    main()
