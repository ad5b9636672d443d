"""Recipes: their files hold what they say, and damaged models are damaged as asked."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import yaml
from click.testing import CliRunner
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from opdcache.cli.main import cli
from opdcache.errors import ModelError, UsageError
from opdcache.jobs.models import damage, drop_layers, make_models, round_weights
from opdcache.jobs.recipe_files import copy_recipe, recipes
from opdcache.run_prompts import RunPrompts
from opdcache.runfile import load_run
from opdcache.runfolder import RunFolder
from opdcache.schemas.losses import imitates
from opdcache.schemas.rounds import RolloutRound, ScoreRound, TrainRound

from .conftest import PAD_ID, TINY_VOCAB, make_tiny_model

ROOT = Path(__file__).parent.parent / "jobs" / "recipes"
DOCS = Path(__file__).parent.parent / "docs"
RUN_FILES = sorted(ROOT.glob("*/*.yaml"))
HEADERS = {
    folder.name: "".join(
        line
        for file in sorted(folder.glob("*.yaml"))
        for line in file.read_text().splitlines(keepends=True)
        if line.startswith("#")
    )
    for folder in ROOT.iterdir()
    if folder.is_dir()
}


def config_of(run_file: Path, student: Path, teacher: Path) -> dict[str, Any]:
    """A recipe's run file with tiny models in the place of its own."""

    def placed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: placed(inner) for key, inner in value.items()}
        if not isinstance(value, str) or not value.startswith("models/"):
            return value
        return str(teacher if value == "models/teacher" else student)

    config: dict[str, Any] = placed(yaml.safe_load(run_file.read_text()))
    return config


def write(folder: Path, run_file: Path, config: dict[str, Any]) -> Path:
    path = folder / run_file.name
    path.write_text(yaml.safe_dump(config))
    return path


def shrunk(config: dict[str, Any]) -> dict[str, Any]:
    """One round of a few short completions, without an evaluation."""
    config.pop("evaluation", None)
    config["rounds"] = 1
    config["prompts"]["source"]["size"] = config["prompts"]["per_round"] = 6
    config["rollout"] |= {"engine": {"max_model_len": 256}}
    config["rollout"].setdefault("sampling", {})["max_tokens"] = 12
    return config


def opdcache(*arguments: object) -> None:
    """Run a command in a process of its own."""
    command = [sys.executable, "-m", "opdcache.cli.main", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_recipe_is_listed_with_its_purpose_and_its_files() -> None:
    folders = sorted(folder for folder in ROOT.iterdir() if folder.is_dir())

    for arguments in (["recipes"], ["recipes", "list"]):
        shown = CliRunner().invoke(cli, arguments).output.splitlines()
        pairs = zip(shown[::2], shown[1::2], strict=True)
        listed = {first.split()[0]: (first, second) for first, second in pairs}

        assert list(listed) == [folder.name for folder in folders]
        for folder in folders:
            first, second = listed[folder.name]
            assert first.endswith(" " + HEADERS[folder.name].splitlines()[0].removeprefix("# "))
            assert second.strip().split(", ") == sorted(file.name for file in folder.iterdir())
            assert len(first) <= 110


def test_a_copy_is_the_recipe_s_files_as_they_are(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["recipes", "copy", "cold-start", str(tmp_path / "new" / "one")])

    copies = sorted((tmp_path / "new" / "one").iterdir())
    assert done.output.split() == [str(path) for path in copies]
    originals = sorted((ROOT / "cold-start").iterdir())
    assert [p.name for p in copies] == [p.name for p in originals]
    assert [p.read_bytes() for p in copies] == [p.read_bytes() for p in originals]


def test_a_copy_overwrites_nothing_and_leaves_nothing_half_done(tmp_path: Path) -> None:
    (tmp_path / "3-opd.yaml").write_text("mine")

    with pytest.raises(UsageError, match=r"3-opd\.yaml: is there already"):
        copy_recipe("cold-start", tmp_path)

    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("3-opd.yaml", "mine")]


def test_an_unknown_recipe_is_refused_with_a_near_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'horizon'"):
        copy_recipe("horzon", tmp_path)
    with pytest.raises(UsageError, match="known recipes: aligned-prompts, cold-start, "):
        copy_recipe("x", tmp_path)


def test_one_folder_holds_all_recipes(tmp_path: Path) -> None:
    copied = [path for recipe in recipes() for path in copy_recipe(recipe.name, tmp_path)]

    assert len(copied) == len(set(copied)) == len(list(tmp_path.iterdir()))


def parse(line: str) -> None:
    """Have click read a command, and not carry it out."""
    name, *arguments = shlex.split(line, comments=True)
    command = cli.commands[name]
    if isinstance(command, click.Group) and arguments:
        command = command.commands[arguments.pop(0)]
    command.make_context(name, arguments)


def test_the_commands_of_the_page_can_be_given() -> None:
    page = re.sub(r"\\\n +", "", (DOCS / "recipes.md").read_text())
    commands = re.findall(r"^opdcache (.*)", page, re.MULTILINE)

    assert len(commands) > 20
    for command in commands:
        parse(command)


def test_reverse_distillation_is_the_same_run_with_the_models_swapped() -> None:
    forward, reverse = (
        yaml.safe_load((ROOT / "reverse" / f"{name}.yaml").read_text())
        for name in ("forward", "reverse")
    )
    models = forward["student"]["model"], forward["teacher"]["model"]
    swapped = reverse["teacher"]["model"], reverse["student"]["model"]
    for config in (forward, reverse):
        del config["student"]["model"], config["teacher"]["model"]

    assert models == swapped
    assert forward == reverse


def test_a_cold_start_samples_as_the_paper_does_and_drops_what_is_not_to_be_imitated() -> None:
    sampling = load_run(ROOT / "cold-start" / "1-teacher.yaml").rollout.sampling
    imitating = load_run(ROOT / "cold-start" / "2-sft.yaml").train

    assert (sampling.temperature, sampling.top_p) == (0.7, 0.95)
    assert set(imitating.drop) == {"truncated", "repetitive"}
    assert imitates(imitating.loss)


def test_a_copy_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "rounded.yaml").symlink_to("gone")

    with pytest.raises(UsageError, match=r"rounded\.yaml: is there already"):
        copy_recipe("heal", tmp_path)

    assert [path.name for path in tmp_path.iterdir()] == ["rounded.yaml"]


def test_a_copy_that_breaks_off_takes_back_what_it_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Path.open

    def full(path: Path, *how: Any, **more: Any) -> Any:
        if path == tmp_path / "rounded.yaml":
            raise OSError(28, "No space left on device")
        return opened(path, *how, **more)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OSError, match="No space left"):
        copy_recipe("heal", tmp_path)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", HEADERS)
def test_the_commands_of_a_header_exist_and_so_do_their_files(name: str) -> None:
    header = re.sub(r"\\\n# +", "", HEADERS[name])
    commands = re.findall(r"^#   opdcache (.*)", header, re.MULTILINE)

    assert commands
    for command in commands:
        parse(command)
    named = {file for command in commands for file in re.findall(r"[\w-]+\.yaml", command)}
    assert named <= {file.name for file in (ROOT / name).iterdir()}
    assert {file.name for file in (ROOT / name).glob("*.yaml")} - named == set()


@pytest.mark.parametrize("run_file", RUN_FILES, ids=lambda path: path.stem)
def test_every_run_file_parses_and_can_be_planned(
    run_file: Path, tmp_path: Path, tiny_student: Path, tiny_teacher: Path
) -> None:
    for data in run_file.parent.glob("*.jsonl"):
        shutil.copy(data, tmp_path)
    rows = [{"prompt": f"{i}", "task": task} for i in range(20) for task in ("aligned", "other")]
    (tmp_path / "aligned.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(tiny_student, tmp_path / "2-sft" / "students" / "001")
    path = write(tmp_path, run_file, config_of(run_file, tiny_student, tiny_teacher))

    planned = CliRunner().invoke(cli, ["plan", str(path), "--json"], standalone_mode=False)

    assert planned.exception is None
    assert json.loads(planned.output)["rounds"]


def test_the_cold_start_s_prompts_are_in_nothing_that_comes_later() -> None:
    first, later = (
        RunPrompts(load_run(ROOT / "cold-start" / f"{n}.yaml")) for n in ("1-teacher", "3-opd")
    )
    ours = {prompt.messages for prompt in first.training.prompts}
    theirs = {p.messages for p in (*later.training.prompts, *later.held_out.prompts)}

    assert len(ours) == 64
    assert len(theirs) > 200
    assert ours & theirs == set()


def llama(folder: Path, tokenizer: Path, **changes: object) -> Any:
    make_tiny_model(folder, tokenizer, seed=3, **changes)
    return AutoModelForCausalLM.from_pretrained(folder)


def test_layers_are_dropped_and_the_others_compute_as_before(
    tmp_path: Path, tiny_tokenizer_folder: Path
) -> None:
    model = llama(tmp_path, tiny_tokenizer_folder, num_hidden_layers=4)
    ids = torch.arange(12)[None]
    kept = [model.model.layers[i] for i in (0, 2)]
    with torch.no_grad():  # the two layers by hand, between embedding and norm
        hidden = model.model.embed_tokens(ids)
        rotary = model.model.rotary_emb(hidden, torch.arange(12)[None])
        mask = torch.full((12, 12), float("-inf")).triu(1)[None, None]
        for layer in kept:
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
        expected = model.lm_head(model.model.norm(hidden))

    drop_layers(model, (1, 3))

    assert list(model.model.layers) == kept
    assert model.config.num_hidden_layers == 2
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected)
        cached = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
        again = model.generate(
            ids, max_new_tokens=4, do_sample=False, eos_token_id=None, use_cache=False
        )
    assert cached.tolist() == again.tolist()


def test_a_copy_without_layers_is_loaded_as_it_was_saved(
    tmp_path: Path, tiny_tokenizer_folder: Path
) -> None:
    whole = llama(tmp_path / "whole", tiny_tokenizer_folder, num_hidden_layers=3)
    arguments = [str(tmp_path / "whole"), str(tmp_path / "copy"), "--drop-layers", "0,2"]

    done = CliRunner().invoke(cli, ["recipes", "damage", *arguments], standalone_mode=False)

    assert done.output == f"{tmp_path / 'copy'}: 2 layers dropped, 1 left\n"
    copy = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    ids = torch.arange(9)[None]
    drop_layers(whole, (0, 2))
    with torch.no_grad():
        torch.testing.assert_close(copy(ids).logits, whole(ids).logits)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "copy" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_lists_that_say_something_of_every_layer_follow(tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=TINY_VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            layer_types=kinds,
            sliding_window=4,
            use_sliding_window=True,
            pad_token_id=PAD_ID,
        )
    )

    drop_layers(model, (0,))
    model.save_pretrained(tmp_path)

    copy: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert copy.config.layer_types == kinds[1:]
    with torch.no_grad():
        ids = torch.arange(20)[None]
        torch.testing.assert_close(copy(ids).logits, model(ids).logits)


def test_layers_whose_loss_the_configuration_cannot_say_are_refused() -> None:
    config = Qwen3MoeConfig(
        vocab_size=TINY_VOCAB,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_experts=2,
        num_experts_per_tok=1,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        mlp_only_layers=[0],  # by index: without layer 0 it would be said of layer 1
        pad_token_id=PAD_ID,
    )

    drop_layers(Qwen3MoeForCausalLM(config), (2,))
    with pytest.raises(ModelError, match="cannot say which layers are left"):
        drop_layers(Qwen3MoeForCausalLM(config), (0,))


@pytest.mark.parametrize("layers", [(0, 1), (2,), (-1,)])
def test_layers_that_are_not_there_and_all_of_them_are_refused(
    tmp_path: Path, tiny_tokenizer_folder: Path, layers: tuple[int, ...]
) -> None:
    model = llama(tmp_path, tiny_tokenizer_folder)

    with pytest.raises(UsageError, match="expected some of 0 to 1, not all"):
        drop_layers(model, layers)

    assert len(model.model.layers) == 2


def test_a_model_of_another_build_is_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=2, n_head=1))

    for damaging in (lambda: drop_layers(model, (0,)), lambda: round_weights(model, 3)):
        with pytest.raises(ModelError, match=r"in model\.layers, as Llama does, got GPT2LMHead"):
            damaging()


@pytest.mark.parametrize(("bits", "group"), [(3, 64), (2, 16), (8, 48)])
def test_rounded_weights_are_the_nearest_of_their_group_s_steps(
    tmp_path: Path, tiny_tokenizer_folder: Path, bits: int, group: int
) -> None:
    model = llama(tmp_path, tiny_tokenizer_folder)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}

    num_rounded = round_weights(model, bits, group)

    linear = [n for n in before if n.startswith("model.layers.") and n.endswith("proj.weight")]
    assert len(linear) == 14
    assert num_rounded == sum(before[name].numel() for name in linear)
    highest = 2 ** (bits - 1) - 1
    for name, weight in model.state_dict().items():
        if name not in linear:
            assert torch.equal(weight, before[name])
            continue
        for row, exact in zip(weight[:3].tolist(), before[name][:3].tolist(), strict=True):
            for start in range(0, len(row), group):
                step = max(map(abs, exact[start : start + group])) / highest
                for value, old in zip(
                    row[start : start + group], exact[start : start + group], strict=True
                ):
                    assert abs(value - old) <= step * 0.500001
                    assert abs(value / step - round(value / step)) < 1e-4
                    assert abs(round(value / step)) <= highest
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(9)[None]).logits).all()


def test_a_group_of_zeros_stays_as_it_is(tmp_path: Path, tiny_tokenizer_folder: Path) -> None:
    model = llama(tmp_path, tiny_tokenizer_folder)
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight[3] = 0

    round_weights(model, 3)

    assert torch.equal(weight[3], torch.zeros(64))
    assert torch.isfinite(weight).all()


def test_a_rounded_copy_keeps_its_dtype_and_what_is_there_is_not_overwritten(
    tmp_path: Path, tiny_tokenizer_folder: Path
) -> None:
    llama(tmp_path / "whole", tiny_tokenizer_folder).bfloat16().save_pretrained(tmp_path / "whole")

    said = damage(tmp_path / "whole", tmp_path / "copy", bits=4)

    copy: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    assert copy.dtype == torch.bfloat16
    assert re.fullmatch(r"[\d,]+ of [\d,]+ weights rounded to 4 bits", said)
    with pytest.raises(UsageError, match="copy: is there already"):
        damage(tmp_path / "whole", tmp_path / "copy", bits=4)
    with pytest.raises(UsageError, match="no damage is asked for"):
        damage(tmp_path / "whole", tmp_path / "another")
    assert not (tmp_path / "another").exists()


def test_models_that_are_there_stay_as_they_are(tmp_path: Path) -> None:
    for name in ("teacher", "student", "rounded"):
        (tmp_path / "models" / name).mkdir(parents=True)

    done = CliRunner().invoke(cli, ["recipes", "models", str(tmp_path)], standalone_mode=False)

    assert done.output.split() == [str(p) for p in make_models(tmp_path / "models")]
    assert [p for p in (tmp_path / "models").rglob("*") if not p.is_dir()] == []


@pytest.fixture(scope="module")
def cold_started(
    tmp_path_factory: pytest.TempPathFactory, tiny_student: Path, tiny_teacher: Path
) -> Path:
    """A folder in which the cold start was made, at reduced size."""
    folder = tmp_path_factory.mktemp("cold-start")
    for name in ("1-teacher", "2-sft", "3-opd"):
        file = ROOT / "cold-start" / f"{name}.yaml"
        config = shrunk(config_of(file, tiny_student, tiny_teacher))
        if name == "2-sft":
            config["train"] |= {"drop": ["repetitive"], "batch_samples": 6, "epochs": 6}
            config["train"]["optimizer"] = {"lr": 2e-3}
        path = write(folder, file, config)
        if name == "1-teacher":
            opdcache("rollout", path, "--round", 0)
        else:
            opdcache("run", path)
    return folder


@pytest.mark.engine
def test_a_cold_start_imitates_the_teacher_better_every_epoch(cold_started: Path) -> None:
    folder = RunFolder(cold_started / "2-sft")

    losses = [row["loss"] for row in folder.metrics()]
    assert len(losses) == 6  # all samples in one update: an epoch each
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.1
    sampled = RunFolder(cold_started / "1-teacher").need(RolloutRound, 0)
    assert [s.key for s in folder.need(RolloutRound, 0).shards] == [s.key for s in sampled.shards]
    assert [list(shard.served) for shard in folder.need(ScoreRound, 0).shards] == [[]]


@pytest.mark.engine
def test_distillation_goes_on_from_the_cold_started_student(cold_started: Path) -> None:
    first, then = (RunFolder(cold_started / name) for name in ("2-sft", "3-opd"))

    imitating = first.need(TrainRound, 0).student
    resolved = then.resolved()
    assert resolved is not None
    assert resolved.student == then.need(RolloutRound, 0).student == imitating
    assert then.need(TrainRound, 0).student != imitating
    assert then.metrics()[0]["ess"] == pytest.approx(1, abs=1e-3)


@pytest.mark.engine
def test_a_model_that_is_shown_the_answer_teaches_itself(
    tmp_path: Path, tiny_student: Path
) -> None:
    file = ROOT / "self-distillation" / "self-distillation.yaml"
    path = write(tmp_path, file, shrunk(config_of(file, tiny_student, tiny_student)))

    opdcache("run", path)

    folder = RunFolder(path.with_suffix(""))
    resolved = folder.resolved()
    assert resolved is not None
    assert resolved.student == resolved.teacher
    assert folder.metrics()[0]["reverse_kl_tail"] > 0.01  # it reads another prompt than the student
    assert folder.need(TrainRound, 0).student != resolved.student
