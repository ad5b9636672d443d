"""How far the pipeline is from itself: a model scored as its own teacher, vLLM rollouts included.

The reverse KL between a model and itself is 0; what is measured is the disagreement of vLLM, which
sampled, with transformers, which scored, and what rounding adds on the way through a shard.

    python benchmarks/parity.py --model MODEL --dtype bfloat16 --tokens 20000
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import yaml

from opdcache.runfolder import RunFolder
from opdcache.schemas.rounds import RolloutRound, ScoreRound
from opdcache.store.cache import Cache
from opdcache.store.rollouts import flat_tokens

MAX_TOKENS = 128


def run_file(folder: Path, model: Path, dtype: str, num_completions: int) -> Path:
    """A one-round run whose teacher is its student."""
    prompts = [
        {"prompt": f"Tell me {i} things about the number {i}."} for i in range(num_completions)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    config = {
        "student": {"model": str(model.resolve())},
        "teacher": {"model": str(model.resolve()), "dtype": dtype},
        "prompts": {
            "source": {"type": "jsonl", "path": "prompts.jsonl"},
            "per_round": num_completions,
        },
        "rollout": {
            "samples_per_prompt": 1,
            "sampling": {"max_tokens": MAX_TOKENS},
            "shard_samples": 128,
            "dtype": dtype,
            "engine": {"max_model_len": 256},
        },
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def measure(folder: Path) -> dict[str, float]:
    """Statistics of ``log r``, the teacher's minus the sampler's log-prob of each sampled token."""
    run, cache = RunFolder(folder / "run"), Cache(str(folder / "cache"))
    rollouts, scores = run.need(RolloutRound, 0), run.need(ScoreRound, 0)
    parts = []
    for shard, scored in zip(rollouts.shards, scores.shards, strict=True):
        table = cache.read_rollouts(cache.need_rollouts(shard))
        teacher = cache.open_score_set(scored.content, scored.teacher, scored.served).read()
        assert teacher.sampled_logprobs is not None
        parts.append(teacher.sampled_logprobs - flat_tokens(table, "behavior_logprobs", np.float32))
    log_r = np.concatenate(parts).astype(np.float64)
    estimate = np.exp(log_r) - 1 - log_r
    return {
        "num_tokens": len(log_r),
        "reverse_kl": float(estimate.mean()),
        "mean_abs_log_ratio": float(np.abs(log_r).mean()),
        "max_abs_log_ratio": float(np.abs(log_r).max()),
    }


def parity(folder: Path, model: Path, dtype: str, num_tokens: int) -> dict[str, float]:
    """Roll out and score a model as its own teacher, in an empty folder; see ``measure``.

    Raises:
        CalledProcessError: a stage fails.
    """
    # Few completions end early; half as many again are enough.
    path = run_file(folder, model, dtype, -(-num_tokens * 3 // (2 * MAX_TOKENS)))
    for stage in ("rollout", "score"):
        command = [sys.executable, "-m", "opdcache.cli.main", stage, str(path), "--round", "0"]
        subprocess.run(command, check=True)
    return measure(folder)


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=20_000)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        result = parity(Path(name), asked.model, asked.dtype, asked.tokens)
    if result["num_tokens"] < asked.tokens:
        sys.exit(f"only {result['num_tokens']} tokens; ask for more")
    print(json.dumps({"dtype": asked.dtype, **result}))


if __name__ == "__main__":
    main()
