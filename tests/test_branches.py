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
        ("packed", r"train.packing: not with these layers .*linear.*set train.packing: false"),
        ("shared", r"train.share_prompts: not with these layers .*linear"),
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
    with pytest.raises(ModelError, match="share_prompts: not with these layers"):
        refuse_leaks(model(kind, **changes), "shared", Path("student"))


def test_a_window_that_the_configuration_does_not_tell_is_found_out() -> None:
    layers = {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": 64}
    local = model("GPTNeo", num_heads=2, max_position_embeddings=512, **layers)
    with pytest.raises(ModelError, match="share_prompts: this model's sequences see one another"):
        refuse_leaks(local, "shared", Path("student"))


@pytest.mark.parametrize("layout", ["packed", "shared"])
def test_a_layer_without_attention_that_the_configuration_does_not_tell_is_found_out(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    recurrent = model("Mamba", state_size=4)
    monkeypatch.setattr(type(recurrent.config), "layer_types", None)
    with pytest.raises(ModelError, match=r"see one another|cannot be read so"):
        refuse_leaks(recurrent, layout, Path("student"))


def test_a_mask_that_is_not_taken_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    attentive = model("Llama")
    monkeypatch.setattr("opdcache.train.branches.branch_mask", lambda model, branches_BL: None)
    with pytest.raises(ModelError, match="share_prompts: this model's sequences see one another"):
        refuse_leaks(attentive, "shared", Path("student"))


def test_a_model_that_cannot_be_masked_so_is_refused() -> None:
    bloom = model("Bloom", n_head=2, n_layer=2)
    with pytest.raises(ModelError, match="share_prompts: the model cannot be read so"):
        refuse_leaks(bloom, "shared", Path("student"))
