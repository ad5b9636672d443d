"""Rows in which several sequences stand, and whether a model keeps them apart.

Legend: B sequences, L padded length, D hidden width.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..schemas.training import Layout
from .microbatch import LAYOUTS, Fed

_LEAKS = 0.5
"""Of the difference that seeing the other sequence makes, what rounding may not explain."""


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
    """Nothing, if a sequence is read in its row as it is alone.

    Raises:
        ModelError: it sees another one, or the attention cannot be masked so.
    """
    if layout == "padded":
        return
    option = "packing" if layout == "packed" else "share_prompts"
    config = model.config.get_text_config()  # type: ignore[union-attr,operator]
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if layout == "shared" and (kinds or getattr(config, "sliding_window", None)):
        raise ModelError(
            f"train.{option} needs full attention in every layer",
            where=folder,
            got=", ".join(sorted(kinds)) or f"a window of {config.sliding_window} tokens",
            remedy=f"leave out train.{option}",
        )
    rng = np.random.default_rng(0)
    prompt, first, second = (
        rng.integers(config.vocab_size, size=size).astype(np.int32) for size in (5, 4, 4)
    )
    laid = LAYOUTS[layout]([Fed(prompt, first), Fed(prompt, second)])
    device = next(model.parameters()).device
    ids, positions = (torch.from_numpy(array).to(device) for array in (laid.ids, laid.positions))
    start = laid.starts[1]

    def states(ids_BL: Tensor, begin: int, **how: Any) -> Tensor:
        body = model.base_model(input_ids=ids_BL, use_cache=False, **how)  # type: ignore[operator]
        found: Tensor = body.last_hidden_state[0, begin : begin + len(second)].float()
        return found

    alone = states(torch.from_numpy(Fed(prompt, second).ids[None]).to(device), len(prompt))
    mask = None
    if laid.branches is not None:
        mask = branch_mask(model, torch.from_numpy(laid.branches).to(device))
    ours = states(ids, start.completion, position_ids=positions, attention_mask=mask)
    blind = states(ids, start.completion, position_ids=None if mask is None else positions)
    if float((ours - alone).norm()) > _LEAKS * float((blind - alone).norm()):
        raise ModelError(
            f"train.{option}: this model's sequences see one another",
            where=folder,
            remedy=f"leave out train.{option}",
        )
