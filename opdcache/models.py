"""Loading causal LMs in Hugging Face format, on whatever device torch finds."""

import gc
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import JsonValue
from torch import nn

from .errors import ModelError


def load_model(
    folder: Path, dtype: str, device: torch.device, arguments: Mapping[str, JsonValue] | None = None
) -> nn.Module:
    """A causal LM in the given dtype, on the device, in evaluation mode.

    Args:
        arguments: more of ``from_pretrained``; with a ``device_map`` among them the model stays
            where that puts it.

    Raises:
        ModelError: transformers cannot load it.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), **(arguments or {})
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"cannot be loaded: {reason}", where=folder) from error
    return (model if "device_map" in (arguments or {}) else model.to(device)).eval()


def default_device() -> torch.device:
    """The accelerator that torch finds, or the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator or torch.device("cpu")


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, on an accelerator or on the CPU, where torch has no class for it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def free_memory() -> None:
    """Give an accelerator's cached memory back, so that other sizes fit into it."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
