"""The rollout stage beside a bare ``LLM.generate``: completion tokens a second, from one run.

    python benchmarks/rollout.py --model DIR --prompts FILE.jsonl [--max-tokens 128]
    python benchmarks/rollout.py --demo demo

With ``--demo`` the model is the student of a finished demo, and the requests are those of its first
round. All use one engine and one tokenizer, loaded before any clock, and the same requests in the
same batches:
``bare`` asks for what the stage records (log-probs of the sampled token and of the top-k);
``bare_sampled`` for the sampled token's alone; ``bare_tokens`` for no log-probs. ``stage`` is this
project's, from reading the prompts to committing the shards. They take turns; medians are told.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

from opdcache.rollout import generator, stage
from opdcache.rollout.engine import Sampler
from opdcache.runfile import load_run
from opdcache.runfolder import RunContext, open_run
from opdcache.schemas.config import RunConfig
from opdcache.schemas.rounds import RolloutRound
from opdcache.stage import Silent, Worker


def config_of(asked: argparse.Namespace) -> RunConfig:
    """The demo's run without its evaluation, or one of the model and prompts that were given."""
    if asked.demo is not None:
        config = load_run(asked.demo / "run.yaml")
        return config.model_copy(update={"rounds": 1, "evaluation": None})
    return RunConfig.model_validate(
        {
            "student": {"model": str(asked.model.resolve())},
            "teacher": {"model": str(asked.model.resolve())},
            "prompts": {
                "source": {"type": "jsonl", "path": str(asked.prompts.resolve())},
                "per_round": asked.num_prompts,
            },
            "rollout": {
                "samples_per_prompt": asked.samples_per_prompt,
                "sampling": {"max_tokens": asked.max_tokens},
                "dtype": asked.dtype,
                "engine": {"max_model_len": 1024 + asked.max_tokens},
            },
        }
    )


def opened(config: RunConfig, home: Path) -> RunContext:
    """The run in an empty folder, with an empty cache."""
    places = {"cache": str(home / "cache"), "output": str(home / "run")}
    return open_run(config.model_copy(update=places), Silent(), Worker())


class Turns:
    """What takes turns, on one engine."""

    def __init__(self, config: RunConfig, plan: stage.RolloutPlan, sampler: Sampler) -> None:
        self._config, self._sampler = config, sampler
        self._batches = [(task.requests, task.seeds) for task in plan.parts[RolloutRound].tasks]

    def bare(self, logprobs: int | None) -> tuple[int, float]:
        """Every batch through ``LLM.generate``; gives the completion tokens, and seconds."""
        from vllm import SamplingParams, TokensPrompt

        sampling = self._config.rollout.sampling
        shared = sampling.model_dump(exclude={"stop", "max_tokens"}) | {"logprobs": logprobs}
        shared |= {"stop": list(sampling.stop)}
        room = self._sampler.engine.max_model_len
        num_tokens, started = 0, time.perf_counter()
        for requests, seeds in self._batches:
            self._sampler.engine.forget()
            outputs = self._sampler.engine.llm.generate(
                [TokensPrompt(prompt_token_ids=list(r.rendered.token_ids)) for r in requests],
                [
                    SamplingParams(
                        **shared,
                        max_tokens=min(sampling.max_tokens, room - len(r.rendered.token_ids)),
                        seed=seed,
                        flat_logprobs=True,
                    )
                    for r, seed in zip(requests, seeds, strict=True)
                ],
                use_tqdm=False,
            )
            num_tokens += sum(len(output.outputs[0].token_ids) for output in outputs)
        return num_tokens, time.perf_counter() - started

    def stage(self) -> tuple[int, float]:
        """The stage in an empty cache; gives the completion tokens, and seconds without opening
        the run."""
        kept = mock.patch.object(generator, "Sampler", return_value=_Kept(self._sampler))
        with kept, tempfile.TemporaryDirectory() as home:
            context = opened(self._config, Path(home))
            started = time.perf_counter()
            stage.run(context, 0)
            elapsed_s = time.perf_counter() - started
            shards = context.folder.need(RolloutRound, 0).shards
            return sum(shard.num_tokens for shard in shards), elapsed_s


class _Kept:
    """A sampler that the stage does not stop."""

    def __init__(self, sampler: Sampler) -> None:
        self.sample = sampler.sample

    def close(self) -> None:
        """Nothing: it takes more turns."""


def rates(
    turns: Sequence[tuple[str, Callable[[], tuple[int, float]]]], repeats: int
) -> dict[str, float]:
    """Completion tokens a second of each, a median of turns after one that warms up."""
    found: dict[str, list[float]] = {name: [] for name, _ in turns}
    turns[0][1]()
    for _ in range(repeats):
        for name, run in turns:
            num_tokens, elapsed_s = run()
            found[name].append(num_tokens / elapsed_s)
    return {f"{name}_tokens_per_s": median(values) for name, values in found.items()}


def measured(config: RunConfig, repeats: int) -> dict[str, Any]:
    """Every figure."""
    with tempfile.TemporaryDirectory() as home:
        plan = stage.plan_round(opened(config, Path(home)), 0)
    rollout = config.rollout
    assert rollout.sampling.is_plain, "elsewhere the stage reads every completion once more"
    sampler = Sampler(
        plan.policy.folder,
        dtype=rollout.dtype,
        processed=not rollout.sampling.is_plain,
        topk=rollout.student_topk,
        arguments=rollout.engine,
    )
    turn = Turns(config, plan, sampler)
    try:
        found: dict[str, Any] = rates(
            [
                ("bare", lambda: turn.bare(rollout.student_topk)),
                ("stage", turn.stage),
                ("bare_sampled", lambda: turn.bare(0)),
                ("bare_tokens", lambda: turn.bare(None)),
            ],
            repeats,
        )
    finally:
        sampler.close()
    bare = found["bare_tokens_per_s"]
    found |= {
        "student_topk": rollout.student_topk,
        "num_requests": sum(len(t.requests) for t in plan.parts[RolloutRound].tasks),
        "stage_over_bare": found["stage_tokens_per_s"] / bare,
        "topk_over_no_logprobs": bare / found["bare_tokens_tokens_per_s"],
        "sampled_over_no_logprobs": found["bare_sampled_tokens_per_s"]
        / found["bare_tokens_tokens_per_s"],
    }
    return found


def main() -> None:
    """Measure, print a line a figure and one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--demo", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--num-prompts", type=int, default=32)
    parser.add_argument("--samples-per-prompt", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    if asked.demo is None and (asked.model is None or asked.prompts is None):
        parser.error("give --demo, or --model and --prompts")
    found = measured(config_of(asked), asked.repeats)
    for name, value in found.items():
        print(f"{name:28} {value}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
