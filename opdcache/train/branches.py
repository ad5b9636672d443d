"""Rows in which several sequences stand, and whether a model keeps them apart.

Legend: B sequences, L padded length, D hidden width.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..schemas.training import Layout
from .microbatch import LAYOUTS, Fed

_PROBE_TOKENS = (8, 300, 8)
"""Of a prompt, and of two completions of it; the first is longer than small models' windows."""
_LEAKS = 0.5
"""Of the difference that no mask makes, what rounding may not explain."""


def branch_mask(model: nn.Module, branches_BL: Tensor) -> Any:
    """Mask in the form that the model's attention implementation takes: a token sees those before
    it in its row that are of the prompt or of its own completion.

    Args:
        branches_BL: see ``MicroBatch``.
    """
    from transformers.masking_utils import create_causal_mask

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        branch = branches_BL[batch, key]
        return (branch == 0) | (branch == branches_BL[batch, query])

    weight = next(model.parameters())
    return create_causal_mask(
        config=model.config.get_text_config(),  # type: ignore[union-attr,operator]
        inputs_embeds=weight.new_empty((*branches_BL.shape, 0), device=branches_BL.device),
        attention_mask=None,
        past_key_values=None,
        and_mask_function=seen,
    )


@torch.no_grad()
def refuse_leaks(model: nn.Module, layout: Layout, folder: Path) -> None:
    """Nothing, if a sequence is read in its row as it is alone: one behind a longer one is tried.

    Raises:
        ModelError: it sees the other one, or the attention cannot be masked so.
    """
    if layout == "padded":
        return
    config = model.config.get_text_config()  # type: ignore[union-attr,operator]
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if layout == "packed":
        option, remedy = "packing", "set train.packing: false"
        kinds -= {"sliding_attention", "chunked_attention"}
    else:
        option, remedy = "share_prompts", "leave out train.share_prompts"
    if layout == "shared" and not kinds and getattr(config, "sliding_window", None):
        kinds = {f"a window of {config.sliding_window} tokens"}
    if kinds:
        raise ModelError(
            f"train.{option}: not with these layers",
            where=folder,
            got=", ".join(sorted(kinds)),
            remedy=remedy,
        )
    try:
        leaks = _leaks(model, layout, config.vocab_size)
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        raise ModelError(
            f"train.{option}: the model cannot be read so: {error}", where=folder, remedy=remedy
        ) from error
    if leaks:
        raise ModelError(
            f"train.{option}: this model's sequences see one another", where=folder, remedy=remedy
        )


def _leaks(model: nn.Module, layout: Layout, vocab_size: int) -> bool:
    """Whether a sequence is not read behind another one in its row as it is alone: further from
    that than rounding explains, or about as far as without any mask."""
    rng = np.random.default_rng(0)
    prompt, first, second = (
        rng.integers(vocab_size, size=size).astype(np.int32) for size in _PROBE_TOKENS
    )
    laid = LAYOUTS[layout]([Fed(prompt, first), Fed(prompt, second)])
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    ids, positions = (torch.from_numpy(array).to(device) for array in (laid.ids, laid.positions))
    start = laid.starts[1]

    def states(ids_BL: Tensor, begin: int, **how: Any) -> Tensor:
        body = model.base_model(input_ids=ids_BL, use_cache=False, **how)  # type: ignore[operator]
        found: Tensor = body.last_hidden_state[0, begin : begin + len(second)].double()
        return found

    alone = states(torch.from_numpy(Fed(prompt, second).ids[None]).to(device), len(prompt))
    if laid.branches is None:
        ours = states(ids, start.completion, position_ids=positions)
        blind = states(ids, start.completion)
    else:
        branches = torch.from_numpy(laid.branches).to(device)
        how = {"position_ids": positions, "attention_mask": branch_mask(model, branches)}
        ours = states(ids, start.completion, **how)
        how["attention_mask"] = branch_mask(model, branches.clamp(max=0))
        blind = states(ids, start.completion, **how)
    error, size = float((ours - alone).norm()), float(alone.norm())
    eps = torch.finfo(dtype).eps
    is_blind = error > max(eps * size, _LEAKS * float((blind - alone).norm()))
    return not error <= math.sqrt(eps) * size or is_blind  # what is not a number leaks
