"""Verifiers, on real scorers: reasoning-gym's, math-verify's, and a user's function."""

import hashlib
import threading
from pathlib import Path

import pytest
import reasoning_gym

from opdcache.errors import ConfigError, NotInstalled, PromptError
from opdcache.prompts import load_prompts
from opdcache.schemas.config import JsonlSource, ReasoningGymSource
from opdcache.verifiers import Verifier, load_verifier, said_answer

ROWS = JsonlSource(type="jsonl", path="prompts.jsonl")


def gym(dataset: str, size: int = 6, **config: object) -> ReasoningGymSource:
    return ReasoningGymSource(
        type="reasoning_gym",
        dataset=dataset,
        size=size,
        seed=3,
        config=config,  # type: ignore[arg-type]
    )


def where(i: int) -> str:
    return f"row {i}"


def scored(verifier: Verifier, text: str, answer: str | None, prompt_id: str = "p") -> float:
    return float(verifier.scores([(text, answer, prompt_id)], where)[0])


@pytest.mark.parametrize("dataset", ["chain_sum", "gsm_symbolic", "countdown", "spell_backward"])
def test_reasoning_gym_gives_what_a_direct_loop_over_its_scorer_gives(dataset: str) -> None:
    """Countdown's scorer wants the entry's numbers, which no prompt set stores."""
    source = gym(dataset)
    entries = list(reasoning_gym.create_dataset(dataset, size=6, seed=3))
    scorer = reasoning_gym.create_dataset(dataset, size=6, seed=3)
    said = ["<answer>{}</answer>", "The answer is {}.", "{}", "no idea", "<answer>12</answer>", ""]
    bare = ["{}", "{}", "{}", "no idea", "12", ""]
    rows, expected = [], []
    for prompt, entry, text, answer in zip(
        load_prompts(source).prompts, entries, said, bare, strict=True
    ):
        rows.append((text.format(entry["answer"]), prompt.answer, prompt.prompt_id))
        expected.append(scorer.score_answer(answer.format(entry["answer"]), entry))
    found = load_verifier("reasoning_gym", source).scores(rows, where)
    assert found.tolist() == expected
    assert found[:3].tolist() == [1, 1, 1]
    assert max(found[3:]) < 1


def test_a_countdown_solution_that_is_not_the_reference_is_right() -> None:
    source = gym("countdown", size=1, min_numbers=2, max_numbers=2, operators=["+"])
    (prompt,) = load_prompts(source).prompts
    assert prompt.answer is not None
    swapped = "+".join(reversed(prompt.answer.replace(" ", "").split("+")))
    assert swapped != prompt.answer.replace(" ", "")
    verifier = load_verifier("reasoning_gym", source)
    assert scored(verifier, f"<answer>{swapped}</answer>", None, prompt.prompt_id) == 1


def test_a_prompt_that_the_dataset_does_not_make_is_named() -> None:
    verifier = load_verifier("reasoning_gym", gym("chain_sum"))
    with pytest.raises(PromptError, match=r"prompt feed: not an entry of 'chain_sum' as reasoning"):
        scored(verifier, "4", "4", "feed")


def test_reasoning_gym_refuses_prompts_from_elsewhere() -> None:
    with pytest.raises(ConfigError, match=r"prompts of a reasoning_gym source \(got jsonl\)"):
        load_verifier("reasoning_gym", ROWS)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>7</answer> or <answer> 8 </answer>, the answer is 9", "8"),
        ("So the answer is 42.", "42"),
        ("The answer is 41. No: the final answer is: **42**.\nGood luck!", "42"),
        ("Answer: $-3$", "-3"),
        ("The answer to this arithmetic problem is 8, which is even.", "8, which is even"),
        ("I have no answer. It is 8", "I have no answer. It is 8"),
        ("ANSWER:\n7", "7"),
        (" 42 \n", "42"),
        ("", ""),
    ],
)
def test_an_answer_is_what_is_tagged_or_said_to_be_it_or_everything(text: str, answer: str) -> None:
    assert said_answer(text) == answer


@pytest.mark.parametrize(
    ("reference", "said", "is_right"),
    [
        (r"\frac{1}{2}", r"It is $\frac{2}{4}$.", True),
        (r"\frac{1}{2}", "The answer is 0.5.", True),
        (r"\frac{1}{2}", r"\boxed{2}", False),
        (r"3\sqrt{2}", r"$\boxed{\sqrt{18}}$", True),
        (r"3\sqrt{2}", "The answer is 3.", False),
        (r"$\frac{\pi}{2}$", r"\boxed{\pi/2}", True),
        (r"So $x = 4$, hence \boxed{5}.", "The answer is 5", True),
        ("1,234", "The answer is 1234.", True),
        ("9 and 3 make 12.\n#### 12", "The answer is 12.", True),
        ("9 and 3 make 12.\n#### 12", "The answer is 9.", False),
        (r"\{1, 2\}", r"$\{2, 1\}$", True),
        ("x^2 + 2x + 1", "$(x+1)^2$", True),
        ("42", "I do not know", False),
        ("42", "", False),
    ],
)
def test_math_reads_answers_as_mathematics(reference: str, said: str, is_right: bool) -> None:
    assert scored(load_verifier("math", ROWS), said, reference) == is_right


def test_math_gives_the_same_in_a_thread_where_no_time_limit_can_be_set() -> None:
    found: list[float] = []
    verifier = load_verifier("math", ROWS)
    thread = threading.Thread(
        target=lambda: found.append(scored(verifier, r"\boxed{0.5}", r"\frac{1}{2}"))
    )
    thread.start()
    thread.join()
    assert found == [1]


@pytest.mark.parametrize("reference", ["", "####", r"\boxed{}"])
def test_a_reference_without_an_expression_is_an_error_and_not_always_wrong(reference: str) -> None:
    with pytest.raises(ConfigError, match=r"math-verify reads no expression in a reference answer"):
        scored(load_verifier("math", ROWS), "4", reference)


def test_math_that_is_not_installed_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(package: str) -> str:
        from importlib.metadata import PackageNotFoundError

        raise PackageNotFoundError(package)

    monkeypatch.setattr("opdcache.verifiers.version", absent)
    with pytest.raises(NotInstalled, match=r"pip install 'opdcache\[math\]'"):
        load_verifier("math", ROWS)


@pytest.fixture
def users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's module; what it gives is the text as a number."""
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / "users_verifier.py"
    file.write_text("def given(text, answer):\n    return float(text) if answer else None\n")
    return file


def test_a_user_s_function_is_asked_and_its_version_is_its_file(users: Path) -> None:
    verifier = load_verifier("users_verifier:given", ROWS)
    assert scored(verifier, "0.25", "4") == 0.25
    assert verifier.version == hashlib.sha256(users.read_bytes()).hexdigest()
    assert (verifier.name, verifier.needs_answers) == ("users_verifier:given", True)


@pytest.mark.parametrize(
    ("text", "answer", "words"),
    [
        ("0", None, "row 1: evaluation.verifier: .*needs reference answers"),
        ("nan", "4", "row 1: evaluation.verifier: the function gave nan"),
        ("much", "4", "row 1: evaluation.verifier: the function failed: ValueError"),
        ("0.5", "", "row 1: evaluation.verifier: the function failed: TypeError"),
        ("1.5", "4", r"row 1: evaluation.verifier: a score is from 0 to 1 \(got 1.5\)"),
        ("-1", "4", r"row 1: .*from 0 to 1 \(got -1\)"),
    ],
)
def test_a_score_that_cannot_be_had_names_the_completion(
    users: Path, text: str, answer: str | None, words: str
) -> None:
    verifier = load_verifier("users_verifier:given", ROWS)
    with pytest.raises(ConfigError, match=words):
        verifier.scores([("1", "4", "p"), (text, answer, "q")], where)


def test_a_function_that_is_not_there_names_the_run_file_s_key() -> None:
    with pytest.raises(ConfigError, match=r"evaluation.verifier: 'no_such_module' cannot be"):
        load_verifier("no_such_module:f", ROWS)
