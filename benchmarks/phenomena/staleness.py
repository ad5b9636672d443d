"""Training on rollouts and cached scores that are some rounds old.

    python -m benchmarks.phenomena.staleness --model demo/models/teacher --out new-knowledge

Round r of a learner trains on completions that its own policy of round r - lag sampled (of round 0,
where there is none, so that the mean age is less than the lag: it is told); their prompts are drawn
anew each round. All arms start alike, so what policy 0 samples is made once. The teacher is the
model tuned on right answers (see ``new_knowledge``, whose folder this one may share). Told at the
end: the exact reverse KL to the teacher on fresh completions of held-out prompts (sampled at the
evaluation's temperature of 0.6), the accuracy, and how stale the tokens were (ESS).

``student_topk`` looks at ids that the round's own policy recorded, so it has a lag of 0 alone.
"""

import os
from collections.abc import Callable
from typing import Any

from opdcache.jobs.processes import Processes
from opdcache.schemas.rounds import RolloutRound

from .common import (
    Bench,
    arguments,
    by_round,
    ended,
    importable,
    reserved,
    weighted,
    written,
)
from .plots import Panel, drawn, save

LAGS = (0, 1, 2, 4)
ENDS = (0, 4)
SAMPLED = {"support": "sampled", "normalisation": "none"}
LOSSES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "teacher_topk, forward": ({"support": "teacher_topk", "direction": "forward"}, LAGS),
    "teacher_topk, reverse": ({"support": "teacher_topk", "direction": "reverse"}, LAGS),
    "overlap, reverse": ({"support": "overlap", "direction": "reverse"}, ENDS),
    "student_topk, reverse": ({"support": "student_topk", "direction": "reverse"}, (0,)),
    "sampled": (SAMPLED, ENDS),
    "sampled, weighted": ({**SAMPLED, "importance_cap": 2.0}, ENDS),
}
"""Loss, and its lags: all of them where a default may follow of it."""


class Lagged:
    """A learner whose rollouts are of an older policy of its own."""

    def __init__(self, bench: Bench, loss: str, lag: int, seed: int, started: Processes) -> None:
        self._bench, self._lag, self._seed, self._started = bench, lag, seed, started
        self._loss, _ = LOSSES[loss]
        self.name = f"lag{lag}-{loss.replace(', ', '-')}-{seed}"
        self._folder = bench.folder(self.name)
        self._sampled = bench.folder(f"{self.name}-sampled")
        self._teacher = bench.taught

    def train(self) -> None:
        """All rounds; what is done is not done again."""
        bench, asked = self._bench, self._bench.asked
        taken = {"from": self._sampled.path.name}
        config = bench.config(bench.model, self._teacher, self._seed, rollouts=taken)
        config["train"]["loss"] = {"k": 16, **self._loss}
        file = bench.file(self.name, config | {"evaluation": reserved(config)})
        for index in range(asked.rounds):
            self._sample(index)
            for stage in ("rollout", "score", "train"):
                self._command(stage, file, index)

    def end(self) -> dict[str, Any]:
        """The last student on held-out prompts, and the means of its training."""
        bench = self._bench
        metrics, looked = self._folder.metrics(), by_round(bench.out, self.name)
        sampled = (bench.folder(self._sampler(i)) for i in range(bench.asked.rounds))
        sampling_s = sum(one.need(RolloutRound, 0).elapsed_s for one in sampled)
        return {
            **ended(bench, self.name, self._teacher),
            "mean_age": sum(min(i, self._lag) for i in range(bench.asked.rounds))
            / bench.asked.rounds,
            "ess": weighted(metrics, "ess"),
            **looked,
            "minutes": round(looked["minutes"] + sampling_s / 60, 1),
        }

    def _sampler(self, index: int) -> str:
        """Name of the run that samples for a round."""
        return f"{self.name}-{index}"

    def _sample(self, index: int) -> None:
        """Pin what the older policy samples as the learner's next round."""
        if self._sampled.find(RolloutRound, index) is not None:
            return
        bench, sampler = self._bench, self._sampler(index)
        age = max(0, index - self._lag)
        policy = self._folder.student_path(age) if age else bench.model
        # A seed a round, so that its prompts are drawn anew.
        config = bench.config(policy, self._teacher, 1000 * self._seed + index, rounds=1)
        config["prompts"]["source"] = config["prompts"]["source"] | {"seed": 1 + self._seed}
        config["evaluation"] = reserved(config)
        self._command("rollout", bench.file(sampler, config), 0)
        sampled = bench.folder(sampler).need(RolloutRound, 0)
        self._sampled.write(sampled.model_copy(update={"round": index}))

    def _command(self, stage: str, file: object, index: int) -> None:
        threads = os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))
        process = self._started.start(
            [stage, str(file), "--round", str(index)],
            {"OMP_NUM_THREADS": threads, **importable()},
        )
        process.join()
        if process.exitcode:
            raise SystemExit(f"opdcache {stage} {file}: exit code {process.exitcode}")


def main() -> None:
    """Train every arm, and write ``staleness.json`` and ``.png``."""
    parser = arguments(__doc__)
    parser.add_argument("--losses", nargs="+", default=list(LOSSES), choices=list(LOSSES))
    parser.set_defaults(rounds=8)
    asked = parser.parse_args()
    bench, runs, started = Bench(asked), list[dict[str, Any]](), Processes(with_vllm=True)
    for seed in asked.seeds:
        for loss in asked.losses:
            for lag in LOSSES[loss][1]:
                arm = Lagged(bench, loss, lag, seed, started)
                arm.train()
                runs.append({"seed": seed, "loss": loss, "lag": lag, **arm.end()})
                written(bench, "staleness", runs=runs)
    for run in runs:
        print(
            f"seed {run['seed']} {run['loss']}, {run['lag']} rounds old ({run['mean_age']:.1f} in "
            f"the mean): reverse KL {run['reverse_kl']:.4f}, accuracy "
            f"{run['accuracy']['value']:.3f}, ESS {run['ess']:.2f}"
        )
    panels: dict[str, Callable[[dict[str, Any]], float]] = {
        "exact reverse KL (nats)": lambda run: run["reverse_kl"],
        "accuracy (avg@4)": lambda run: run["accuracy"]["value"],
        "ESS": lambda run: run["ess"],
    }
    arms = list(dict.fromkeys((run["loss"], run["seed"]) for run in runs))
    of = {arm: [run for run in runs if (run["loss"], run["seed"]) == arm] for arm in arms}
    shown = [
        Panel(
            title,
            "lag of the rollouts, rounds",
            [(arm[0], [r["lag"] for r in of[arm]], [value(r) for r in of[arm]]) for arm in arms],
        )
        for title, value in panels.items()
    ]
    save(drawn(shown), bench.out / "staleness.png")


if __name__ == "__main__":
    main()
