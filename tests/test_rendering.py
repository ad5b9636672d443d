"""What a teacher reads in the place of the student's prompt, and the key that stands for it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from opdcache.errors import PromptError
from opdcache.identity import digest
from opdcache.resolve import load_tokenizer
from opdcache.schemas.manifests import AS_SAMPLED
from opdcache.schemas.teachers import TeacherConfig
from opdcache.score.rendering import Rendering
from opdcache.store import rollouts
from opdcache.store.cache import Cache, as_listed

from . import shards

Chat = tuple[tuple[str, str], ...]
CONTEXT = "Solution: {answer}\n\n{prompt}"


def completion(
    chat: Chat | None, answer: str | None = None, *, index: int = 0, ids: Sequence[int] = (5, 6)
) -> rollouts.Completion:
    return rollouts.Completion(
        prompt_id="p",
        sample_index=index,
        prompt_token_ids=[1, 2, 3],
        completion_token_ids=ids,
        behavior_logprobs=-np.ones(len(ids), np.float32),
        sampling_logprobs=-np.ones(len(ids), np.float32),
        topk_ids=np.zeros((len(ids), 0), np.int32),
        topk_logprobs=np.zeros((len(ids), 0), np.float32),
        finish_reason="stop",
        text="",
        task="t",
        answer=answer,
        messages=chat,
    )


def table(*chats: str | Chat | None, answer: str | None = None) -> pa.Table:
    """A row a chat; text alone is what the user says."""
    asked = [(("user", chat),) if isinstance(chat, str) else chat for chat in chats]
    return rollouts.rollout_table([completion(c, answer, index=i) for i, c in enumerate(asked)])


@pytest.fixture
def rendering(tiny_teacher: Path) -> Any:
    """How a teacher with this ``prompt`` reads prompts."""

    def rendering(**prompt: str) -> Rendering:
        config = {"model": str(tiny_teacher), "prompt": prompt or None}
        return Rendering(TeacherConfig.model_validate(config))

    return rendering


def read(rendering: Rendering, rows: pa.Table) -> list[str]:
    """What the teacher reads, as text: the tokenizer's ids are bytes in an order of their own."""
    tokenizer = load_tokenizer(Path(rendering._config.model))
    ids = (prompt.tolist() for prompt in rendering.prompts(rows))
    return [tokenizer.decode(one, skip_special_tokens=False) for one in ids]


def key(tmp_path: Path, rendering: Rendering, rows: pa.Table, name: str = "a") -> str:
    cache = Cache(str(tmp_path / "cache"))
    listed = as_listed(shards.commit_rollouts(cache, name, rows, student_topk=0), cached=False)
    return rendering.key(cache, listed)


def test_a_teacher_without_a_prompt_of_its_own_reads_the_student_s_tokens(
    rendering: Any, tmp_path: Path
) -> None:
    rows = table(None, "hi")
    assert [ids.tolist() for ids in rendering().prompts(rows)] == [[1, 2, 3], [1, 2, 3]]
    assert key(tmp_path, rendering(), rows) == AS_SAMPLED


def test_a_chat_is_rendered_by_the_teacher_s_own_template(rendering: Any) -> None:
    chat = (("user", "2 + 2?"), ("assistant", "4"), ("user", "sure?"))
    assert read(rendering(template="chat"), table(chat)) == ["u:2 + 2?\na:4\nu:sure?\na:"]


def test_a_system_message_comes_first(rendering: Any) -> None:
    assert read(rendering(system="Be brief."), table("hi")) == ["s:Be brief.\nu:hi\na:"]


def test_a_raw_prompt_is_the_text_as_it_is(rendering: Any) -> None:
    assert read(rendering(template="raw"), table("Once upon")) == ["Once upon"]


@pytest.mark.parametrize("answer", ["4", r"\1 [a-z]+ $^ \g<0> {}", "{prompt} {answer}", "é\n"])
@pytest.mark.parametrize("prompt", ["2 + 2?", "say {answer}, not {prompt}", "{0} {x!r} {{}} %s"])
def test_context_holds_prompt_and_answer_as_they_are(
    rendering: Any, prompt: str, answer: str
) -> None:
    (said,) = read(rendering(context=CONTEXT, template="raw"), table(prompt, answer=answer))
    assert said == "Solution: " + answer + "\n\n" + prompt


def test_context_may_say_a_mark_twice_and_other_braces_stay(rendering: Any) -> None:
    context = "{answer}{answer} {other} {prompt}|{prompt}"
    (said,) = read(rendering(context=context, template="raw"), table("P", answer="A"))
    assert said == "AA {other} P|P"


def test_context_stands_in_the_place_of_the_last_message_alone(rendering: Any) -> None:
    chat = (("system", "S"), ("user", "{answer}"))
    assert read(rendering(context=CONTEXT), table(chat, answer="7")) == [
        "s:S\nu:Solution: 7\n\n{answer}\na:"
    ]


def test_an_answer_that_context_does_not_ask_for_need_not_be_there(rendering: Any) -> None:
    assert read(rendering(context="Think. {prompt}", template="raw"), table("hi")) == ["Think. hi"]


def test_the_key_is_the_digest_of_the_ids_that_the_teacher_reads(
    rendering: Any, tmp_path: Path, tiny_teacher: Path
) -> None:
    tokenizer = load_tokenizer(tiny_teacher)
    ids = [tokenizer.encode(text) for text in ("u:hi\na:", "u:yes\na:")]
    assert key(tmp_path, rendering(template="chat"), table("hi", "yes")) == digest(ids)


def test_whatever_changes_the_ids_changes_the_key(rendering: Any, tmp_path: Path) -> None:
    asked = [
        (dict[str, str](template="chat"), "1"),
        ({"template": "raw"}, "1"),
        ({"system": "Be brief."}, "1"),
        ({"context": "{prompt}!"}, "1"),
        ({"context": CONTEXT}, "1"),
        ({"context": CONTEXT}, "2"),
    ]
    keys = {
        key(tmp_path, rendering(**prompt), table("hi", answer=answer), f"{prompt}{answer}")
        for prompt, answer in asked
    }
    assert len(keys) == len(asked)


def test_what_the_teacher_does_not_read_is_not_in_the_key(rendering: Any, tmp_path: Path) -> None:
    chat = (("user", "hi"),)
    rows = [
        completion(chat, "1"),
        completion(chat, "2"),
        completion(chat, index=7, ids=[9]),
    ]
    own = rendering(system="Be brief.")
    keys = [
        key(tmp_path, own, rollouts.rollout_table([row]), str(place))
        for place, row in enumerate(rows)
    ]
    assert len(set(keys)) == 1


def test_a_prompt_is_rendered_once_for_all_its_completions(
    rendering: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, rendered = rendering(template="chat"), list[str]()
    apply = own._tokenizer.apply_chat_template

    def counting(chat: Any, **kwargs: Any) -> Any:
        rendered.append(chat[-1]["content"])
        return apply(chat, **kwargs)

    monkeypatch.setattr(own._tokenizer, "apply_chat_template", counting)
    said = own.prompts(table("a", "b", "a", "a", "b"))
    assert rendered == ["a", "b"]
    assert [ids.tolist() == said[0].tolist() for ids in said] == [True, False, True, True, False]


@pytest.mark.parametrize("rows", [table(None), table("hi", None)])
def test_a_rollout_without_messages_is_named(rendering: Any, rows: pa.Table) -> None:
    name = rows.column("rollout_id")[-1].as_py()
    with pytest.raises(
        PromptError, match=rf"rollout {name}: .*no messages.*remove teacher\.prompt"
    ):
        rendering(template="chat").prompts(rows)


def test_a_rollout_without_the_answer_that_context_asks_for_is_named(rendering: Any) -> None:
    with pytest.raises(PromptError, match=r"rollout p/0: .*asks for the answer.*\{answer\}"):
        rendering(context=CONTEXT).prompts(table("hi"))


def test_messages_that_the_template_refuses_are_named(
    rendering: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = rendering(template="chat")
    refusing = "{{ raise_exception('no such role') if messages[0]['role'] == 'tool' else 'x' }}"
    monkeypatch.setattr(own._tokenizer, "chat_template", refusing)
    with pytest.raises(PromptError, match=r"p/1: the chat template refuses it: no such role"):
        own.prompts(table("hi", (("tool", "5"),)))


def test_the_completion_s_ids_are_the_student_s_whatever_the_teacher_reads(
    rendering: Any,
) -> None:
    """Ids that decode and encode to others, such as a letter made of half-characters."""
    odd = [200, 201, 256, 200]
    rows = rollouts.rollout_table([completion((("user", "hi"),), ids=odd)])
    before = rows.column("completion_token_ids").to_pylist()
    rendering(system="Be brief.").prompts(rows)
    assert rows.column("completion_token_ids").to_pylist() == before == [odd]


def test_messages_are_read_as_they_are_stored(rendering: Any) -> None:
    rows = table("é 漢 \u2028 \"'\\")
    assert json.loads(rows.column("messages")[0].as_py()) == [["user", "é 漢 \u2028 \"'\\"]]
    assert read(rendering(template="raw"), rows) == ["é 漢 \u2028 \"'\\"]
