"""Real teacher scores for ``storage.py``: a run's own completions, scored again without rounding.

    python benchmarks/real_scores.py --run demo/run --out scores.npz

Writes ``I`` int32 [T, K] ids and ``V`` float32 [T, K] log-probs, likeliest first, over the full
vocabulary, of every completion token that the run's rounds and held-out shards hold.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from opdcache.resolve import model_folder
from opdcache.runfolder import RunFolder
from opdcache.schemas.rounds import HeldOutRound, RolloutRound
from opdcache.score.teacher import Ask, Sequences
from opdcache.score.transformers_scorer import TransformersScorer
from opdcache.store import rollouts
from opdcache.store.cache import Cache


def main() -> None:
    """Score, write, print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--k", type=int, default=256)
    asked = parser.parse_args()
    folder = RunFolder(asked.run)
    resolved = folder.resolved()
    assert resolved is not None, "the run has not begun"
    cache = Cache(resolved.config.cache)
    teacher = TransformersScorer(
        model_folder(resolved.config.teacher), dtype="float32", batch_tokens=2048
    )
    found: list[RolloutRound | HeldOutRound | None] = []
    for index in range(resolved.config.rounds + 1):
        found += [folder.find(RolloutRound, index), folder.find(HeldOutRound, index)]
    ids, logprobs = [], []
    for shard in (shard for file in found if file is not None for shard in file.shards):
        table = cache.read_rollouts(cache.need_rollouts(shard))
        sequences = Sequences(
            rollouts.token_lists(table, "prompt_token_ids"),
            rollouts.token_lists(table, "completion_token_ids"),
            np.zeros((shard.num_tokens, 0), np.int64),
        )
        ask = Ask(frozenset({"topk"}), k=asked.k, mass=1.0, num_ids=resolved.vocab_size)
        for batch in teacher.score(sequences, ask):
            assert batch.scores.topk is not None
            ids.append(batch.scores.topk.ids)
            logprobs.append(batch.scores.topk.logprobs)
    np.savez(asked.out, I=np.concatenate(ids), V=np.concatenate(logprobs))
    print(json.dumps({"out": str(asked.out), "tokens": sum(map(len, ids)), "k": asked.k}))


if __name__ == "__main__":
    main()
