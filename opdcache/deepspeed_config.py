"""DeepSpeed's configuration: what the run file means to it, and what its writer adds to that.

It is plain data, so that a contradiction is found when the run file is read.
"""

from collections.abc import Iterator, Mapping
from operator import eq
from typing import Any

from pydantic import JsonValue

from .errors import ConfigError
from .schemas.training import TrainConfig

_AUTO = "auto"
_ITSELF = "the learner"
_SCHEDULERS = {"constant": "WarmupLR", "linear": "WarmupDecayLR", "cosine": "WarmupCosineLR"}
_NOT_TOLD = frozenset({"train_batch_size", "optimizer", "scheduler"})
"""Parts that DeepSpeed is not told, since the learner does itself what they are about."""


def deepspeed_config(train: TrainConfig, where: object = None) -> dict[str, Any]:
    """What DeepSpeed is told: what follows from the run file, and what else is in
    ``train.deepspeed``. A value "auto" there means the former, or DeepSpeed's own default.

    Args:
        where: the file that holds it, for the error.

    Raises:
        ConfigError: it contradicts the run file; all keys that do are named.
    """
    assert isinstance(train.deepspeed, dict), "a file is read with the run file"
    decided = _decided(train)
    given = {path: value for path, value in _leaves(train.deepspeed) if value != _AUTO}
    contradictions = []
    for path, value in given.items():
        same = [place for place in decided if all(map(eq, place, path))]  # or within the other
        ours, says = decided[same[0]] if same else ("nothing", "train.optimizer")
        agrees = same == [path] and value == ours
        is_free = not same and path[0] not in _NOT_TOLD
        if not agrees and not is_free:
            contradictions.append(f"{'.'.join(path)} is {value}, but {says} makes it {ours}")
    if contradictions:
        raise ConfigError(
            f"train.deepspeed: {'; '.join(contradictions)}",
            where=where,
            remedy="leave these out there, or say 'auto'",
        )
    made: dict[str, Any] = {"steps_per_print": 2**31}
    for path, value in {**given, **{path: ours for path, (ours, _) in decided.items()}}.items():
        if path[0] not in _NOT_TOLD:
            part = made
            for key in path[:-1]:
                part = part.setdefault(key, {})
            part[path[-1]] = value
    return made


def _decided(train: TrainConfig) -> Mapping[tuple[str, ...], tuple[JsonValue, str]]:
    """Every key that the run file decides: its value, and what says so."""
    optimizer, micro = train.optimizer, "train.micro_batch_tokens"
    decided: dict[str, tuple[JsonValue, str]] = {
        "train_batch_size": (train.batch_samples, "train.batch_samples"),
        "train_micro_batch_size_per_gpu": (1, micro),
        "gradient_accumulation_steps": (1, micro),
        "managed_gradient_accumulation": (False, micro),
        "gradient_clipping": (optimizer.max_grad_norm, "train.optimizer.max_grad_norm"),
        "zero_optimization.stage": (train.zero_stage, "train.zero_stage"),
        "zero_optimization.offload_optimizer.device": (
            "cpu" if train.offload_optimizer else "none",
            "train.offload_optimizer",
        ),
        "zero_force_ds_cpu_optimizer": (False, _ITSELF),  # that one is compiled at every start
        "zero_optimization.load_from_fp32_weights": (True, _ITSELF),
        "zero_allow_untested_optimizer": (True, _ITSELF),
        "checkpoint.load_universal": (False, _ITSELF),
        "tensor_parallel.autotp_size": (0, _ITSELF),
        "bf16.enabled": (train.dtype == "bfloat16", "train.dtype"),
        "bf16.bf16_master_weights_and_grads": (False, _ITSELF),
        "bf16.check_grad_overflow": (True, _ITSELF),
        "fp16.enabled": (False, "train.dtype"),
        "torch_autocast.enabled": (False, "train.dtype"),
        "data_types.grad_accum_dtype": ("fp32", _ITSELF),
        "optimizer.type": ("AdamW", "train.optimizer"),
        "optimizer.params.lr": (optimizer.lr, "train.optimizer.lr"),
        "optimizer.params.betas": (list(optimizer.betas), "train.optimizer.betas"),
        "optimizer.params.eps": (optimizer.eps, "train.optimizer.eps"),
        "optimizer.params.weight_decay": (optimizer.weight_decay, "train.optimizer.weight_decay"),
        "scheduler.type": (_SCHEDULERS[optimizer.schedule], "train.optimizer.schedule"),
    }
    return {tuple(name.split(".")): decision for name, decision in decided.items()}


def _leaves(
    value: JsonValue, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], JsonValue]]:
    """What stands in nested objects, and where."""
    if not isinstance(value, dict):
        yield path, value
        return
    for key, inner in value.items():
        yield from _leaves(inner, (*path, key))
