"""Verifiers, on real scorers: reasoning-gym's, math-verify's, and a user's function."""

import gc
import hashlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from importlib.metadata import version
from pathlib import Path
from zipfile import ZipFile

import pytest
import reasoning_gym

from opdcache.errors import ConfigError, EngineError, NotInstalled, PromptError
from opdcache.judging import Judge, Score
from opdcache.prompts import load_prompts
from opdcache.schemas.prompts import JsonlSource, ReasoningGymSource
from opdcache.verifiers import Verifier, gym_scorer, load_verifier, math_scorer, said_answer

GYM = "reasoning_gym"
ROWS = JsonlSource(type="jsonl", path="prompts.jsonl")


def gym(dataset: str, size: int = 6, **config: object) -> ReasoningGymSource:
    return ReasoningGymSource(
        type="reasoning_gym",
        dataset=dataset,
        size=size,
        seed=3,
        config=config,  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
def math() -> Iterator[Verifier]:
    with closing(load_verifier("math", ROWS)) as verifier:
        yield verifier


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


@pytest.mark.parametrize(
    ("dataset", "text"),
    [
        ("prime_factorization", "I am not sure"),
        ("coin_flip", "1e999"),
        ("game_of_life", "{}"),
    ],
)
def test_a_text_that_a_dataset_s_scorer_fails_on_is_wrong_and_told_apart(
    dataset: str, text: str
) -> None:
    source = gym(dataset, size=1)
    (prompt,) = load_prompts(source).prompts
    (entry,) = reasoning_gym.create_dataset(dataset, size=1, seed=3)
    with pytest.raises(Exception):  # noqa: B017, PT011 - what it is differs
        reasoning_gym.create_dataset(dataset, size=1, seed=3).score_answer(text, entry)
    verifier = load_verifier("reasoning_gym", source)
    texts = [text, f"<answer>{entry['answer']}</answer>"]
    found = verifier.judged([(said, None, prompt.prompt_id) for said in texts], where)
    assert found.scores_N.tolist() == [0, 1]
    assert found.failed_N.tolist() == [True, False]


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
        ("The answer is 42.\n\nHope this answer helps: cheers", "42"),
        ("The answer is 7. Let me check this answer: yes, it is right.", "7"),
        ("The answer is 7. I checked the answer: it is right.", "7"),
        ("My final answer is 42 because 40 + 2 is 42.", "42"),
        (r"The answer is: \boxed{42}", "42"),
        (r"\boxed{1}, or rather $\boxed{ \frac{1}{2} }$. The answer is 3", r"\frac{1}{2}"),
        (r"\boxed{1}, or rather \boxed{\frac{1}{2", "1"),
        (r"<answer>3</answer>, so \boxed{4}", "3"),
        ("Thus my answer is 5.", "5"),
        ("**Final Answer**: 6", "6"),
        ("### Answer: **6**\n\nDone.", "6"),
        ("The answer to 3.5 + 2 is 5.5. Done.", "5.5"),
        ("Answer to the question: 8", "8"),
        ("The correct answer is Zoey is a hero, and Ann a foe.", "Zoey is a hero, and Ann a foe"),
        ("I wonder what this answer is: 9", "I wonder what this answer is: 9"),
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
def test_math_reads_answers_as_mathematics(
    math: Verifier, reference: str, said: str, is_right: bool
) -> None:
    assert scored(math, said, reference) == is_right


def test_math_gives_the_same_in_a_thread(math: Verifier) -> None:
    found: list[float] = []
    thread = threading.Thread(
        target=lambda: found.append(scored(math, r"\boxed{0.5}", r"\frac{1}{2}"))
    )
    thread.start()
    thread.join()
    assert found == [1]


@pytest.mark.parametrize("reference", ["", "####", r"\boxed{}"])
def test_a_reference_without_an_expression_is_an_error_and_not_always_wrong(
    math: Verifier, reference: str
) -> None:
    with pytest.raises(ConfigError, match=r"math-verify reads no expression in a reference answer"):
        scored(math, "4", reference)


def test_math_that_is_not_installed_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(package: str) -> str:
        from importlib.metadata import PackageNotFoundError

        raise PackageNotFoundError(package)

    monkeypatch.setattr("opdcache.verifiers.version", absent)
    with pytest.raises(NotInstalled, match=r"pip install 'opdcache\[math\]'"):
        load_verifier("math", ROWS)


def scorer(kind: str) -> Score:
    """What a judge's process makes: its first text says what becomes of it."""

    def score(text: str, answer: str | None, prompt_id: str) -> float:
        if text == "modules":
            gym_scorer(gym("chain_sum"), "1"), math_scorer("here")
            raise PromptError(" ".join(sys.modules))
        if text == "pid":
            raise PromptError(str(os.getpid()))
        exec(text)
        return float(answer or "nan")

    if kind == "broken":
        raise ValueError("no such thing")
    if kind == "dead":
        os._exit(3)
    return score


def asked(judge: Judge, what: str) -> str:
    with pytest.raises(PromptError) as raised:
        judge(what, "1", "p")
    return str(raised.value)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("while True: pass", "1"),
        ("9**9**9", "1"),  # never leaves C
        ("import os; os._exit(0)", "1"),
        ("raise SystemExit", "1"),
        ("def f(): f()\nf()", "1"),
        ("1 / 0", "1"),
        ("", "nan"),
        ("", "1.5"),
    ],
)
def test_a_judge_says_nothing_of_what_never_ends_dies_or_fails_and_goes_on(
    text: str, answer: str
) -> None:
    judge = Judge(partial(scorer, "good"), limit_s=1)
    started = time.monotonic()
    assert [judge(text, answer, "p"), judge("", "0.5", "p")] == [None, 0.5]
    assert time.monotonic() - started < 10
    judge.close()


def test_a_countdown_answer_whose_value_is_out_of_reach_is_wrong_and_told_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("opdcache.verifiers.Judge", partial(Judge, limit_s=1))
    source = gym("countdown", size=1)
    (prompt,) = load_prompts(source).prompts
    texts = ["<answer>9**9**9**9</answer>", f"<answer>{prompt.answer}</answer>"]
    with closing(load_verifier("reasoning_gym", source)) as verifier:
        found = verifier.judged([(text, None, prompt.prompt_id) for text in texts], where)
    assert (found.scores_N.tolist(), found.failed_N.tolist()) == ([0, 1], [True, False])


def test_threads_share_a_judge_s_process_and_each_gets_its_own_score() -> None:
    judge = Judge(partial(scorer, "good"))
    shares = [str(i / 64) for i in range(64)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda share: judge("", share, "p"), shares)) == [
            float(share) for share in shares
        ]
    judge.close()


def test_a_judge_s_process_loads_neither_engines_nor_storage_and_prints_nothing(
    capfd: pytest.CaptureFixture[str],
) -> None:
    judge = Judge(partial(scorer, "good"))
    loaded = set(asked(judge, "modules").split())
    assert {"reasoning_gym", "math_verify"} <= loaded
    assert not {"torch", "transformers", "vllm", "zarr", "obstore"} & loaded
    assert judge("print('said', flush=True)", "1", "p") == 1
    judge.close()
    assert capfd.readouterr() == ("", "")


def test_an_interrupt_of_the_whole_job_fails_no_completion() -> None:
    judge = Judge(partial(scorer, "good"))
    pid = int(asked(judge, "pid"))
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(pid, number)
    assert judge("", "0.5", "p") == 0.5
    judge.close()


def forget(judges: list[Judge]) -> None:
    judges.clear()
    gc.collect()  # the error's traceback knows it


@pytest.mark.parametrize("end", [lambda judges: judges[0].close(), forget])
def test_a_judge_that_is_closed_or_forgotten_leaves_no_process(
    end: Callable[[list[Judge]], None],
) -> None:
    judges = [Judge(partial(scorer, "good"))]
    pid = int(asked(judges[0], "pid"))
    os.kill(pid, 0)
    end(judges)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize(
    ("kind", "words"),
    [("broken", "does not start: ValueError: no such thing"), ("dead", "ended before it began")],
)
def test_a_judge_that_cannot_start_is_an_error_and_no_completion_is_wrong(
    kind: str, words: str
) -> None:
    with pytest.raises(EngineError, match=words):
        Judge(partial(scorer, kind))("", "1", "p")


@pytest.mark.parametrize(("name", "package"), [("math", "math-verify"), (GYM, "reasoning-gym")])
def test_a_version_tells_how_answers_are_read_besides_the_package(name: str, package: str) -> None:
    release, reading = load_verifier(name, gym("chain_sum")).version.split("+")
    assert release == version(package)
    assert int(reading) >= 2


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


def test_a_function_without_a_file_to_read_has_no_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ZipFile(tmp_path / "zipped.zip", "w") as file:
        file.writestr("zipped_verifier.py", "def given(text, answer): return 1\n")
    monkeypatch.syspath_prepend(str(tmp_path / "zipped.zip"))
    verifier = load_verifier("zipped_verifier:given", ROWS)
    assert (verifier.version, scored(verifier, "4", "4")) == ("", 1)


def test_errors_name_the_place_that_a_verifier_was_asked_for_in(users: Path) -> None:
    with pytest.raises(ConfigError, match=r"--verifier: 'no_such_module'"):
        load_verifier("no_such_module:f", ROWS, "--verifier")
    with pytest.raises(ConfigError, match=r"--verifier: 'reasoning_gym' scores"):
        load_verifier("reasoning_gym", ROWS, "--verifier")
    for answer, text in ((None, "1"), ("4", "much"), ("4", "2")):
        with pytest.raises(ConfigError, match=r"row 0: --verifier: "):
            scored(load_verifier("users_verifier:given", ROWS, "--verifier"), text, answer)
    with pytest.raises(ConfigError, match=r"--verifier: math-verify reads no expression"):
        scored(load_verifier("math", ROWS, "--verifier"), "4", "####")


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
