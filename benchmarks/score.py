"""The score stage beside what a script would do: tokens a second of each, from one run.

    python benchmarks/score.py --model DIR --rollouts FILE
    python benchmarks/score.py --demo demo

FILE is a rollout shard (``rollouts.parquet``). With ``--demo`` the model is the teacher of a
finished demo, and the rollouts are those of its first round.

Rates count completion tokens. ``bare_hidden``: a loop of transformers forwards to hidden states, in
batches of about equal length; ``bare_topk``: the same with the head on completion positions, one
``log_softmax`` over the whole vocabulary in float32 and one ``topk``; ``stage``: this project's,
with every default column, from reading the rollouts to committing the scores, its model loaded
before; ``stage_draws``: with twelve draws a token on top; ``vllm``: ``LLM.generate`` with prompt
log-probs, its engine started before. The torch ones take turns in one process; medians are told.

Peak memory is the resident set of a process that scores one shard of the rollouts, and of their
multiples; ``peak_memory_bytes`` is that of the largest.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa

from opdcache.identity import content_hash, digest, key_of
from opdcache.runfolder import RunContext, RunFolder, open_run
from opdcache.schemas.config import RunConfig
from opdcache.schemas.manifests import ImportIdentity, RolloutManifest
from opdcache.schemas.rounds import RolloutRound
from opdcache.score import stage
from opdcache.score.backends import load_teacher
from opdcache.score.teacher import by_length
from opdcache.stage import Silent, Worker, provenance
from opdcache.store import rollouts as shards
from opdcache.store.cache import Cache, as_listed

NUM_DRAWS = 12
MOST_COPIES = 4


@dataclass(frozen=True)
class Case:
    """What is scored, with what."""

    model: Path
    rollouts: list[Path]
    dtype: str
    k: int
    batch_tokens: int

    @property
    def table(self) -> pa.Table:
        """All rollouts, a row a completion."""
        read = [shards.decode_rollouts(path.read_bytes()) for path in self.rollouts]
        return pa.concat_tables(read, promote_options="default").combine_chunks()


def of_demo(folder: Path, asked: argparse.Namespace) -> Case:
    """The first round of a finished demo."""
    run = RunFolder(folder / "run")
    resolved = run.resolved()
    assert resolved is not None, f"{folder} is no finished demo"
    cache, config = Cache(resolved.config.cache), resolved.config
    files = []
    for shard in run.need(RolloutRound, 0).shards:
        manifest = cache.need_rollouts(shard)
        prefix = f"data/{manifest.key[:2]}/{manifest.key}/{manifest.attempt}"
        files.append(Path(config.cache) / prefix / shards.FILE)
    return Case(
        Path(config.teacher.model),
        files,
        asked.dtype or config.teacher.dtype,
        asked.k or config.score.k,
        asked.batch_tokens or config.score.batch_tokens,
    )


def prepared(home: Path, case: Case, copies: int = 1, draws: int = 0) -> RunContext:
    """A run in an empty folder whose round 0 has sampled the rollouts, as one shard."""
    config = RunConfig.model_validate(
        {
            "cache": str(home / "cache"),
            "output": str(home / "run"),
            "student": {"model": str(case.model)},
            "teacher": {"model": str(case.model), "dtype": case.dtype},
            "prompts": {"source": {"type": "jsonl", "path": "not read"}},
            "rollouts": {"from": str(home / "run")},
            "score": {"k": case.k, "batch_tokens": case.batch_tokens, "draws": draws},
            "train": {"loss": {"support": "teacher_topk", "k": case.k}},
        }
    )
    context = open_run(config, Silent(), Worker())
    table = pa.concat_tables([case.table] * copies).combine_chunks()
    manifest = committed(context, table)
    listed = (as_listed(manifest, cached=True),)
    fingerprint = context.resolved.student
    context.folder.write(
        RolloutRound(round=0, student=fingerprint, shards=listed, dropped={}, elapsed_s=0)
    )
    return context


def committed(context: RunContext, table: pa.Table) -> RolloutManifest:
    """The rollouts as one shard of the run's cache."""
    cache, content = context.cache, content_hash(table)
    identity = ImportIdentity(
        student=context.resolved.student,
        vocabulary=context.resolved.vocabulary,
        content=content,
        labels=digest("benchmark"),
        behavior_logprobs=None,
        sampling_logprobs=None,
        loss_mask=None,
    )
    attempt = cache.attempt(key_of(identity))
    attempt.put(shards.FILE, shards.encode_rollouts(table))
    num_tokens = int(shards.token_offsets(table)[-1])
    manifest = RolloutManifest(
        key=key_of(identity),
        attempt=attempt.name,
        objects=tuple(attempt.entries),
        num_rows=table.num_rows,
        num_tokens=num_tokens,
        dropped={},
        provenance=provenance("benchmark", started=time.monotonic(), num_tokens=0, details={}),
        identity=identity,
        content=content,
        num_prompt_tokens=sum(map(len, shards.token_lists(table, "prompt_token_ids"))),
        vocab_size=context.resolved.vocab_size,
        task="benchmark",
    )
    cache.commit(attempt, manifest)
    return manifest


def stage_s(case: Case, copies: int = 1, draws: int = 0) -> float:
    """Seconds of the whole stage in an empty cache, its model loaded before."""
    with tempfile.TemporaryDirectory() as home:
        context = prepared(Path(home), case, copies, draws)
        teacher = load_teacher(context, context.config.teacher)
        with mock.patch.object(stage, "load_teacher", return_value=teacher):
            started = time.perf_counter()
            stage.run(context, 0)
            return time.perf_counter() - started


@dataclass(frozen=True)
class Sequences:
    """Token ids of whole sequences, and where their completions begin."""

    whole: list[list[int]]
    starts: list[int]

    @classmethod
    def of(cls, table: pa.Table) -> "Sequences":
        prompts = table.column("prompt_token_ids").to_pylist()
        completions = table.column("completion_token_ids").to_pylist()
        whole = [p + c for p, c in zip(prompts, completions, strict=True)]
        return cls(whole, [len(p) for p in prompts])


class Bare:
    """What a script would do with transformers."""

    def __init__(self, case: Case, table: pa.Table) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
        dtype = getattr(torch, case.dtype)
        self._model = AutoModelForCausalLM.from_pretrained(case.model, dtype=dtype).to(device)
        self._sequences, self._case, self._device = Sequences.of(table), case, device

    def hidden_s(self) -> float:
        """Seconds of all forwards to hidden states."""
        import torch

        started = time.perf_counter()
        for _ in self._hidden():
            pass
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return time.perf_counter() - started

    def topk_s(self) -> float:
        """Seconds with the head, a log-softmax and a top-k at completion positions."""
        import torch

        started = time.perf_counter()
        with torch.no_grad():
            for hidden_TD in self._hidden():
                logits_TV = self._model.lm_head(hidden_TD).float()
                top = torch.log_softmax(logits_TV, dim=-1).topk(self._case.k, dim=-1)
                top.values.cpu(), top.indices.cpu()
        return time.perf_counter() - started

    def _hidden(self) -> Iterator[Any]:
        import torch

        whole, starts = self._sequences.whole, self._sequences.starts
        lengths = np.asarray([len(ids) for ids in whole])
        for rows in by_length(lengths, self._case.batch_tokens):
            padded = np.zeros((len(rows), max(len(whole[r]) for r in rows)), np.int64)
            for place, row in enumerate(rows):
                padded[place, : len(whole[row])] = whole[row]
            with torch.no_grad():
                ids = torch.from_numpy(padded).to(self._device)
                states = self._model.model(input_ids=ids, use_cache=False).last_hidden_state
            yield torch.cat(
                [states[p, starts[r] - 1 : len(whole[r]) - 1] for p, r in enumerate(rows)]
            )


def torch_rates(case: Case, repeats: int) -> dict[str, Any]:
    """Completion tokens a second, each a median of turns."""
    table = case.table
    bare, num_tokens = Bare(case, table), int(shards.token_offsets(table)[-1])
    turns: dict[str, list[float]] = {}
    for _ in range(repeats):
        for name, measure in (
            ("bare_hidden", bare.hidden_s),
            ("bare_topk", bare.topk_s),
            ("stage", lambda: stage_s(case)),
            ("stage_draws", lambda: stage_s(case, draws=NUM_DRAWS)),
        ):
            turns.setdefault(name, []).append(measure())
    rates = {f"{name}_tokens_per_s": num_tokens / median(of) for name, of in turns.items()}
    return {"num_tokens": num_tokens, "num_sequences": table.num_rows, **rates}


def vllm_rates(case: Case, repeats: int) -> dict[str, Any]:
    """Completion tokens a second of vLLM's prompt log-probs."""
    # On the terms of the project's own engine: in this process, and silent.
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    import torch
    from vllm import LLM, SamplingParams, TokensPrompt

    sequences = Sequences.of(case.table)
    num_tokens = sum(map(len, sequences.whole)) - sum(sequences.starts)
    on_cpu = not torch.accelerator.is_available()
    arguments: dict[str, Any] = (
        {"enforce_eager": True, "enable_chunked_prefill": False} if on_cpu else {}
    )
    longest = max(map(len, sequences.whole))
    llm = LLM(
        model=str(case.model),
        dtype=case.dtype,
        enable_prefix_caching=False,
        max_logprobs=case.k,
        max_model_len=longest + 1,
        **arguments,
    )
    ask = SamplingParams(max_tokens=1, prompt_logprobs=case.k, flat_logprobs=True, detokenize=False)
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in sequences.whole]
    turns = []
    for _ in range(repeats):
        started = time.perf_counter()
        llm.generate(prompts, ask, use_tqdm=False)
        turns.append(time.perf_counter() - started)
    return {"vllm_tokens_per_s": num_tokens / median(turns)}


def peak(case: Case, copies: int) -> dict[str, Any]:
    """Peak resident memory of this process, which scores the rollouts so many times over."""
    stage_s(case, copies)
    return {"peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def part(name: str, asked: Sequence[str], **more: object) -> dict[str, Any]:
    """A part of the benchmark in a process of its own."""
    options = [text for key, value in more.items() for text in (f"--{key}", str(value))]
    command = [sys.executable, __file__, *asked, "--part", name, *options]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Measure, print a line a figure and one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--demo", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--rollouts", type=Path, nargs="+")
    parser.add_argument("--dtype", help="the demo's, or bfloat16")
    parser.add_argument("--k", type=int, help="the demo's, or 16")
    parser.add_argument("--batch-tokens", type=int, help="the demo's, or 8192")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--part", choices=["torch", "vllm", "peak"], help=argparse.SUPPRESS)
    parser.add_argument("--copies", type=int, default=1, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.demo is not None:
        case = of_demo(asked.demo, asked)
    elif asked.model is not None and asked.rollouts:
        size = asked.batch_tokens or 8192
        rollouts = [path.resolve() for path in asked.rollouts]
        case = Case(asked.model.resolve(), rollouts, asked.dtype or "bfloat16", asked.k or 16, size)
    else:
        parser.error("give --demo, or --model and --rollouts")
    match asked.part:
        case "torch":
            print(json.dumps(torch_rates(case, asked.repeats)))
        case "vllm":
            print(json.dumps(vllm_rates(case, asked.repeats)))
        case "peak":
            print(json.dumps(peak(case, asked.copies)))
        case _:
            print(json.dumps(measured(case, sys.argv[1:])))


def measured(case: Case, asked: Sequence[str]) -> dict[str, Any]:
    """Every figure, each part in a process of its own."""
    found: dict[str, Any] = {
        "dtype": case.dtype,
        "k": case.k,
        "batch_tokens": case.batch_tokens,
    }
    found |= part("torch", asked) | part("vllm", asked)
    peaks = {n: part("peak", asked, copies=n)["peak_memory_bytes"] for n in (1, MOST_COPIES)}
    stage_rate = found["stage_tokens_per_s"]
    found |= {
        "stage_over_bare_hidden": stage_rate / found["bare_hidden_tokens_per_s"],
        "stage_over_bare_topk": stage_rate / found["bare_topk_tokens_per_s"],
        "stage_over_vllm": stage_rate / found["vllm_tokens_per_s"],
        "peak_memory_bytes": peaks[MOST_COPIES],
        "peak_memory_bytes_by_copies": {str(n): size for n, size in peaks.items()},
    }
    for name, value in found.items():
        print(f"{name:32} {value}")
    return found


if __name__ == "__main__":
    main()
