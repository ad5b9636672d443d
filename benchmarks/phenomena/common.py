"""What the experiments share: a task, models tuned on it, runs of the engine, and what is read of
them.

The task is chain_sum of reasoning-gym with three terms of one digit, as raw text: its completions
are four tokens, so that a round takes a minute on two cores. The models are tuned by the engine
itself: cross-entropy on completions, of an import or of another run.
"""

import json
import os
import re
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from shutil import rmtree
from typing import Any

import yaml

from opdcache.accuracy import Answered, accuracies
from opdcache.measured import size_bytes
from opdcache.prompts import load_prompts, render
from opdcache.resolve import load_tokenizer
from opdcache.runfolder import RunFolder
from opdcache.schemas.manifests import ScoreManifest
from opdcache.schemas.prompts import PromptsConfig, ReasoningGymSource
from opdcache.schemas.rounds import (
    AccuracyRound,
    PromptScores,
    RolloutRound,
    ScoreRound,
    TeacherAccuracy,
    TrainRound,
)
from opdcache.store.cache import Cache

ROOT = Path(__file__).parents[2]
TERMS = {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1}
POOL = 5120
"""Prompts that a run's rounds walk through, however many it has: tuned models serve all runs."""
EVALUATION_SEED = 1000
BEGIN = "rounds of forward KL before the arms part"
VERIFIER = "benchmarks.phenomena.common:right"
IMITATION = {"support": "sampled", "direction": "forward", "normalisation": "none"}


def source(size: int, seed: int) -> dict[str, Any]:
    """Prompts of the task, more than are asked for: of some 4,000 problems many come twice."""
    name = {"type": "reasoning_gym", "dataset": "chain_sum"}
    return {**name, "size": 3 * size, "seed": seed, "config": TERMS}


def right(text: str, answer: str | None) -> float:
    """1 where the first whole number of a completion is the answer."""
    found = re.search(r"-?\d+", text)
    return float(found is not None and found[0] == answer)


def arguments(what: str | None) -> ArgumentParser:
    """The arguments that every experiment has."""
    parser = ArgumentParser(description=(what or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="SmolLM2-135M-Instruct's folder")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=256, help="a round")
    parser.add_argument("--samples", type=int, default=1, help="completions a prompt")
    parser.add_argument("--evaluated", type=int, default=200, help="held-out prompts")
    parser.add_argument("--tuning", type=int, default=2560, help="prompts that models are tuned on")
    parser.add_argument("--tuning-epochs", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument(
        "--dtype", default="float32", help="bfloat16 is faster where the CPU has units for it"
    )
    return parser


@dataclass(frozen=True)
class Bench:
    """A folder of runs that share a cache, and what they have in common."""

    asked: Namespace

    @property
    def out(self) -> Path:
        """Folder of the runs."""
        return Path(self.asked.out).resolve()

    @property
    def model(self) -> Path:
        """The model that nothing was done to."""
        return Path(self.asked.model).resolve()

    def config(self, student: Path, teacher: Path, seed: int = 0, **parts: Any) -> dict[str, Any]:
        """A run file's content; ``parts`` are put over its parts, a level deep."""
        asked = self.asked
        whole = {
            "seed": seed,
            "rounds": asked.rounds,
            "cache": "cache",
            "student": {"model": str(student)},
            "teacher": {"model": str(teacher), "dtype": asked.dtype},
            "prompts": {
                "source": source(POOL, 1 + seed),
                "template": "raw",
                "per_round": asked.prompts,
            },
            "rollout": {
                "samples_per_prompt": asked.samples,
                "sampling": {"temperature": 1.0, "max_tokens": 8},
                "student_topk": 16,
                "shard_samples": 256,
                "dtype": asked.dtype,
                "engine": {"max_model_len": 64, "kv_cache_memory_bytes": 2**28},
            },
            "score": {"k": 64, "batch_tokens": 1024},
            "train": {
                "loss": {"support": "teacher_topk", "direction": "reverse", "k": 16},
                "optimizer": {"lr": asked.lr, "warmup_updates": 5},
                "batch_samples": 32,
                "micro_batch_tokens": 2048,
                "share_prompts": True,
                "dtype": asked.dtype,
                "zero_stage": 0 if asked.dtype == "float32" else 1,
                "checkpoint_every": 10000,
            },
            "evaluation": {
                "source": source(asked.evaluated, EVALUATION_SEED),
                "num_prompts": asked.evaluated,
                "samples_per_prompt": 4,
                "sampling": {"temperature": 0.6, "max_tokens": 8},
                "verifier": VERIFIER,
            },
        }
        for name, part in parts.items():
            held = whole.get(name)
            both = isinstance(held, Mapping) and isinstance(part, Mapping)
            whole[name] = {**held, **part} if both else part  # type: ignore[dict-item]
        return whole

    def file(self, name: str, config: dict[str, Any]) -> Path:
        """Write a run file, whose output has its name."""
        file = self.out / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump({**config, "output": name}, sort_keys=False))
        return file

    def run(self, name: str, config: dict[str, Any], *stages: str) -> RunFolder:
        """Write a run file and carry it out: all of it, or some stages of round 0.

        After a whole run its checkpoint is deleted, 2 GB that would serve further rounds alone.
        """
        file = self.file(name, config)
        if not stages:
            opdcache("run", file)
            rmtree(self.folder(name).checkpoints, ignore_errors=True)
        for stage in stages:
            opdcache(stage, file, "--round", 0)
        return self.folder(name)

    def folder(self, name: str) -> RunFolder:
        """A run's folder."""
        return RunFolder(self.out / name)

    @cached_property
    def taught(self) -> Path:
        """The model tuned on right answers."""
        self.out.mkdir(parents=True, exist_ok=True)
        file, out = self.out / "answers.jsonl", self.folder("answers")
        rows = "".join(json.dumps(row) + "\n" for row in self._answers())
        if file.exists() and file.read_text() != rows:
            raise SystemExit(f"{file}: of other --tuning or --evaluated; take another --out")
        file.write_text(rows)
        if out.find(RolloutRound, 0) is None:
            opdcache(
                *("cache", "import", self.out / "cache", file),
                *("--student", self.model, "--out", out.path),
            )
        return self._tuned("taught", "answers")

    @cached_property
    def idle(self) -> Path:
        """The model tuned as much on completions of its own: it learns nothing."""
        num = self.asked.tuning
        prompts = {"source": source(num, 0), "per_round": num, "max_epochs": 1}
        config = self.config(self.model, self.model, rounds=1, prompts=prompts)
        config["rollout"]["samples_per_prompt"] = 1
        self.run("own", config, "rollout")
        return self._tuned("idle", "own")

    def _tuned(self, name: str, rollouts: str) -> Path:
        """The model after cross-entropy on completions."""
        config = self.config(
            self.model,
            self.model,
            rounds=1,
            rollouts={"from": rollouts},
            score={"columns": []},
            evaluation=None,
            train={
                "loss": IMITATION,
                "optimizer": {"lr": 1e-4, "warmup_updates": 5, "schedule": "linear"},
                "share_prompts": False,
                "epochs": self.asked.tuning_epochs,
            },
        )
        return self.run(name, config).student_path(1)

    def _answers(self) -> Sequence[dict[str, Any]]:
        """Rows of an import: the task's prompts, and right answers as the model words its own."""
        tokenizer = load_tokenizer(self.model)
        held_out = {p.messages for p in self._prompts(self.asked.evaluated, EVALUATION_SEED)}
        prompts = [p for p in self._prompts(self.asked.tuning, 0) if p.messages not in held_out]
        if len(prompts) < self.asked.tuning:
            raise SystemExit(f"--tuning: there are {len(prompts):,} such prompts")
        prompts = prompts[: self.asked.tuning]
        looks = PromptsConfig(source=ReasoningGymSource(**source(1, 0)), template="raw")
        return [
            {
                "id": one.prompt.prompt_id,
                "prompt_token_ids": list(one.token_ids),
                "completion_token_ids": [
                    *tokenizer.encode(f" {one.prompt.answer}.", add_special_tokens=False),
                    tokenizer.eos_token_id,
                ],
            }
            for one in render(prompts, looks, tokenizer)
        ]

    def _prompts(self, size: int, seed: int) -> Sequence[Any]:
        return load_prompts(ReasoningGymSource(**source(size, seed))).prompts


def opdcache(*words: object, fine: Sequence[int] = (0,)) -> str:
    """What a command of ours prints; ends the experiment where it fails.

    Args:
        fine: exit codes that are no failure.
    """
    command = [sys.executable, "-m", "opdcache.cli.main", *map(str, words)]
    print("$ opdcache", *words, file=sys.stderr, flush=True)
    done = subprocess.run(
        command, env={**os.environ, **importable()}, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode not in fine:
        raise SystemExit(f"opdcache {words[0]}: exit code {done.returncode}")
    return done.stdout


def importable() -> dict[str, str]:
    """The variable by which other processes find the verifier."""
    path = [*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)]
    return {"PYTHONPATH": os.pathsep.join(path)}


def beginning(bench: Bench, seed: int, rounds: int) -> Sequence[Path]:
    """Policies of so many rounds of forward KL from the taught model, the one before them first."""
    if not rounds:
        return [bench.model]
    run = _begun(seed, rounds)
    config = bench.config(bench.model, bench.taught, seed, rounds=rounds)
    config["train"]["loss"] |= {"direction": "forward"}
    bench.run(run, config | {"evaluation": reserved(config)})
    students = (bench.folder(run).student_path(index) for index in range(1, rounds + 1))
    return [bench.model, *students]


def begun(bench: Bench, seed: int, rounds: int) -> dict[str, Any]:
    """The last of these policies on held-out prompts; nothing of the model itself."""
    return ended(bench, _begun(seed, rounds), bench.taught, rounds) if rounds else {}


LATER = 900
"""An order of the prompts that is neither the beginning's nor a lagged round's."""


def anew(bench: Bench, policy: Path, seed: int, order: int, **parts: Any) -> dict[str, Any]:
    """A run from a policy on its seed's prompts, in another order; held-out ones are reserved."""
    config = bench.config(policy, bench.taught, 1000 * seed + order, **parts)
    config["prompts"]["source"] |= {"seed": 1 + seed}
    return config | {"evaluation": reserved(config)}


def _begun(seed: int, rounds: int) -> str:
    return f"begun-{seed}-{rounds}"


def reserved(config: dict[str, Any]) -> dict[str, Any]:
    """An evaluation whose prompts are kept from training, and of which one is asked a round."""
    asked = config["evaluation"] | {"num_prompts": 1, "samples_per_prompt": 1}
    return {key: value for key, value in asked.items() if key != "verifier"}


def ended(bench: Bench, name: str, teacher: Path, rounds: int) -> dict[str, Any]:
    """A run's last student on held-out prompts, where its rounds only kept them from training."""
    run = f"{name}-end"
    config = bench.config(bench.folder(name).student_path(rounds), teacher, rounds=1)
    config["prompts"]["per_round"] = 1
    bench.run(run, config, "rollout")
    student, best = compared(verified(bench.out, run))
    return {
        "reverse_kl": divergence(bench.out, run)[0],
        "accuracy": student["mean_score"],
        "teacher": best["mean_score"],
    }


def divergence(out: Path, name: str) -> list[float]:
    """Exact reverse KL of each round's student from the teacher, on its held-out completions."""
    told = json.loads(opdcache("evaluate", out / f"{name}.yaml", "--json"))
    return [one["reverse_kl"] for one in told["divergence"]]


Scores = Mapping[int | None, Sequence[PromptScores]]
"""Of a run's rounds, and of its teacher (None), on the held-out prompts."""


def verified(out: Path, name: str) -> Scores:
    """A run's scores; its teacher answers too."""
    opdcache("evaluate", out / f"{name}.yaml", "--no-divergence")
    folder = RunFolder(out / name)
    found: dict[int | None, Sequence[PromptScores]] = {}
    while (one := folder.find(AccuracyRound, len(found))) is not None:
        found[len(found)] = one.prompts
    path = folder.teacher_path / "accuracy.json"
    found[None] = TeacherAccuracy.model_validate_json(path.read_text()).prompts
    return found


def pooled(runs: Sequence[Scores]) -> Scores:
    """Runs of other seeds as one: every prompt's completions of all of them."""
    return {
        index: [_joined(same) for same in zip(*(run[index] for run in runs), strict=True)]
        for index in runs[0]
    }


def _joined(same: Sequence[PromptScores]) -> PromptScores:
    """One prompt's completions of several runs."""
    if len({one.prompt_id for one in same}) > 1:
        raise SystemExit("the seeds were not asked the same held-out prompts")
    return same[0].model_copy(
        update={
            "scores": tuple(score for one in same for score in one.scores),
            "num_truncated": sum(one.num_truncated for one in same),
            "num_failed": sum(one.num_failed for one in same),
        }
    )


def compared(scores: Scores) -> list[dict[str, Any]]:
    """Accuracies of rounds, with their recovery of the gap to the teacher, who comes last."""
    told = accuracies([Answered.of(index, prompts) for index, prompts in scores.items()])
    return [one.model_dump(mode="json") for one in told]


def accuracy(run: Mapping[str, Any]) -> list[float]:
    """Of a run's students, in order; its ``models`` end with the teacher."""
    return [model["mean_score"]["value"] for model in run["models"][:-1]]


def by_round(out: Path, name: str, verifier: str | None = None) -> dict[str, Any]:
    """A run's rounds as its rollouts were scored, and in the mean over its updates; what the audit
    finds; and the minutes that the stages took, without starting processes.

    Args:
        verifier: judges the rollouts too.
    """
    judged = ("--verifier", verifier) if verifier else ()
    audit = json.loads(opdcache("audit", out / f"{name}.yaml", "--json", *judged, fine=(0, 3)))
    folder, rows = RunFolder(out / name), list[dict[str, Any]]()
    metrics = folder.metrics()
    for part in audit["parts"]:
        seen, index = part["diagnostics"], part["round"]
        trained = [row for row in metrics if row["round"] == index]
        labels = part["reward"]["num_labelled"]
        rows.append(
            {
                "round": index,
                **{f: seen[f] for f in FIGURES},
                "accuracy": part["reward"]["num_correct"] / labels if labels else None,
                **{name: weighted(trained, name) for name in METRICS},
                "largest_gradient": max(row["grad_norm"] for row in trained),
                "seconds": {
                    "rollout": folder.need(RolloutRound, index).elapsed_s,
                    "score": folder.need(ScoreRound, index).elapsed_s,
                    "train": folder.need(TrainRound, index).elapsed_s,
                },
            }
        )
    spent = sum(sum(row["seconds"].values()) for row in rows)
    return {"rounds": rows, "findings": audit["findings"], "minutes": round(spent / 60, 1)}


def manifests(scores: ScoreRound, cache: Cache) -> Iterator[ScoreManifest]:
    """Of the score sets that a round trains on."""
    for shard in scores.shards:
        keys = {served.key for served in shard.served}
        for one in cache.score_sets(shard.content, shard.teacher):
            if one.key in keys:
                yield one


def stored(scores: ScoreRound, cache: Cache) -> int:
    """Bytes of the score sets that a round trains on."""
    return sum(size_bytes(one) for one in manifests(scores, cache))


METRICS = ("student_entropy", "entropy_gap", "ess", "reverse_kl_tail")
FIGURES = ("overlap", "overlap_mass_student", "overlap_mass_teacher", "overlap_advantage")


def weighted(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Token-mean of a metric over updates; None where it is in none."""
    held = [(row[name], row["num_tokens"]) for row in rows if row.get(name) is not None]
    return sum(v * n for v, n in held) / sum(n for _, n in held) if held else None
