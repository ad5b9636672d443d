"""``train.deepspeed``: merged with what the run file decides, and refused where it contradicts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from opdcache.deepspeed_config import deepspeed_config
from opdcache.errors import ConfigError
from opdcache.runfile import load_run
from opdcache.schemas.training import OptimizerConfig, TrainConfig
from opdcache.train.learner import head_chunk_tokens

EXAMPLE: dict[str, Any] = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "hysteresis": 2},
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
    },
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "reduce_bucket_size": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}
"""The ZeRO-3 example in the documentation of transformers."""


def run_file(folder: Path, **train: object) -> Path:
    (folder / "run.yaml").write_text(
        yaml.safe_dump(
            {
                "student": {"model": "./s"},
                "teacher": {"model": "./t"},
                "prompts": {"source": {"type": "jsonl", "path": "p.jsonl"}},
                "train": train,
            }
        )
    )
    return folder / "run.yaml"


def test_a_file_is_relative_to_the_run_file_and_what_it_holds_is_the_meaning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ds").mkdir()
    (tmp_path / "ds" / "zero3.json").write_text(json.dumps(EXAMPLE))
    path = run_file(tmp_path, zero_stage=3, deepspeed="ds/zero3.json")
    monkeypatch.chdir("/")
    assert load_run(path).train.deepspeed == EXAMPLE


def test_the_usual_example_is_taken_with_auto_as_the_run_file_s_meaning() -> None:
    made = deepspeed_config(TrainConfig(zero_stage=3, deepspeed=EXAMPLE))
    plain = deepspeed_config(TrainConfig(zero_stage=3))
    assert made == {
        **plain,
        "fp16": {"enabled": False, "loss_scale": 0, "hysteresis": 2},
        "zero_optimization": {
            **plain["zero_optimization"],
            "overlap_comm": True,
            "stage3_max_live_parameters": 1e9,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "steps_per_print": 2000,
        "wall_clock_breakdown": False,
    }


def test_what_the_run_file_says_too_is_no_contradiction() -> None:
    optimizer = OptimizerConfig(lr=3e-6, schedule="cosine", max_grad_norm=0.5)
    same = {
        "gradient_clipping": 0.5,
        "train_batch_size": 32,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-6, "betas": [0.9, 0.95]}},
        "scheduler": {"type": "WarmupCosineLR"},
    }
    plain = TrainConfig(optimizer=optimizer, batch_samples=32)
    assert deepspeed_config(plain.model_copy(update={"deepspeed": same})) == deepspeed_config(plain)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"train_batch_size": 8}, "train_batch_size is 8, but train.batch_samples makes it 64"),
        (
            {"gradient_accumulation_steps": 4},
            "gradient_accumulation_steps is 4, but train.micro_batch_tokens makes it 1",
        ),
        (
            {"train_micro_batch_size_per_gpu": 2},
            "train_micro_batch_size_per_gpu is 2, but train.micro_batch_tokens makes it 1",
        ),
        (
            {"gradient_clipping": 0.5},
            "gradient_clipping is 0.5, but train.optimizer.max_grad_norm makes it 1.0",
        ),
        (
            {"zero_optimization": {"stage": 2}},
            "zero_optimization.stage is 2, but train.zero_stage makes it 1",
        ),
        ({"bf16": {"enabled": False}}, "bf16.enabled is False, but train.dtype makes it True"),
        ({"fp16": {"enabled": True}}, "fp16.enabled is True, but train.dtype makes it False"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast.enabled is True"),
        (
            {"optimizer": {"type": "Adam"}},
            "optimizer.type is Adam, but train.optimizer makes it AdamW",
        ),
        (
            {"optimizer": {"params": {"lr": 1e-5}}},
            "optimizer.params.lr is 1e-05, but train.optimizer.lr makes it 1e-06",
        ),
        ({"optimizer": {"params": {"bias_correction": False}}}, "optimizer.params.bias_correction"),
        (
            {"scheduler": {"type": "WarmupDecayLR"}},
            "scheduler.type is WarmupDecayLR, but train.optimizer.schedule makes it WarmupLR",
        ),
        ({"scheduler": {"params": {"warmup_num_steps": 5}}}, "scheduler.params.warmup_num_steps"),
        ({"fp16": True}, "fp16 is True, but train.dtype makes it False"),
        ({"gradient_clipping": {"norm": 2}}, "gradient_clipping.norm is 2, but train.optimizer"),
        ({"checkpoint": {"load_universal": True}}, "checkpoint.load_universal"),
    ],
)
def test_a_contradiction_is_refused_with_both_values_and_who_decides(
    tmp_path: Path, given: dict[str, object], said: str
) -> None:
    path = run_file(tmp_path, deepspeed=given)
    with pytest.raises(ConfigError, match="leave these out") as raised:
        load_run(path)
    assert said in str(raised.value)
    assert str(path) in str(raised.value)


def test_an_offload_says_so_in_one_place_alone() -> None:
    on_cpu = {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": True}}}
    train = TrainConfig(deepspeed=on_cpu)
    with pytest.raises(ConfigError, match=r"device is cpu, but train\.offload_optimizer makes it"):
        deepspeed_config(train)
    made = deepspeed_config(train.model_copy(update={"offload_optimizer": True}))
    assert made["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}


def test_an_offload_without_parts_is_refused(tmp_path: Path) -> None:
    path = run_file(tmp_path, dtype="float32", zero_stage=0, offload_optimizer=True)
    with pytest.raises(ConfigError, match=r"train\.offload_optimizer: it needs train\.zero_stage"):
        load_run(path)


def test_every_contradiction_of_a_file_is_named_at_once_with_the_file(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(
        json.dumps({"gradient_clipping": 2, "fp16": {"enabled": True}, "zero_optimization": {}})
    )
    with pytest.raises(ConfigError, match=r"ds\.json: .*gradient_clipping.*; fp16\.enabled"):
        load_run(run_file(tmp_path, deepspeed="ds.json"))


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "No such file"), ("{", "not JSON"), ("[1]", "not a JSON object")],
)
def test_a_file_that_holds_no_configuration_is_named(
    tmp_path: Path, content: str | None, said: str
) -> None:
    if content is not None:
        (tmp_path / "ds.json").write_text(content)
    with pytest.raises(ConfigError, match=rf"{tmp_path}/ds\.json: .*{said}"):
        load_run(run_file(tmp_path, deepspeed="ds.json"))


@pytest.mark.parametrize(("device", "expected"), [("cpu", 512), ("cuda", 2048), ("xpu", 2048)])
def test_a_head_chunk_is_larger_where_launches_are_waited_for(device: str, expected: int) -> None:
    assert head_chunk_tokens(TrainConfig(), torch.device(device)) == expected
    assert head_chunk_tokens(TrainConfig(head_chunk_tokens=7), torch.device(device)) == 7
