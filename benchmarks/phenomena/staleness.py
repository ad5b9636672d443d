"""Training on rollouts and cached scores that are some rounds old.

    python -m benchmarks.phenomena.staleness --model demo/models/teacher --out new-knowledge

Round r of a learner trains on completions that its own policy of round r - lag sampled (of round 0,
where there is none, so that the mean age is less than the lag: it is told); their prompts are drawn
anew each round. All arms start alike, so what policy 0 samples is made once. The teacher is the
model tuned on right answers (see ``new_knowledge``, whose folder this one may share). Told at the
end: the exact reverse KL to the teacher on fresh completions of held-out prompts, the accuracy, and
how stale the tokens were (ESS).

``student_topk`` looks at ids that the round's own policy recorded, so it has a lag of 0 alone.
"""

import os
from typing import Any

from opdcache.jobs.processes import Processes
from opdcache.schemas.rounds import RolloutRound

from .common import (
    Bench,
    arguments,
    by_round,
    compared,
    divergence,
    importable,
    verified,
    weighted,
    written,
)
from .plots import lines, save

LAGS = (0, 1, 2, 4)
SAMPLED = {"support": "sampled", "normalisation": "none"}
LOSSES: dict[str, dict[str, Any]] = {
    "teacher_topk, reverse": {"support": "teacher_topk", "direction": "reverse"},
    "teacher_topk, forward": {"support": "teacher_topk", "direction": "forward"},
    "overlap, reverse": {"support": "overlap", "direction": "reverse"},
    "student_topk, reverse": {"support": "student_topk", "direction": "reverse"},
    "sampled": SAMPLED,
    "sampled, weighted": {**SAMPLED, "importance_cap": 2.0},
}


class Lagged:
    """A learner whose rollouts are of an older policy of its own."""

    def __init__(self, bench: Bench, loss: str, lag: int, seed: int, started: Processes) -> None:
        self._bench, self._lag, self._seed, self._started = bench, lag, seed, started
        self._loss = LOSSES[loss]
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
        file = bench.file(self.name, config | {"evaluation": self._reserved(config)})
        for index in range(asked.rounds):
            self._sample(index)
            for stage in ("rollout", "score", "train"):
                self._command(stage, file, index)

    def end(self) -> dict[str, Any]:
        """The last student on held-out prompts, and the means of its training."""
        bench, name = self._bench, f"{self.name}-end"
        last = self._folder.student_path(bench.asked.rounds)
        config = bench.config(last, self._teacher, rounds=1)
        config["prompts"]["per_round"] = 1
        file = bench.file(name, config)
        self._command("rollout", file, 0)
        student, teacher = compared(verified(bench.out, name))
        metrics, looked = self._folder.metrics(), by_round(bench.out, self.name)
        sampled = (bench.folder(self._sampler(i)) for i in range(bench.asked.rounds))
        sampling_s = sum(one.need(RolloutRound, 0).elapsed_s for one in sampled)
        return {
            "reverse_kl": divergence(bench.out, name)[0],
            "mean_age": sum(min(i, self._lag) for i in range(bench.asked.rounds))
            / bench.asked.rounds,
            "accuracy": student["mean_score"],
            "teacher": teacher["mean_score"],
            "ess": weighted(metrics, "ess"),
            **looked,
            "minutes": round(looked["minutes"] + sampling_s / 60, 1),
        }

    def _sampler(self, index: int) -> str:
        """Name of the run that samples for a round."""
        return f"{self.name}-{index}"

    @staticmethod
    def _reserved(config: dict[str, Any]) -> dict[str, Any]:
        """An evaluation whose prompts are kept from training, and of which one is asked."""
        asked = config["evaluation"] | {"num_prompts": 1, "samples_per_prompt": 1}
        return {key: value for key, value in asked.items() if key != "verifier"}

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
        config["evaluation"] = self._reserved(config)
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
    parser.add_argument("--lags", nargs="+", type=int, default=list(LAGS))
    asked = parser.parse_args()
    bench, runs, started = Bench(asked), list[dict[str, Any]](), Processes(with_vllm=True)
    for seed in asked.seeds:
        for loss in asked.losses:
            for lag in asked.lags if LOSSES[loss]["support"] != "student_topk" else (0,):
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
    panels = {"reverse KL (nats)": "reverse_kl", "ESS": "ess"}
    curves = {
        title: [
            (loss, [run[key] for run in runs if (run["seed"], run["loss"]) == (seed, loss)])
            for seed in asked.seeds
            for loss in asked.losses
        ]
        for title, key in panels.items()
    }
    ticks = [str(lag) for lag in asked.lags]
    save(lines(curves, "lag of the rollouts, rounds", ticks), bench.out / "staleness.png")


if __name__ == "__main__":
    main()
