"""Whether a model keeps the sequences of one row apart, found out before it is trained."""

from pathlib import Path
from typing import Any

import pytest
import torch

from opdcache.errors import ModelError
from opdcache.schemas.training import Layout
from opdcache.train.branches import refuse_leaks

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def model(kind: str, dtype: torch.dtype = torch.float32, **changes: object) -> Any:
    """A random model of transformers."""
    import transformers

    torch.manual_seed(3)
    config = getattr(transformers, f"{kind}Config")(**SMALL | changes)
    return getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype).eval()


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_attention_that_takes_a_mask_keeps_them_apart(
    layout: Layout, dtype: torch.dtype, kind: str
) -> None:
    refuse_leaks(model(kind, dtype), layout, Path("student"))


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ("packed", "train.packing: this model's sequences see one another"),
        ("shared", "train.share_prompts needs full attention in every layer"),
    ],
)
def test_a_recurrent_model_is_refused(layout: Layout, words: str) -> None:
    recurrent = model("Mamba", state_size=4)
    with pytest.raises(ModelError, match=f"student: {words}"):
        refuse_leaks(recurrent, layout, Path("student"))
    refuse_leaks(recurrent, "padded", Path("student"))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Mistral", {"sliding_window": 64}),
        ("Qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
    ],
)
def test_a_window_which_counts_the_other_completions_too_is_refused(
    kind: str, changes: dict[str, object]
) -> None:
    with pytest.raises(ModelError, match="needs full attention in every layer"):
        refuse_leaks(model(kind, **changes), "shared", Path("student"))
