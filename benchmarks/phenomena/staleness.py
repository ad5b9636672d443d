"""Training on rollouts and cached scores that are some rounds old.

    python -m benchmarks.phenomena.staleness --model demo/models/teacher --out new-knowledge

All arms begin from the student after ``--begin`` rounds of forward KL from the model tuned on right
answers (see ``new_knowledge``, whose folder this one may share), which is their teacher too.

*Lagged*: round r trains on completions that the policy of round r - lag sampled, and on no others.
The policies before the first round are those of the beginning; with ``--begin 0`` there are none,
and the model itself stands for them, so that the mean age is less than the lag. The prompts are
drawn anew each round. *Replayed*: round r trains on its own completions and on those of the n
rounds before it (``max_staleness: n``), each round sampling one of n + 1 parts: about as many
updates, from so much fewer teacher tokens; and, beside it, the same tokens without their replay.

Told at the end: the exact reverse KL to the teacher on fresh completions of held-out prompts
(sampled at the evaluation's temperature of 0.6), the accuracy, and how stale the tokens were (ESS:
of a batch, as the student moves within the round, so that a lag of 0 is not at 1). ``overlap`` in
the JSON is that of the policy that sampled. ``student_topk`` looks at ids that the round's own
policy recorded: older ones are refused, so it has a lag of 0 alone.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from shutil import rmtree
from typing import Any, ClassVar

from matplotlib.figure import Figure

from opdcache.jobs.processes import Processes
from opdcache.jobs.ranks import threads_each
from opdcache.runfolder import RunFolder
from opdcache.schemas.rounds import RolloutRound

from .common import (
    BEGIN,
    LATER,
    Bench,
    anew,
    arguments,
    beginning,
    begun,
    by_round,
    ended,
    importable,
    weighted,
)
from .plots import Panel, aligned, drawn, save, values
from .results import Rows

LAGS = (0, 1, 2, 4)
ENDS = (0, 4)
REPLAYS = (1, 3)
SAMPLED = {"support": "sampled", "normalisation": "none"}
LOSSES: dict[str, tuple[dict[str, Any], tuple[int, ...], tuple[int, ...]]] = {
    "teacher_topk, forward": ({"support": "teacher_topk", "direction": "forward"}, LAGS, REPLAYS),
    "teacher_topk, reverse": ({"support": "teacher_topk", "direction": "reverse"}, LAGS, REPLAYS),
    "sampled": (SAMPLED, ENDS, ()),
    "sampled, weighted": ({**SAMPLED, "importance_cap": 2.0}, ENDS, ()),
    "overlap, reverse": ({"support": "overlap", "direction": "reverse"}, ENDS, ()),
    "overlap, forward": ({"support": "overlap", "direction": "forward"}, (0,), ()),
    "student_topk, reverse": ({"support": "student_topk", "direction": "reverse"}, (0,), ()),
}
"""Loss, its lags, and how many rounds before it replays."""


@dataclass(frozen=True)
class Arm:
    """A learner, and the policies before its first round, the oldest first.

    Attributes:
        age: its lag, or the rounds before that it replays.
    """

    bench: Bench
    before: Sequence[Path]
    loss: str
    age: int
    seed: int
    KIND: ClassVar[str]

    @property
    def name(self) -> str:
        """The learner's run."""
        after = f"-after{len(self.before) - 1}" if len(self.before) > 1 else ""
        return f"{self.KIND}{self.age}-{self.loss.replace(', ', '-')}-{self.seed}{after}"

    @property
    def folder(self) -> RunFolder:
        """The learner's run."""
        return self.bench.folder(self.name)

    def config(self, policy: Path, order: int, **parts: Any) -> dict[str, Any]:
        """A run from a policy, on the prompts in an order of its own."""
        config = anew(self.bench, policy, self.seed, order, **parts)
        config["train"]["loss"] = {"k": 16, **LOSSES[self.loss][0]}
        return config

    def ages(self, index: int) -> Sequence[int]:
        """Of the rollouts that a round trains on."""
        raise NotImplementedError

    def end(self) -> dict[str, Any]:
        """The last student on held-out prompts, and the means of its training."""
        bench, metrics, folder = self.bench, self.folder.metrics(), self.folder
        rounds = range(bench.asked.rounds)
        ages = [age for index in rounds for age in self.ages(index)]
        sampled = [folder.need(RolloutRound, index) for index in rounds]
        return {
            "seed": self.seed,
            "loss": self.loss,
            self.KIND: self.age,
            **ended(bench, self.name, bench.taught, bench.asked.rounds),
            "mean_age": sum(ages) / len(ages),
            "ess": weighted(metrics, "ess"),
            "updates": len(metrics),
            "teacher_tokens": sum(shard.num_tokens for one in sampled for shard in one.shards),
            **by_round(bench.out, self.name),
        }


@dataclass(frozen=True)
class Replayed(Arm):
    """A learner of smaller rounds that trains on the rollouts of the rounds before it too.

    Attributes:
        parts: a round samples one of so many.
    """

    KIND = "replayed"
    parts: int

    @property
    def name(self) -> str:
        """The learner's run."""
        return super().name + (f"-of{self.parts}" if self.parts != self.age + 1 else "")

    def train(self, started: Processes) -> None:
        """All rounds."""
        prompts = {"per_round": self.bench.asked.prompts // self.parts}
        config = self.config(self.before[-1], LATER, prompts=prompts)
        config["train"]["max_staleness"] = self.age
        self.bench.run(self.name, config)

    def ages(self, index: int) -> Sequence[int]:
        """Of the rollouts that a round trains on: equally many of each."""
        return range(min(index, self.age) + 1)

    def end(self) -> dict[str, Any]:
        """The last student on held-out prompts, and the means of its training."""
        return {**super().end(), "parts": self.parts}


@dataclass(frozen=True)
class Lagged(Arm):
    """A learner whose rollouts are of an older policy of its own."""

    KIND = "lag"

    def train(self, started: Processes) -> None:
        """All rounds; what is done is not done again."""
        config = self.config(self.before[-1], 0, rollouts={"from": self._sampled.path.name})
        # The samplers keep held-out prompts from the rollouts.
        file = self.bench.file(self.name, config | {"evaluation": None})
        for index in range(self.bench.asked.rounds):
            self._sample(started, index)
            for stage in ("rollout", "score", "train"):
                _command(started, stage, file, index)
        rmtree(self.folder.checkpoints, ignore_errors=True)

    def ages(self, index: int) -> Sequence[int]:
        """Of the rollouts that a round trains on."""
        return [min(index + len(self.before) - 1, self.age)]

    def end(self) -> dict[str, Any]:
        """The last student on held-out prompts, and the means of its training."""
        samplers = (self.bench.folder(self._sampler(i)) for i in range(self.bench.asked.rounds))
        sampling_s = sum(one.need(RolloutRound, 0).elapsed_s for one in samplers)
        told = super().end()
        return {**told, "minutes": round(told["minutes"] + sampling_s / 60, 1)}

    @property
    def _sampled(self) -> RunFolder:
        """Where the learner takes its rollouts from."""
        return self.bench.folder(f"{self.name}-sampled")

    def _sampler(self, index: int) -> str:
        """Name of the run that samples for a round."""
        return f"{self.name}-{index}"

    def _policy(self, index: int) -> Path:
        """The policy that samples for a round."""
        number = index - self.age
        if number > 0:
            return self.folder.student_path(number)
        return self.before[max(0, len(self.before) - 1 + number)]

    def _sample(self, started: Processes, index: int) -> None:
        """Pin what the older policy samples as the learner's next round."""
        if self._sampled.find(RolloutRound, index) is not None:
            return
        sampler = self._sampler(index)
        config = self.config(self._policy(index), index, rounds=1)
        _command(started, "rollout", self.bench.file(sampler, config), 0)
        sampled = self.bench.folder(sampler).need(RolloutRound, 0)
        self._sampled.write(sampled.model_copy(update={"round": index}))


def _command(started: Processes, stage: str, file: Path, index: int) -> None:
    threads = os.environ.get("OMP_NUM_THREADS", str(threads_each(1)))
    process = started.start(
        [stage, str(file), "--round", str(index)],
        {"OMP_NUM_THREADS": threads, **importable()},
    )
    process.join()
    if process.exitcode:
        raise SystemExit(f"opdcache {stage} {file}: exit code {process.exitcode}")


KINDS = (Lagged.KIND, Replayed.KIND)


def arms(bench: Bench, seed: int) -> Iterator[Lagged | Replayed]:
    """What is trained of a seed, as it was asked for."""
    asked = bench.asked
    before = beginning(bench, seed, asked.begin)
    for loss in asked.losses:
        _, lags, replays = LOSSES[loss]
        yield from (Lagged(bench, before, loss, n, seed) for n in lags if n in asked.lags)
        for n in (n for n in replays if n in asked.replays):
            yield from (Replayed(bench, before, loss, age, seed, n + 1) for age in (n, 0))


def picture(runs: Sequence[dict[str, Any]]) -> Figure:
    """The ends by the rollouts' mean age."""
    panels: dict[str, Callable[[dict[str, Any]], float]] = {
        "exact reverse KL (nats)": lambda run: run["reverse_kl"],
        "accuracy (avg@4)": lambda run: run["accuracy"]["value"],
        "ESS": lambda run: run["ess"],
    }
    named = [
        (f"{run['loss']}, 1/{run['parts']} of the tokens", run["replayed"], run)
        if "parts" in run
        else (run["loss"], run["lag"], run)
        for run in runs
    ]
    of = aligned([((name, run["seed"]), age, run) for name, age, run in named])
    across = "mean age of the rollouts, rounds"
    return drawn(
        [
            Panel(
                title,
                across,
                [
                    (name, values(rows, itemgetter("mean_age")), values(rows, value))
                    for (name, _), rows in of.items()
                ],
            )
            for title, value in panels.items()
        ]
    )


def main() -> None:
    """Train every arm, and write ``staleness-BEGIN.json`` and ``.png``."""
    parser = arguments(__doc__)
    parser.add_argument("--begin", type=int, default=8, help=BEGIN)
    parser.add_argument("--losses", nargs="+", default=list(LOSSES), choices=list(LOSSES))
    parser.add_argument("--lags", type=int, nargs="*", default=ENDS)
    parser.add_argument("--replays", type=int, nargs="*", default=REPLAYS[-1:])
    parser.set_defaults(rounds=8)
    asked = parser.parse_args()
    bench, started = Bench(asked), Processes(with_vllm=True)
    rows = Rows(bench, f"staleness-{asked.begin}", "seed", "loss", *KINDS, "parts")
    for seed in asked.seeds:
        for arm in arms(bench, seed):
            arm.train(started)
            rows.add(arm.end())
        rows.begin(seed, begun(bench, seed, asked.begin))
    for run in rows.runs:
        what = f"replayed {run['replayed']}" if "parts" in run else f"lag {run['lag']}"
        print(
            f"seed {run['seed']} {run['loss']}, {what} ({run['mean_age']:.1f} rounds "
            f"old in the mean): reverse KL {run['reverse_kl']:.4f}, accuracy "
            f"{run['accuracy']['value']:.3f}, ESS {run['ess']:.2f}, {run['updates']} updates, "
            f"{run['teacher_tokens']:,} teacher tokens"
        )
    save(picture(rows.runs), bench.out / f"staleness-{asked.begin}.png")


if __name__ == "__main__":
    main()
