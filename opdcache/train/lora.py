"""The one door to peft: low-rank adapters in a student, and the student with them merged.

What is trained are the adapters' weights alone. LM head and embeddings stay as they are.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, NotInstalled
from ..models import load_model
from ..schemas.training import LoraConfig

_SEED = 0


def add_adapters(model: nn.Module, config: LoraConfig, where: Path) -> None:
    """Freeze a causal LM, and put adapters into it that change nothing yet; the same in every
    process.

    Args:
        where: the model's folder, for errors.

    Raises:
        ConfigError: it has no such modules, or they are its LM head or embeddings.
        NotInstalled: peft is not there.
    """
    peft = _peft()
    with torch.random.fork_rng():
        torch.manual_seed(_SEED)
        try:
            peft.inject_adapter_in_model(_peft_config(config), model)
        except ValueError as error:
            raise ConfigError(f"train.lora.target_modules: {error}", where=where) from error
    ends = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
    if any(hasattr(end, "base_layer") for end in ends):
        raise ConfigError(
            "train.lora.target_modules: the LM head and the embeddings are not trained",
            where=where,
            remedy="leave them out",
        )


def save_merged(
    draft: Path, folder: Path, config: LoraConfig, adapters: Mapping[str, Tensor], dtype: str
) -> None:
    """Write a model with its trained adapters merged, and these alone if the run file asks for it.

    They are merged in float32, and rounded once.

    Args:
        folder: the model that ``add_adapters`` was called with.
        adapters: their weights, by the names that they have there.
    """
    base = load_model(folder, "float32", torch.device("cpu"))
    model = _peft().get_peft_model(base, _peft_config(config))
    named = {f"base_model.model.{name}": weight for name, weight in adapters.items()}
    assert named.keys() == {name for name, w in model.named_parameters() if w.requires_grad}
    model.load_state_dict(named, strict=False)
    if config.export_adapter:
        model.save_pretrained(draft / "adapter")
    model.merge_and_unload().to(getattr(torch, dtype)).save_pretrained(draft)


def _peft_config(config: LoraConfig) -> Any:
    targets = config.target_modules
    return _peft().LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )


def _peft() -> Any:
    try:
        import peft
    except ModuleNotFoundError as error:
        raise NotInstalled(
            "peft is not installed", remedy="pip install 'opdcache[lora]'"
        ) from error
    return peft
