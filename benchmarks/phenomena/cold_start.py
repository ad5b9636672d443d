"""A badly pruned student, with and without a cold start, by the tokens that it was trained on.

    python -m benchmarks.phenomena.cold_start --model demo/models/teacher --out new-knowledge

The student is the model tuned on right answers (see ``new_knowledge``, whose folder this one may
share) without eight of its thirty layers; the teacher is the whole one. One arm distils on-policy
in all rounds; the other spends half of the completions and updates on cross-entropy to completions
that the teacher sampled, and the other half on-policy. Completions of both are as many; their
lengths differ, so accuracies are told at equal tokens too, between two students by interpolation.

The task is too small for the two halves to have prompts of their own, and a budget is no training
to saturation, of which the paper speaks.
"""

from pathlib import Path
from typing import Any

import numpy as np

from opdcache.schemas.rounds import RolloutRound, ScoreRound, TrainRound

from .common import (
    IMITATION,
    Bench,
    Scores,
    accuracy,
    arguments,
    compared,
    source,
    verified,
)
from .damaged import damaged
from .plots import Panel, drawn, save
from .results import Rows

LAYERS = (3, 6, 10, 13, 16, 19, 23, 26)
TEACHERS_PROMPTS = 500_000
"""Seed of the prompts that the teacher answers."""


def without(bench: Bench, student: Path, seed: int) -> list[str]:
    """On-policy in all rounds; the runs' names."""
    run = f"cold-without-{seed}"
    bench.run(run, bench.config(student, bench.taught, seed, rounds=2 * _half(bench)))
    return [run]


def with_one(bench: Bench, student: Path, seed: int) -> list[str]:
    """Half of the completions by the teacher, imitated, then on-policy; the runs' names."""
    sampler, first, then = (f"cold-{name}-{seed}" for name in ("teacher", "sft", "with"))
    num = _half(bench) * bench.asked.prompts * bench.asked.samples
    prompts = {"source": source(num, TEACHERS_PROMPTS + seed), "per_round": num}
    sampling = {"temperature": 0.7, "top_p": 0.95, "max_tokens": 8}
    config = bench.config(bench.taught, bench.taught, seed, rounds=1, prompts=prompts)
    config["rollout"] |= {"samples_per_prompt": 1, "sampling": sampling}
    bench.run(sampler, config, "rollout")
    imitated = bench.config(
        student,
        bench.taught,
        seed,
        rounds=1,
        rollouts={"from": sampler},
        score={"columns": []},
        train={"loss": IMITATION, "share_prompts": False, "drop": ["truncated", "repetitive"]},
    )
    warm = bench.run(first, imitated).student_path(1)
    bench.run(then, bench.config(warm, bench.taught, seed, rounds=_half(bench)))
    return [sampler, first, then]


def _half(bench: Bench) -> int:
    """Rounds that a cold start is worth."""
    return int(bench.asked.rounds) // 2


def main() -> None:
    """Distil both ways, and write ``cold_start.json`` and ``.png``."""
    parser = arguments(__doc__)
    parser.set_defaults(rounds=12)
    asked = parser.parse_args()
    if asked.rounds < 2:
        raise SystemExit("--rounds: 2 at least, one of them for the cold start")
    bench = Bench(asked)
    rows = Rows(bench, "cold_start", "seed", "arm")
    student = damaged(bench, "taught", bench.taught, LAYERS)
    for seed in asked.seeds:
        for name, arm in {"without": without, "with": with_one}.items():
            rows.add({"seed": seed, "arm": name, **told(bench, arm(bench, student, seed))})
    for run in rows.runs:
        last = run["models"][-2]["mean_score"]
        equal = min(one["tokens"][-1] for one in rows.runs if one["seed"] == run["seed"])
        print(
            f"seed {run['seed']} {run['arm']} a cold start: accuracy {last['value']:.3f} "
            f"[{last['low']:.3f}, {last['high']:.3f}] after {run['tokens'][-1]:,} tokens, "
            f"{np.interp(equal, run['tokens'], accuracy(run)):.3f} after {equal:,}"
        )
    curves = [(f"{run['arm']} a cold start", run["tokens"], accuracy(run)) for run in rows.runs]
    save(
        drawn([Panel("accuracy (avg@4)", "tokens trained on", curves)]),
        bench.out / "cold_start.png",
    )


def told(bench: Bench, names: list[str]) -> dict[str, Any]:
    """An arm's students with the tokens that each was trained on, and the minutes that the stages
    took, without starting processes."""
    tokens, seconds, trained = [0], 0.0, list[str]()
    for name in names:
        folder, index = bench.folder(name), 0
        while (rollouts := folder.find(RolloutRound, index)) is not None:
            stages = folder.find(ScoreRound, index), folder.find(TrainRound, index)
            seconds += sum(stage.elapsed_s for stage in (rollouts, *stages) if stage is not None)
            if stages[1] is not None:
                tokens.append(tokens[-1] + stages[1].num_tokens)
                trained.append(name)
            index += 1
    scores = one_after_another([verified(bench.out, name) for name in dict.fromkeys(trained)])
    return {"models": compared(scores), "tokens": tokens, "minutes": round(seconds / 60, 1)}


def one_after_another(runs: list[Scores]) -> Scores:
    """Runs that go on where the one before ended, as one: its last student is the next's first."""
    students = [of for run in runs[:-1] for of in _students(run)[:-1]] + _students(runs[-1])
    return {**dict(enumerate(students)), None: runs[-1][None]}


def _students(run: Scores) -> list[Any]:
    return [of for index, of in run.items() if index is not None]


if __name__ == "__main__":
    main()
