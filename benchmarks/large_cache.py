"""What a cache of very many small shards costs: to list, to open for training, to read at random.

    python benchmarks/large_cache.py --shards 100000 --folder /tmp/large

Half of the shards are rollouts and half their scores, synthetic, of 4 completions each; one run's
round pins them all. The folder is filled once, and used again when it is there.

- ``list_commits_s``: the paths and ages of all manifests, from the store alone.
- ``list_cold_s``, ``list_s``: ``opdcache cache ls`` without and with its index, table included.
- ``open_s``, ``open_memory_mb``: a run's round opened for training, from its round files, and what
  that adds to the process.
- ``sample_ms``: reading and decoding one sample at random, median and 99th percentile of 1,000.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from opdcache.identity import content_hash, key_of
from opdcache.runfolder import RunFolder
from opdcache.schemas.manifests import (
    AS_SAMPLED,
    Provenance,
    RolloutIdentity,
    RolloutManifest,
    Sampling,
    ScoreIdentity,
    ScoreManifest,
)
from opdcache.schemas.rounds import (
    RolloutRound,
    RolloutShard,
    ScoredShard,
    ScoreRound,
    ServedColumns,
)
from opdcache.store import codec, rollouts
from opdcache.store.cache import Cache, as_listed
from opdcache.store.encoding import encode_scores
from opdcache.store.index import forget
from opdcache.store.scores import GROUP, Scores, TopK

ROWS, TOKENS, K, VOCAB, STEP = 4, 16, 4, 50_000, 1 / 256
TEACHER = "7" * 64
MADE_BY = Provenance(
    versions={"opdcache": "0"},
    host="here",
    run_id="large",
    created_at="2026-01-01T00:00:00+00:00",
    elapsed_s=1.0,
    tokens_per_s=1.0,
    details={},
)


def fill(cache: Cache, folder: RunFolder, pairs: int) -> None:
    """Commit as many rollout shards, each with scores, and the round that pins them."""
    encoded = _encoded_scores()
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda number: _pair(cache, number, encoded), range(pairs)))
    cache.pin("large", "rollouts", [shard.key for shard, _ in made])
    cache.pin("large", "scores", [served.key for _, served in made])
    listed = (
        ScoredShard(content=shard.content, teacher=TEACHER, served=(served,), cached=False)
        for shard, served in made
    )
    folder.write(
        RolloutRound(
            round=0,
            student="s",
            shards=tuple(shard for shard, _ in made),
            dropped={},
            elapsed_s=0.0,
        )
    )
    folder.write(ScoreRound(round=0, shards=tuple(listed), elapsed_s=0.0))


def _pair(
    cache: Cache, number: int, encoded: dict[str, bytes]
) -> tuple[RolloutShard, ServedColumns]:
    rng = np.random.default_rng(number)
    table = rollouts.rollout_table(list(_completions(number, rng)))
    identity = RolloutIdentity(
        student="s",
        vocabulary="v",
        eos_token_id=None,
        prompts=str(number),
        labels="l",
        seeds="s",
        num_requests=ROWS,
        sampling=Sampling(),
        engine={"dtype": "float32"},
        student_topk=0,
    )
    attempt = cache.attempt(key_of(identity))
    attempt.put(rollouts.FILE, rollouts.encode_rollouts(table))
    common = {"num_rows": ROWS, "num_tokens": ROWS * TOKENS, "dropped": {}, "provenance": MADE_BY}
    rollout = RolloutManifest(
        key=key_of(identity),
        attempt=attempt.name,
        objects=tuple(attempt.entries),
        identity=identity,
        content=content_hash(table),
        num_prompt_tokens=2 * ROWS,
        vocab_size=VOCAB,
        task="t",
        **common,
    )
    cache.commit(attempt, rollout)
    scored = ScoreIdentity(
        content=rollout.content,
        teacher=TEACHER,
        rendering=AS_SAMPLED,
        dtype="float32",
        columns=("topk",),
        k=K,
        mass=1.0,
        num_ids=VOCAB,
        step=STEP,
    )
    attempt = cache.attempt(key_of(scored))
    for path, data in encoded.items():
        attempt.put(f"{GROUP}/{path}", data)
    manifest = ScoreManifest(
        key=key_of(scored),
        attempt=attempt.name,
        objects=tuple(attempt.entries),
        identity=scored,
        rollout_key=rollout.key,
        vocab_size=VOCAB,
        clip_floor=codec.clip_floor(STEP),
        **common,
    )
    cache.commit(attempt, manifest)
    return as_listed(rollout, cached=False), ServedColumns(key=manifest.key, columns=("topk",))


def _completions(number: int, rng: np.random.Generator) -> Iterator[rollouts.Completion]:
    for row in range(ROWS):
        logprobs = -rng.random(TOKENS).astype(np.float32)
        yield rollouts.Completion(
            prompt_id=f"{number}-{row}",
            sample_index=0,
            prompt_token_ids=[1, 2],
            completion_token_ids=rng.integers(VOCAB, size=TOKENS).tolist(),
            behavior_logprobs=logprobs,
            sampling_logprobs=logprobs,
            topk_ids=np.zeros((TOKENS, 0), np.int32),
            topk_logprobs=np.zeros((TOKENS, 0), np.float32),
            finish_reason="length",
            text="",
            task="t",
            answer=None,
        )


def _encoded_scores() -> dict[str, bytes]:
    rng, num_tokens = np.random.default_rng(0), ROWS * TOKENS
    topk = TopK(
        ids=rng.integers(VOCAB, size=(num_tokens, K)).astype(np.int32),
        logprobs=-np.sort(rng.uniform(0, 9, (num_tokens, K)), axis=1).astype(np.float32),
        num_kept=np.full(num_tokens, K, np.uint16),
        tail_logprobs=np.full(num_tokens, -2, np.float32),
    )
    offsets = np.arange(ROWS + 1) * TOKENS
    return encode_scores(Scores(token_offsets=offsets, topk=topk), step=STEP, attributes={})


OPEN = """
import json, resource, sys, time
from pathlib import Path
import numpy
import opdcache
from opdcache.runfolder import RunFolder
from opdcache.schemas.rounds import RolloutRound, ScoreRound
from opdcache.store.cache import Cache
from opdcache.train.samples import RoundSamples

def memory_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

cache, folder = sys.argv[1:]
before, started = memory_mb(), time.perf_counter()
run = RunFolder(Path(folder))
round_samples = RoundSamples(
    Cache(cache), run.need(RolloutRound, 0), run.need(ScoreRound, 0), 4
)
order = round_samples.order(0, 0, 1)
learner_s = time.perf_counter() - started
started = time.perf_counter()
samples = opdcache.open_cache(cache).of_run(folder)
open_s, opened = time.perf_counter() - started, memory_mb()
times = []
for i in numpy.random.default_rng(0).integers(len(samples), size=1000):
    started = time.perf_counter()
    assert samples[int(i)].scores.topk is not None
    times.append(1000 * (time.perf_counter() - started))
print(json.dumps({
    "open_for_training_s": learner_s, "open_s": open_s, "open_memory_mb": opened - before,
    "peak_memory_mb": memory_mb(), "samples": len(samples),
    "sample_ms": numpy.median(times), "sample_ms_p99": numpy.percentile(times, 99),
}))
"""


def timed_ls(url: str) -> float:
    """Seconds of the command, process and all."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "opdcache.cli.main", "cache", "ls", url]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    """Fill, measure, print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, required=True)
    asked = parser.parse_args()
    url, folder = str(asked.folder / "cache"), RunFolder(asked.folder / "run")
    cache = Cache(url)
    if folder.find(ScoreRound, 0) is None:
        fill(cache, folder, asked.shards // 2)
    started = time.perf_counter()
    num_commits = sum(1 for _ in cache.objects.list("commits"))
    list_commits_s = time.perf_counter() - started
    forget(cache)
    cold, warm = timed_ls(url), timed_ls(url)
    arguments = [sys.executable, "-c", OPEN, url, str(folder.path)]
    opened = subprocess.run(arguments, check=True, capture_output=True, text=True)
    result = {
        "shards": num_commits,
        "list_commits_s": list_commits_s,
        "list_cold_s": cold,
        "list_s": warm,
        **json.loads(opened.stdout),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
