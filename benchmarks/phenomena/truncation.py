"""What is lost of a teacher's distributions where some entries of them are stored.

    python -m benchmarks.phenomena.truncation --model demo/models/teacher --out truncation

SmolLM2 without four of its layers learns the whole model's distributions by forward KL, on
completions that the whole model sampled: of the top k alone (renormalised, and the truncated sum),
of the top k with a bucket for the rest, and of random draws. The top 2,048 with a bucket stand for
the full distribution; how much mass they hold is told. On fresh completions of the whole model,
exactly: forward and reverse KL, and the calibration error of the student's likeliest token, its
probability against the teacher's of that same token (ECE, bins of a fifteenth).

Bytes a token are those of the committed score shards, of this one column, 256 completions a shard.
At the bytes of each number of draws, what the top k with a bucket reaches is told by interpolation.
The teacher scores in ``--dtype``; it is compared with in float32.
"""

from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opdcache.logits import chunks, matmul, matmul_ready
from opdcache.runfolder import RunFolder
from opdcache.schemas.rounds import RolloutRound, ScoreRound
from opdcache.score.teacher import Sequences, by_length
from opdcache.score.transformers_scorer import TransformersScorer
from opdcache.store.cache import Cache
from opdcache.store.rollouts import token_lists

from .common import Bench, arguments, manifests, stored
from .damaged import damaged, healing
from .plots import Panel, aligned, drawn, save, values
from .results import Rows

LENGTH = 48
SHARD_SAMPLES = 256
HELD_OUT = 9
"""Seed of the completions that are compared on; no other may be so large."""
BINS = 15
BATCH_TOKENS = 2048
FULL = 2048
KS = (4, 16, 64)
DRAWS = (8, 32, 128)
TOPK = {"support": "teacher_topk", "direction": "forward"}
ARMS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "top k, truncated": ({**TOPK, "normalisation": "truncated"}, KS),
    "top k, renormalised": ({**TOPK, "normalisation": "renormalised"}, KS),
    "top k and tail": ({**TOPK, "normalisation": "tail"}, (*KS, FULL)),
    "draws": ({"support": "draws", "direction": "forward", "normalisation": "none"}, DRAWS),
}
"""Loss, and how many entries: from few to many, or the shards of many would serve few."""
ENTRIES = sorted({num for _, sizes in ARMS.values() for num in sizes})
MEASURED = {"forward_kl": "forward KL (nats)", "reverse_kl": "reverse KL (nats)", "ece": "ECE"}


def sampled(bench: Bench, name: str, seed: int, num: int) -> RunFolder:
    """Completions of the whole model."""
    config = healing(
        bench,
        bench.model,
        seed,
        max_tokens=LENGTH,
        rounds=1,
        prompts={"per_round": num},
        rollout={"shard_samples": SHARD_SAMPLES},
    )
    return bench.run(name, {**config, "evaluation": None}, "rollout")


def arm(bench: Bench, loss: str, num: int, seed: int, rollouts: str) -> str:
    """Train on what is kept of the teacher; the run's name."""
    form, _ = ARMS[loss]
    draws = form["support"] == "draws"
    run = f"{loss.replace(', ', '-').replace(' ', '-')}-{num}-{seed}"
    config = healing(
        bench,
        damaged(bench, "whole", bench.model),
        seed,
        max_tokens=LENGTH,
        rounds=1,
        rollouts={"from": rollouts},
        score={"columns": ["draws"], "draws": num} if draws else {"columns": ["topk"], "k": num},
        train={"loss": form | ({} if draws else {"k": num})},
    )
    bench.run(run, {**config, "evaluation": None})
    return run


def bytes_per_token(folder: RunFolder, cache: Cache, num: int) -> float:
    """Of the score shards that a run trained on, which hold so many entries and no more."""
    for one in manifests(folder.need(ScoreRound, 0), cache):
        if num not in (one.identity.k, one.identity.draws):
            raise SystemExit(
                f"{folder.path}: a shard of more entries serves it; take another --out"
            )
    num_tokens = sum(shard.num_tokens for shard in folder.need(RolloutRound, 0).shards)
    return stored(folder.need(ScoreRound, 0), cache) / num_tokens


def sequences(folder: RunFolder, cache: Cache) -> Sequences:
    """The completions of a run's first round, to be read."""
    prompts, completions = list[Any](), list[Any]()
    for shard in folder.need(RolloutRound, 0).shards:
        table = cache.read_rollouts(cache.need_rollouts(shard))
        prompts += token_lists(table, "prompt_token_ids")
        completions += token_lists(table, "completion_token_ids")
    return Sequences(prompts, completions, np.zeros((sum(map(len, completions)), 0), np.int32))


def against(student: Path, teacher: Path, held_out: Sequences) -> dict[str, float]:
    """A student compared with the teacher on its completions, over the full vocabulary."""
    models = [
        TransformersScorer(folder, dtype="float32", batch_tokens=BATCH_TOKENS)
        for folder in (student, teacher)
    ]
    with torch.no_grad():
        told = [_told(log_p, log_q) for log_p, log_q in _both(models, held_out)]
    forward, reverse, confidence, right, full = map(torch.cat, zip(*told, strict=True))
    return {
        "forward_kl": float(forward.mean()),
        "reverse_kl": float(reverse.mean()),
        "ece": calibration_error(confidence, right),
        "confidence": float(confidence.mean()),
        "right": float(right.mean()),
        "full_mass": float(full.mean()),
    }


def _both(models: list[TransformersScorer], held_out: Sequences) -> Iterator[tuple[Tensor, Tensor]]:
    """Log-probs of both at each token, [C, V], a chunk at a time."""
    weights = [matmul_ready(model.head_weight) for model in models]
    for rows in by_length(held_out.lengths, BATCH_TOKENS):
        hidden = [model.hidden(held_out, rows) for model in models]
        for part in chunks(len(hidden[0]), 256):
            log_p, log_q = (
                torch.log_softmax(matmul(of[part], weight.t()), dim=1)
                for of, weight in zip(hidden, weights, strict=True)
            )
            yield log_p, log_q


def _told(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, ...]:
    """Of each token: both divergences, what either gives the student's likeliest token, and what
    the teacher's likeliest ``FULL`` hold."""
    confidence, ids = log_p.max(dim=1)
    apart = log_q - log_p
    return (
        (log_q.exp() * apart).sum(dim=1),
        -(log_p.exp() * apart).sum(dim=1),
        confidence.exp(),
        log_q.gather(1, ids[:, None])[:, 0].exp(),
        log_q.topk(FULL, dim=1).values.exp().sum(dim=1),
    )


def calibration_error(confidence_T: Tensor, right_T: Tensor) -> float:
    """Expected calibration error: how far confidence is from how often it is right, the mean over
    bins of equal width, by their tokens."""
    bins_T = (confidence_T * BINS).long().clamp(max=BINS - 1)
    apart = torch.zeros(BINS, dtype=torch.float64)
    apart.index_add_(0, bins_T.cpu(), (confidence_T - right_T).double().cpu())
    return float(apart.abs().sum() / len(confidence_T))


def main() -> None:
    """Train every arm, and write ``truncation.json`` and ``.png``."""
    parser = arguments(__doc__)
    parser.add_argument("--losses", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--entries", type=int, nargs="+", default=list(ENTRIES), choices=ENTRIES)
    parser.set_defaults(rounds=1, prompts=256, evaluated=64, lr=5e-5)
    asked = parser.parse_args()
    if max(asked.seeds) >= HELD_OUT:
        raise SystemExit(f"--seeds: below {HELD_OUT}")
    bench, cache = Bench(asked), Cache(str(asked.out / "cache"))
    rows = Rows(bench, "truncation", "seed", "loss", "entries")
    fresh = sequences(sampled(bench, "held-out", HELD_OUT, asked.evaluated), cache)
    before = against(damaged(bench, "whole", bench.model), bench.model, fresh)
    for seed in asked.seeds:
        trained_on = f"whole-{seed}"
        sampled(bench, trained_on, seed, asked.prompts)
        for loss in asked.losses:
            for num in (n for n in ARMS[loss][1] if n in asked.entries):
                folder = bench.folder(arm(bench, loss, num, seed, trained_on))
                rows.add(
                    {
                        "seed": seed,
                        "loss": loss,
                        "entries": num,
                        "bytes_per_token": bytes_per_token(folder, cache, num),
                        **against(folder.student_path(1), bench.model, fresh),
                    },
                    before=before,
                )
    print(f"before: {said(before)}; the top {FULL:,} hold {before['full_mass']:.5f}")
    for run in rows.runs:
        print(
            f"seed {run['seed']} {run['loss']}, {run['entries']:,} "
            f"({run['bytes_per_token']:.1f} bytes a token): {said(run)}"
        )
        if run["loss"] == "draws" and (bucket := as_large(run, rows.runs)):
            print(f"    top k and tail, as many bytes: {said(bucket)}")
    save(drawn(panels(rows.runs)), bench.out / "truncation.png")


def said(of: dict[str, Any]) -> str:
    """What was measured, in words."""
    return (
        f"forward KL {of['forward_kl']:.4f}, reverse KL {of['reverse_kl']:.4f}, ECE {of['ece']:.4f}"
    )


def as_large(run: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, float]:
    """What the top k with a bucket reaches at the bytes of another run of the seed: between two k,
    by the logarithm of the bytes; at the nearest k beyond them; nothing where none was trained."""
    loss = "top k and tail"
    others = [one for one in runs if (one["seed"], one["loss"]) == (run["seed"], loss)]
    if not others:
        return {}
    others.sort(key=itemgetter("bytes_per_token"))
    sizes = np.log([one["bytes_per_token"] for one in others])
    at = np.log(run["bytes_per_token"])
    return {key: float(np.interp(at, sizes, [one[key] for one in others])) for key in MEASURED}


def panels(runs: list[dict[str, Any]]) -> list[Panel]:
    """Each figure by bytes a token, a curve a loss and seed."""
    of = aligned([((run["loss"], run["seed"]), run["entries"], run) for run in runs])
    return [
        Panel(
            title,
            "bytes a token",
            [
                (
                    loss,
                    values(rows, itemgetter("bytes_per_token")),
                    values(rows, itemgetter(key)),
                )
                for (loss, _), rows in of.items()
            ],
            logarithmic=True,
        )
        for key, title in MEASURED.items()
    ]


if __name__ == "__main__":
    main()
