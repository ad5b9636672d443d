"""Another chat template than the student's: where it is used, and what a change of it does."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from opdcache.errors import ConfigError, PromptError, RunChanged
from opdcache.resolve import load_tokenizer
from opdcache.rollout import teacher
from opdcache.rollout.stage import plan_round
from opdcache.runfile import load_run
from opdcache.runfolder import RunContext, open_run
from opdcache.schemas.rounds import HeldOutRound, RolloutRound
from opdcache.stage import Silent, Worker

TEMPLATE = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}answer:"
TRAINED, HELD_OUT = "trained on", "held out"


@pytest.fixture
def folder(tmp_path: Path, tiny_student: Path, tiny_teacher: Path) -> Path:
    """A folder with two models, a template and prompts."""
    shutil.copytree(tiny_student, tmp_path / "student")
    shutil.copytree(tiny_teacher, tmp_path / "teacher")
    (tmp_path / "theirs.jinja").write_text(TEMPLATE)
    for name, text in (("prompts", TRAINED), ("held-out", HELD_OUT)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": text}) + "\n")
    return tmp_path


def run_file(folder: Path, named: str | None, **prompts: object) -> Path:
    template = {} if named is None else {"chat_template": named}
    source = {"type": "jsonl", "path": "prompts.jsonl"}
    config = {
        "cache": "cache",
        "output": "run",
        "student": {"model": "student"},
        "teacher": {"model": "teacher"},
        "prompts": {"source": source, **template, **prompts},
        "rollout": {"samples_per_prompt": 1, "engine": {"max_model_len": 128}},
        "evaluation": {"source": {"type": "jsonl", "path": "held-out.jsonl"}},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def opened(folder: Path, named: str | None = "theirs.jinja", **prompts: object) -> RunContext:
    return open_run(load_run(run_file(folder, named, **prompts)), Silent(), Worker())


def prompts_of(context: RunContext) -> dict[str, list[int]]:
    """Token ids of the one training and the one held-out prompt, as the student reads them."""
    parts = plan_round(context, 0).parts
    asked = {kind: part.tasks[0].requests[0].rendered for kind, part in parts.items()}
    return {
        TRAINED: list(asked[RolloutRound].token_ids),
        HELD_OUT: list(asked[HeldOutRound].token_ids),
    }


def by_transformers(folder: Path, text: str, template: str) -> list[int]:
    chat = [{"role": "user", "content": text}]
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    told = tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False)
    ids: list[int] = tokenizer(told, add_special_tokens=False)["input_ids"]
    assert ids == tokenizer.apply_chat_template(chat, chat_template=template, return_dict=False)
    return ids


@pytest.mark.parametrize("text", [TRAINED, HELD_OUT])
def test_training_and_held_out_prompts_are_rendered_by_a_jinja_file(
    folder: Path, text: str
) -> None:
    assert prompts_of(opened(folder))[text] == by_transformers(folder, text, TEMPLATE)


def test_a_model_folder_lends_its_tokenizer_s_template(folder: Path) -> None:
    lender = AutoTokenizer.from_pretrained(folder / "teacher")
    lender.chat_template = TEMPLATE
    lender.save_pretrained(folder / "lender")

    for text, ids in prompts_of(opened(folder, "lender")).items():
        assert ids == by_transformers(folder, text, TEMPLATE)


def test_a_student_without_a_template_is_rendered_by_the_one_that_is_named(folder: Path) -> None:
    for file in (folder / "student").glob("chat_template*"):
        file.unlink()

    assert prompts_of(opened(folder))[TRAINED] == by_transformers(folder, TRAINED, TEMPLATE)


def test_the_student_s_own_tokenizer_keeps_its_template(folder: Path) -> None:
    before = load_tokenizer(folder / "student").chat_template

    prompts_of(opened(folder))

    assert load_tokenizer(folder / "student").chat_template == before != TEMPLATE


def test_a_teacher_answers_held_out_prompts_that_the_same_template_renders(folder: Path) -> None:
    (part,) = teacher.plan(opened(folder))

    asked = part.tasks[0].requests[0].rendered
    assert list(asked.token_ids) == by_transformers(folder, HELD_OUT, TEMPLATE)


def test_a_template_file_that_changes_under_way_is_noticed(folder: Path) -> None:
    opened(folder)
    (folder / "theirs.jinja").write_text(TEMPLATE + " ")

    with pytest.raises(RunChanged, match="chat template: not what this run began with"):
        opened(folder)


def test_a_template_that_comes_or_goes_under_way_is_noticed(folder: Path) -> None:
    opened(folder)

    with pytest.raises(RunChanged, match=r"prompts\.chat_template changed since this run began"):
        opened(folder, None)


def test_a_template_where_nothing_is_is_refused_with_its_path(folder: Path) -> None:
    with pytest.raises(PromptError, match=f"^{folder}/gone: neither a file nor a folder with a"):
        opened(folder, "gone")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_place_without_a_template_is_refused_before_anything_starts(
    folder: Path, kind: str
) -> None:
    (folder / "file").write_text("")
    shutil.copytree(folder / "student", folder / "folder")
    for file in (folder / "folder").glob("chat_template*"):
        file.unlink()

    with pytest.raises(PromptError, match=f"^{folder}/{kind}: there is no chat template; let"):
        opened(folder, kind)
    assert not (folder / "run" / "resolved.json").exists()


def test_a_template_that_is_no_text_is_refused(folder: Path) -> None:
    (folder / "bytes").write_bytes(b"\xff")

    with pytest.raises(PromptError, match="a chat template is UTF-8 text"):
        opened(folder, "bytes")


def test_raw_prompts_have_no_template(folder: Path) -> None:
    with pytest.raises(ConfigError, match="prompts: chat_template: raw prompts have none"):
        opened(folder, template="raw")
