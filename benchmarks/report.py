"""What a report of very many tokens costs: its size, its time, its memory.

    python benchmarks/report.py --tokens 10000000 --folder /tmp/report

A few distinct synthetic shards are committed again and again under other keys, as the rounds of one
run, so that they are cheap to make and all of them are read. The folder is filled once, and used
again when it is there.

- ``report_bytes``, ``report_s``, ``report_memory_mb``: ``opdcache report`` in a process of its own,
  and the most memory that it held.
- ``audit_s``, ``audit_tokens_per_s``, ``audit_memory_mb``: reading and adding up alone.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from opdcache import documents
from opdcache.identity import content_hash, key_of
from opdcache.runfile import load_run
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
    Resolved,
    RolloutRound,
    RolloutShard,
    ScoredShard,
    ScoreRound,
    ServedColumns,
)
from opdcache.store import codec, rollouts
from opdcache.store.cache import Cache, as_listed
from opdcache.store.encoding import encode_scores
from opdcache.store.scores import GROUP, Scores, StudentTopK, TopK

ROWS, K, VOCAB, STEP, ROUNDS, DISTINCT = 256, 16, 50_000, 1 / 256, 5, 2
MOST_TOKENS = 800
COLUMNS = ("entropy", "sampled", "student_topk", "topk")
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


class Distinct:
    """A shard's contents. Both models' entries are the same ids, the teacher's two places on."""

    def __init__(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        lengths = random.integers(1, MOST_TOKENS + 1, ROWS)
        self.offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.num_tokens = int(self.offsets[-1])
        ids_TS = random.integers(VOCAB, size=(self.num_tokens, 1)) + 97 * np.arange(K + 2)
        self.ids_TS = (ids_TS % VOCAB).astype(np.int32)
        self.p_TK, self.q_TK = (self._logprobs(random) for _ in range(2))
        self.table = rollouts.rollout_table([self._completion(row) for row in range(ROWS)])
        self.content = content_hash(self.table)
        self.rows = rollouts.encode_rollouts(self.table)

    def _logprobs(self, random: np.random.Generator) -> codec.Floats:
        steps_TK = random.exponential(0.5, (self.num_tokens, K)).cumsum(axis=1)
        all_T1 = np.logaddexp.reduce(-steps_TK, axis=1, keepdims=True)
        return np.asarray(np.log(0.9) - steps_TK - all_T1, np.float32)

    def _completion(self, row: int) -> rollouts.Completion:
        at = slice(*self.offsets[row : row + 2].tolist())
        sampled = self.p_TK[at, 2]
        return rollouts.Completion(
            prompt_id=f"{row // 4}",
            sample_index=row % 4,
            prompt_token_ids=[1, 2, row // 4],
            completion_token_ids=self.ids_TS[at, 2].tolist(),
            behavior_logprobs=sampled,
            sampling_logprobs=sampled,
            topk_ids=self.ids_TS[at, :K],
            topk_logprobs=self.p_TK[at],
            finish_reason="stop",
            text=f"text {row} " * 20,
            task="t",
            answer=None,
        )

    def scores(self) -> dict[str, bytes]:
        """The teacher's, encoded."""
        num, tail = self.num_tokens, np.full(self.num_tokens, np.log(0.1), np.float32)
        of_recorded = np.concatenate([np.full((num, 2), -9, np.float32), self.q_TK[:, :-2]], axis=1)
        scores = Scores(
            token_offsets=self.offsets,
            sampled_logprobs=self.q_TK[:, 0],
            entropy=np.full(num, 2, np.float32),
            topk=TopK(self.ids_TS[:, 2:], self.q_TK, np.full(num, K, np.uint16), tail),
            student_topk=StudentTopK(of_recorded, tail),
        )
        return encode_scores(scores, step=STEP, attributes={})


def fill(folder: Path, num_tokens: int) -> int:
    """A run of so many tokens; gives how many there are."""
    path, cache = folder / "run.yaml", Cache(str(folder / "cache"))
    config = {
        "rounds": ROUNDS,
        "cache": "cache",
        "student": {"model": "none"},
        "teacher": {"model": "none"},
        "prompts": {"source": {"type": "jsonl", "path": "none"}},
    }
    path.write_text(yaml.safe_dump(config))
    distinct = [Distinct(seed) for seed in range(DISTINCT)]
    served = [_commit_scores(cache, one) for one in distinct]
    run, made = RunFolder(folder / "run"), 0
    for index in range(ROUNDS):
        shards = list[RolloutShard]()
        while made + sum(s.num_tokens for s in shards) < num_tokens * (index + 1) / ROUNDS:
            name = f"{index} {len(shards)}"
            shards.append(_commit_rollouts(cache, distinct[len(shards) % DISTINCT], name))
        made += sum(shard.num_tokens for shard in shards)
        listed = tuple(
            ScoredShard(
                content=shard.content,
                teacher=TEACHER,
                served=(served[i % DISTINCT],),
                cached=False,
            )
            for i, shard in enumerate(shards)
        )
        run.write(
            RolloutRound(round=index, student="s", shards=tuple(shards), dropped={}, elapsed_s=0.0)
        )
        run.write(ScoreRound(round=index, shards=listed, elapsed_s=0.0))
    resolved = Resolved(
        run_id="large",
        opdcache="0",
        config=load_run(path),
        student="s",
        teacher=TEACHER,
        vocabulary="v",
        tokenizers="t",
        vocab_size=VOCAB,
    )
    documents.create(run.path / "resolved.json", resolved)
    return made


def _commit_rollouts(cache: Cache, one: Distinct, name: str) -> RolloutShard:
    identity = RolloutIdentity(
        student="s",
        vocabulary="v",
        eos_token_id=None,
        prompts=name,
        labels="l",
        seeds="s",
        num_requests=ROWS,
        sampling=Sampling(),
        engine={"dtype": "float32"},
        student_topk=K,
    )
    attempt = cache.attempt(key_of(identity))
    attempt.put(rollouts.FILE, one.rows)
    manifest = RolloutManifest(
        key=key_of(identity),
        attempt=attempt.name,
        objects=tuple(attempt.entries),
        num_rows=ROWS,
        num_tokens=one.num_tokens,
        dropped={},
        provenance=MADE_BY,
        identity=identity,
        content=one.content,
        num_prompt_tokens=3 * ROWS,
        vocab_size=VOCAB,
        task="t",
    )
    cache.commit(attempt, manifest)
    return as_listed(manifest, cached=False)


def _commit_scores(cache: Cache, one: Distinct) -> ServedColumns:
    identity = ScoreIdentity(
        content=one.content,
        teacher=TEACHER,
        rendering=AS_SAMPLED,
        dtype="float32",
        columns=COLUMNS,
        k=K,
        mass=1.0,
        num_ids=VOCAB,
        step=STEP,
    )
    attempt = cache.attempt(key_of(identity))
    for path, data in one.scores().items():
        attempt.put(f"{GROUP}/{path}", data)
    manifest = ScoreManifest(
        key=key_of(identity),
        attempt=attempt.name,
        objects=tuple(attempt.entries),
        num_rows=ROWS,
        num_tokens=one.num_tokens,
        dropped={},
        provenance=MADE_BY,
        identity=identity,
        rollout_key="0" * 64,
        vocab_size=VOCAB,
        clip_floor=codec.clip_floor(STEP),
    )
    cache.commit(attempt, manifest)
    return ServedColumns(key=manifest.key, columns=COLUMNS)


WORK = """
import json, resource, sys, time
from pathlib import Path
run, what = Path(sys.argv[1]), sys.argv[2]
started = time.perf_counter()
if what == "audit":
    from opdcache.audit.run import audit
    from opdcache.audit.targets import of_run
    found = audit(of_run(run))
    tokens = {"tokens": sum(part.completions.num_tokens for part in found.parts)}
else:
    from opdcache.audit.report import report
    (file,) = report(run, run.with_suffix(".html"))
    tokens = {"bytes": file.stat().st_size}
elapsed_s = time.perf_counter() - started
peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"s": elapsed_s, "memory_mb": peak_mb, **tokens}))
"""


def measured(run: Path, what: str) -> dict[str, Any]:
    """Seconds, memory and size of one piece of work, in a process of its own."""
    arguments = [sys.executable, "-c", WORK, str(run), what]
    done = subprocess.run(arguments, check=True, capture_output=True, text=True)
    return {f"{what}_{name}": value for name, value in json.loads(done.stdout).items()}


def main() -> None:
    """Fill, measure, print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path, required=True)
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    if not (asked.folder / "run" / "resolved.json").exists():
        fill(asked.folder, asked.tokens)
    run = asked.folder / "run.yaml"
    result = measured(run, "audit") | measured(run, "report")
    result["audit_tokens_per_s"] = result["audit_tokens"] / result["audit_s"]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
