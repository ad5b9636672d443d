"""The same distillation by trl's ``DistillationTrainer`` and by ``opdcache run``, start to end.

    pip install trl
    python benchmarks/end_to_end.py --demo demo
    python benchmarks/end_to_end.py --student DIR --teacher DIR --out FOLDER

Both start from the same student and teacher, sample as many completions of the same prompts
(gsm_symbolic of reasoning-gym), and make as many updates of as many samples with reverse KL and
AdamW. trl samples every batch from the live student and scores it with the teacher beside it, over
the whole vocabulary; ``opdcache run`` alternates rounds with the teacher's top 64 and a tail. A
second experiment of another loss then trains on the same rounds, whose scores are cached.

Seconds are those of whole processes, from an empty cache to the last student on the disk. Both
sides sample, so their completions differ in length: speed-ups are those of completion tokens a
second. Peak memory is the largest resident set of one process; those of ``opdcache run`` do not run
together. ``--trl-batch`` and ``--trl-vllm`` try other settings of trl's.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from opdcache.runfolder import RunFolder
from opdcache.schemas.rounds import RolloutRound, ScoreRound, TrainRound
from opdcache.store.cache import Cache

LR, BETAS = 5e-5, (0.9, 0.95)
LOSSES = {"first": "reverse", "second": "forward"}
"""Direction of the KL, by run."""


def run_file(asked: argparse.Namespace, name: str) -> Path:
    """The run file of an experiment; the second takes the first's rollouts."""
    config: dict[str, Any] = {
        "seed": 0,
        "rounds": asked.rounds,
        "cache": "cache",
        "output": name,
        "student": {"model": str(asked.student.resolve())},
        "teacher": {"model": str(asked.teacher.resolve()), "dtype": asked.dtype},
        "prompts": {
            "source": {
                "type": "reasoning_gym",
                "dataset": "gsm_symbolic",
                "size": 2 * asked.prompts * asked.rounds,
                "seed": 1,
            },
            "template": "chat",
            "system": "Solve the problem.",
            "per_round": asked.prompts,
        },
        "rollout": {
            "samples_per_prompt": asked.samples,
            "sampling": {"temperature": 1.0, "max_tokens": asked.max_tokens},
            "student_topk": 16,
            "shard_samples": 128,
            "dtype": asked.dtype,
            "engine": {"max_model_len": 512, "kv_cache_memory_bytes": 2**30},
        },
        "score": {"k": 64, "batch_tokens": 1024},
        "train": {
            "loss": {
                "support": "teacher_topk",
                "direction": LOSSES[name],
                "normalisation": "tail",
                "k": 64,
            },
            "optimizer": {"lr": LR, "betas": list(BETAS)},
            "batch_samples": asked.batch,
            "micro_batch_tokens": 1024,
            "share_prompts": True,
            "dtype": asked.dtype,
            "zero_stage": 0 if asked.dtype == "float32" else 1,
            "checkpoint_every": 1000,
        },
    }
    if name == "second":
        config["rollouts"] = {"from": "first"}
    file: Path = asked.out / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    return file


def process(*command: object) -> tuple[float, int]:
    """Seconds and the largest resident set, in bytes, of a command and of what it starts."""
    began = time.perf_counter()
    started = subprocess.Popen([sys.executable, *map(str, command)])
    _, status, usage = os.wait4(started.pid, 0)
    elapsed_s = time.perf_counter() - began
    started.returncode = os.waitstatus_to_exitcode(status)
    if started.returncode:
        raise SystemExit(f"{command[0]} {command[1]}: exit code {started.returncode}")
    return elapsed_s, usage.ru_maxrss * 1024


def ours(asked: argparse.Namespace, name: str) -> dict[str, Any]:
    """An experiment by ``opdcache run``."""
    file = run_file(asked, name)
    elapsed_s, peak_bytes = process("-m", "opdcache.cli.main", "run", file)
    folder, rounds = RunFolder(asked.out / name), range(asked.rounds)
    trained = [folder.need(TrainRound, index) for index in rounds]
    seconds = {
        "rollout": sum(folder.need(RolloutRound, index).elapsed_s for index in rounds),
        "score": sum(folder.need(ScoreRound, index).elapsed_s for index in rounds),
        "train": sum(file.elapsed_s for file in trained),
    }
    return {
        "elapsed_s": elapsed_s,
        "peak_bytes": peak_bytes,
        "completions": sum(file.num_samples for file in trained),
        "tokens": sum(file.num_tokens for file in trained),
        "updates": trained[-1].num_updates,
        "stages_s": seconds,
        "between_stages_s": elapsed_s - sum(seconds.values()),
    }


def prompts_of(folder: RunFolder, cache: Cache, rounds: int) -> list[list[int]]:
    """Token ids of the prompts in the order of a run, one for every completion."""
    shards = [shard for index in range(rounds) for shard in folder.need(RolloutRound, index).shards]
    tables = [cache.read_rollouts(cache.need_rollouts(shard)) for shard in shards]
    return [ids for table in tables for ids in table.column("prompt_token_ids").to_pylist()]


def by_trl(asked: argparse.Namespace) -> dict[str, Any]:
    """The same work by trl, in a process of its own."""
    cache = Cache(str(asked.out / "cache"))
    prompts = prompts_of(RunFolder(asked.out / "first"), cache, asked.rounds)
    (asked.out / "prompts.json").write_text(json.dumps(prompts))
    names = ("student", "teacher", "out", "dtype", "batch", "max_tokens", "trl_batch")
    told = [f"--{name.replace('_', '-')}={getattr(asked, name)}" for name in names]
    told += ["--trl-vllm"] * asked.trl_vllm
    elapsed_s, peak_bytes = process(__file__, *told, "--part=trl")
    found: dict[str, Any] = json.loads((asked.out / "trl.json").read_text())
    return {"elapsed_s": elapsed_s, "peak_bytes": peak_bytes} | found


def train_by_trl(asked: argparse.Namespace) -> None:
    """What trl does, start to end."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DistillationConfig, DistillationTrainer

    tokenizer = AutoTokenizer.from_pretrained(asked.student, padding_side="left")
    prompts = json.loads((asked.out / "prompts.json").read_text())
    texts = [tokenizer.decode(ids) for ids in prompts]
    assert [tokenizer(text).input_ids for text in texts] == prompts, "the same prompts"
    config = DistillationConfig(
        output_dir=str(asked.out / "trl"),
        per_device_train_batch_size=asked.trl_batch,
        gradient_accumulation_steps=asked.batch // asked.trl_batch,
        num_train_epochs=1,
        learning_rate=LR,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        weight_decay=0.0,
        max_grad_norm=1.0,
        lr_scheduler_type="constant",
        beta=1.0,
        temperature=1.0,
        max_completion_length=asked.max_tokens,
        shuffle_dataset=False,
        gradient_checkpointing=False,
        bf16=asked.dtype == "bfloat16",
        use_cpu=not torch.accelerator.is_available(),
        use_vllm=asked.trl_vllm,
        vllm_max_model_length=512,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = DistillationTrainer(
        model=str(asked.student),
        teacher_model=str(asked.teacher),
        args=config,
        train_dataset=Dataset.from_dict({"prompt": texts}),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(str(asked.out / "trl" / "student"))
    lengths = [
        row["completions/mean_length"]
        for row in trainer.state.log_history
        if "completions/mean_length" in row
    ]
    found = {
        "completions": len(texts),
        "tokens": round(sum(lengths) * asked.batch),
        "updates": trainer.state.global_step,
        "training_s": trainer.state.log_history[-1]["train_runtime"],
    }
    (asked.out / "trl.json").write_text(json.dumps(found))


def main() -> None:
    """Measure, print a line a figure and one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--demo", type=Path, help="take its models; --out is below it")
    parser.add_argument("--student", type=Path)
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--out", type=Path, help="emptied first")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=32, help="a round")
    parser.add_argument("--samples", type=int, default=4, help="completions of a prompt")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16, help="samples an update")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--trl-batch", type=int, default=4, help="samples of one forward")
    parser.add_argument("--trl-vllm", action="store_true", help="sample with vLLM, colocated")
    parser.add_argument("--part", choices=["trl"], help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.part == "trl":
        train_by_trl(asked)
        return
    if asked.demo is not None:
        asked.student, asked.teacher = (asked.demo / "models" / n for n in ("student", "teacher"))
        asked.out = asked.out or asked.demo / "end-to-end"
    if not (asked.student and asked.teacher and asked.out):
        parser.error("give --demo, or --student, --teacher and --out")
    shutil.rmtree(asked.out, ignore_errors=True)
    asked.out.mkdir(parents=True)
    first, second = ours(asked, "first"), ours(asked, "second")
    trl = by_trl(asked)
    for found in (first, second, trl):
        found["tokens_per_s"] = found["tokens"] / found["elapsed_s"]
    for name, found in (("opdcache", first), ("opdcache, scores cached", second), ("trl", trl)):
        print(name)
        for key, value in found.items():
            print(f"  {key:20} {value}")
    print(
        json.dumps(
            {
                "speedup_over_trl": first["tokens_per_s"] / trl["tokens_per_s"],
                "speedup_over_trl_reusing_cache": second["tokens_per_s"] / trl["tokens_per_s"],
                "peak_memory_over_trl": first["peak_bytes"] / trl["peak_bytes"],
                "opdcache": first,
                "opdcache_reusing_cache": second,
                "trl": trl,
            }
        )
    )


if __name__ == "__main__":
    main()
