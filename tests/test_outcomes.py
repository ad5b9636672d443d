"""Rewards of whole completions, and what each token of them is given."""

import sys
from pathlib import Path

import numpy as np
import pytest

from opdcache.errors import ConfigError
from opdcache.outcomes import advantages, outcome_function, refuse_unanswered, rewards
from opdcache.schemas.losses import LossConfig
from opdcache.store.cache import Cache
from opdcache.store.scores import Scores
from opdcache.train.samples import RoundSamples

from .handmade import Row, commit_rollouts, commit_scores, rounds


def right(text: str, answer: str) -> float:
    """1 where the text ends in the answer."""
    return float(text.endswith(answer))


def where(i: int) -> str:
    return f"row {i}"


def row(prompt: int, text: str, answer: str | None, length: int) -> Row:
    return Row(
        prompt=[prompt, 7],
        completion=[1] * length,
        sampling_T=np.full(length, -1, np.float32),
        recorded_ids_TS=np.zeros((length, 0), np.int32),
        text=text,
        answer=answer,
    )


def test_an_advantage_is_the_reward_less_the_mean_of_the_prompts_completions() -> None:
    made = advantages(np.array([1.0, 0.0, 0.0, 5.0, 1.0]), [0, 1, 0, 2, 0])
    assert made.tolist() == pytest.approx([1 / 3, 0, -2 / 3, 0, 1 / 3])


def test_every_supervised_token_has_its_completions_advantage(tmp_path: Path) -> None:
    cache = Cache(str(tmp_path))
    first = [row(3, "it is 12", "12", 2), row(3, "it is 13", "12", 3), row(4, "7", "7", 1)]
    second = [row(3, "12", "12", 1), row(4, "8", "7", 4)]
    listed, served = [], []
    for name, rows in (("first", first), ("second", second)):
        listed.append(commit_rollouts(cache, rows, name=name))
        offsets = np.cumsum([0, *(len(one.completion) for one in rows)]).astype(np.int64)
        scores = Scores(offsets, sampled_logprobs=np.zeros(offsets[-1], np.float32))
        served.append([commit_scores(cache, listed[-1], scores, ("sampled",))])
    samples = RoundSamples(cache, *rounds(listed, served), 1, outcome=right)
    batch = samples.collate([1, 0, 2, 4, 3])
    assert batch.advantage_T is not None
    expected = [-2 / 3] * 3 + [1 / 3] * 2 + [0.5] + [-0.5] * 4 + [1 / 3]
    assert batch.advantage_T.tolist() == pytest.approx(expected)
    assert samples.reward([0, 1, 2, 4]) == 0.5
    without = RoundSamples(cache, *rounds(listed, served), 1)
    assert without.collate([1]).advantage_T is None
    assert without.reward([1]) is None


def test_a_function_is_found_by_its_import_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "users_rewards.py").write_text("def length(text, answer): return len(text)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert outcome_function("users_rewards:length")("four", "4") == 4
    with pytest.raises(ConfigError, match="'users_rewards' has no function 'width'"):
        outcome_function("users_rewards:width")
    with pytest.raises(ConfigError, match=r"no_such_module.*put its folder into PYTHONPATH"):
        outcome_function("no_such_module:length")
    with pytest.raises(ConfigError, match="has no function '__name__'"):
        outcome_function("users_rewards:__name__")
    (tmp_path / "users_wrong_rewards.py").write_text("1 / 0\n")
    with pytest.raises(ConfigError, match=r"'users_wrong_rewards' cannot be .*ZeroDivisionError"):
        outcome_function("users_wrong_rewards:length")
    del sys.modules["users_rewards"]


def test_completions_without_others_of_their_prompt_have_nothing_to_be_compared_with() -> None:
    with pytest.raises(ConfigError, match="no prompt has two completions"):
        advantages(np.array([1.0, 0.0]), [0, 1])


def test_a_loss_that_looks_at_answers_is_refused_before_anything_is_sampled_for_it() -> None:
    imitates = LossConfig(sft_weight=0.1)
    compares = LossConfig(outcome="operator:eq", outcome_weight=0.1)
    for loss in (imitates, compares, LossConfig()):
        refuse_unanswered(loss, ["4", "5"])
    refuse_unanswered(imitates, ["4", None])
    refuse_unanswered(LossConfig(), [None])
    with pytest.raises(ConfigError, match="outcome: a prompt has no reference answer"):
        refuse_unanswered(compares, ["4", None])
    with pytest.raises(ConfigError, match="sft_weight: no prompt has a reference answer"):
        refuse_unanswered(imitates, [None, None])
    nowhere = LossConfig(outcome="no_such_module:eq", outcome_weight=0.1)
    with pytest.raises(ConfigError, match="'no_such_module' cannot be imported"):
        refuse_unanswered(nowhere, ["4"])


@pytest.mark.parametrize(
    ("answer", "found", "words"),
    [
        (None, 1.0, "row 1: .*no reference answer.*name the prompts' answers"),
        ("4", float("nan"), "row 1: .*gave nan"),
        ("4", "much", "row 1: .*failed: ValueError"),
    ],
)
def test_a_reward_that_cannot_be_had_names_the_completion(
    answer: str | None, found: object, words: str
) -> None:
    def outcome(text: str, answer: str) -> float:
        return 1.0 if text == "good" else found  # type: ignore[return-value]

    with pytest.raises(ConfigError, match=words):
        rewards(outcome, [("good", "4"), ("bad", answer)], where)
