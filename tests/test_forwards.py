"""Sequences that begin alike: what they share is read once, and nothing else changes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from opdcache.models import load_model
from opdcache.score.forwards import Forwards
from opdcache.score.teacher import Sequences
from opdcache.score.transformers_scorer import TransformersScorer

from .conftest import TINY_VOCAB, make_tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
RNG = np.random.default_rng(5)
WINDOW = 8


def ids(count: int) -> NDArray[np.int32]:
    return RNG.integers(TINY_VOCAB, size=count).astype(np.int32)


def completions_of(*prompts: NDArray[np.int32]) -> Sequences:
    """Completions of 0 to 13 tokens, of each prompt, in turn."""
    completions = [ids(7 * i % 14) for i in range(4 * len(prompts))]
    recorded = np.zeros((sum(map(len, completions)), 0), np.int32)
    return Sequences([*prompts] * 4, completions, recorded)


HEADER = ids(30)
ONE_TOKEN = "a prompt of one token: nothing to share"
CASES = {
    "completions of a prompt": completions_of(ids(30), ids(21), ids(25)),
    "a system prompt": completions_of(*(np.append(HEADER, ids(3 + i)) for i in range(8))),
    ONE_TOKEN: completions_of(ids(40), ids(1), ids(40)),
    "one prompt, once a prefix of another": completions_of(HEADER, HEADER[:20]),
}


class Counting(nn.Module):
    """A body that counts the tokens it reads, and the most at once."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.num_tokens, self.most = body, 0, 0

    def forward(self, input_ids: torch.Tensor, **more: Any) -> Any:
        self.num_tokens += input_ids.numel()
        known = more.get("past_key_values")
        width = input_ids.shape[1] + (known.get_seq_length() if known is not None else 0)
        self.most = max(self.most, len(input_ids) * width)
        return self.body(input_ids=input_ids, **more)


def mistral(folder: Path) -> nn.Module:
    """Attends to a few tokens back, fewer than a prompt has."""
    from transformers import MistralConfig, MistralModel

    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = MistralConfig(vocab_size=TINY_VOCAB, sliding_window=WINDOW, **size, **heads)
    return MistralModel(config).eval()


def llama(folder: Path) -> nn.Module:
    body: nn.Module = load_model(folder, "float32", CPU).base_model  # type: ignore[assignment]
    return body


def by_row(forwards: Forwards, sequences: Sequences) -> dict[int, torch.Tensor]:
    """Hidden states of each completion's tokens."""
    found = {}
    for rows, states_TD in forwards.each(sequences):
        parts = states_TD.split([len(sequences.completions[row]) for row in rows])
        found.update(zip(rows, parts, strict=True))
    assert sorted(found) == list(range(len(sequences.prompts)))
    return found


@pytest.mark.parametrize("model", [llama, mistral])
@pytest.mark.parametrize("batch_tokens", [1, 100, 10_000])
@pytest.mark.parametrize("case", CASES)
def test_states_are_those_of_one_whole_sequence_at_a_time(
    tiny_teacher: Path, model: Callable[[Path], nn.Module], case: str, batch_tokens: int
) -> None:
    body, sequences = Counting(model(tiny_teacher)), CASES[case]
    forwards = Forwards(body, CPU, batch_tokens)
    body.num_tokens = body.most = 0
    found = by_row(forwards, sequences)
    if case != ONE_TOKEN and batch_tokens < 1000:
        assert body.num_tokens < 0.9 * sequences.lengths.sum()
    assert body.most <= max(batch_tokens, sequences.lengths.max())
    for row, (prompt, completion) in enumerate(
        zip(sequences.prompts, sequences.completions, strict=True)
    ):
        whole = torch.from_numpy(np.append(prompt, completion).astype(np.int64))
        with torch.no_grad():
            states_LD = body.body(input_ids=whole[None]).last_hidden_state[0]
        exact_TD = states_LD[len(prompt) - 1 : -1][: len(completion)]
        assert torch.allclose(found[row], exact_TD, rtol=1e-4, atol=1e-4)


def test_each_prompt_is_read_once(tiny_teacher: Path) -> None:
    body = Counting(llama(tiny_teacher))
    prompt, completions = ids(50), [ids(10) for _ in range(16)]
    sequences = Sequences([prompt] * 16, completions, np.zeros((160, 0), np.int32))
    forwards = Forwards(body, CPU, 10_000)
    body.num_tokens = 0

    by_row(forwards, sequences)

    # The prompt's last token is read with each completion, whose first it predicts.
    assert body.num_tokens == 49 + 16 * (1 + 10)


def test_sequences_that_share_little_are_read_whole(tiny_teacher: Path) -> None:
    body = Counting(llama(tiny_teacher))
    begin = ids(3)
    prompts = [np.append(begin, ids(40)) for _ in range(4)]
    sequences = Sequences(prompts, [ids(10) for _ in prompts], np.zeros((40, 0), np.int32))
    forwards = Forwards(body, CPU, 10_000)
    body.num_tokens = 0

    by_row(forwards, sequences)

    assert forwards.continues
    assert body.num_tokens == 4 * 53


class Forgetful(nn.Module):
    """A body that takes a continuation's tokens for the first ones."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, position_ids: torch.Tensor | None = None, **more: Any) -> Any:
        first = None if position_ids is None else position_ids - position_ids.min()
        return self.body(position_ids=first, **more)


def test_a_model_that_does_not_continue_exactly_reads_whole_sequences(tiny_teacher: Path) -> None:
    exact, forgetful = llama(tiny_teacher), Forgetful(llama(tiny_teacher))
    sequences = CASES["completions of a prompt"]

    forwards = Forwards(forgetful, CPU, 100)

    assert not forwards.continues
    found, expected = by_row(forwards, sequences), by_row(Forwards(exact, CPU, 100), sequences)
    for row, states_TD in expected.items():
        assert torch.allclose(found[row], states_TD, rtol=1e-4, atol=1e-4)


def test_a_recurrent_model_reads_whole_sequences(tiny_teacher: Path) -> None:
    from transformers import MambaConfig, MambaModel

    torch.manual_seed(0)
    body = MambaModel(
        MambaConfig(vocab_size=TINY_VOCAB, hidden_size=32, num_hidden_layers=2)
    ).eval()
    forwards = Forwards(body, CPU, 100)

    assert not forwards.continues
    by_row(forwards, CASES["completions of a prompt"])


def test_what_scored_says_whether_it_can_continue(
    tiny_teacher: Path, tiny_tokenizer_folder: Path, tmp_path: Path
) -> None:
    for dtype in ("float32", "bfloat16"):
        scorer = TransformersScorer(tiny_teacher, dtype=dtype, batch_tokens=64)
        assert scorer.details()["continues"] is True
    folder = make_tiny_model(tmp_path / "m", tiny_tokenizer_folder, seed=3, num_hidden_layers=1)
    assert TransformersScorer(folder, dtype="float32", batch_tokens=64).details()["continues"]
