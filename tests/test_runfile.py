"""Run files: what is accepted, and one clear line for whatever is not."""

import copy
import itertools
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from opdcache.errors import ConfigError
from opdcache.runfile import load_run
from opdcache.schemas.config import RunConfig
from opdcache.schemas.losses import (
    CELLS,
    Direction,
    LossConfig,
    Normalisation,
    Support,
    cell,
    refusal,
)
from opdcache.schemas.prompts import HuggingFaceSource, JsonlSource, ReasoningGymSource
from opdcache.schemas.teachers import STUDENT, HttpBackend, TeacherConfig, TransformersBackend

MINIMAL: dict[str, Any] = {
    "student": {"model": "models/student"},
    "teacher": {"model": "./models/teacher"},
    "prompts": {"source": {"type": "jsonl", "path": "prompts.jsonl"}},
}
EVERY_LOSS = [
    LossConfig(support=s, direction=d, normalisation=n, k=k)
    for s, d, n, k in itertools.product(
        get_args(Support), get_args(Direction), get_args(Normalisation), (1, 16)
    )
]
# The losses that there are, written out: support -> (direction, normalisation)
ON_A_SUPPORT = {
    *itertools.product(("reverse", "forward", "jsd"), ("tail", "renormalised")),
    ("reverse", "truncated"),
    ("forward", "truncated"),
    ("reverse", "reference"),
}
ON_TOPK = itertools.product(("teacher_topk", "student_topk", "overlap", "union"), ON_A_SUPPORT)
ALLOWED = {
    ("sampled", "reverse", "none"),
    ("sampled", "forward", "none"),
    ("draws", "forward", "none"),
    ("symmetric_difference", "reverse", "reference"),
    *((support, *form) for support, form in ON_TOPK),
}


def run_file(folder: Path, changes: dict[str, Any] | None = None) -> Path:
    """A minimal run file with values put in by dotted path; None takes a key away."""
    raw = copy.deepcopy(MINIMAL)
    for place, value in (changes or {}).items():
        *parents, last = place.split(".")
        inner = raw
        for name in parents:
            inner = inner.setdefault(name, {})
        if value is None:
            del inner[last]
        else:
            inner[last] = value
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def load(folder: Path, changes: dict[str, Any] | None = None) -> RunConfig:
    return load_run(run_file(folder, changes))


def fault(path: Path) -> str:
    """The one line that a run file is refused with."""
    with pytest.raises(ConfigError) as caught:
        load_run(path)
    said = str(caught.value)
    assert len(said.splitlines()) == 1
    assert said.startswith(str(path))
    assert caught.value.exit_code == 2
    return said


def test_a_minimal_run_file_is_accepted(tmp_path: Path) -> None:
    config = load(tmp_path)

    assert (config.rounds, config.train.loss.k, config.teacher.dtype) == (1, 16, "bfloat16")
    assert config.evaluation is None


@pytest.mark.parametrize(
    ("place", "near"),
    [
        ("sead", "seed"),
        ("evalution", "evaluation"),
        ("train.los", "loss"),
        ("train.loss.suport", "support"),
        ("train.optimizer.learning_lr", None),
        ("rollout.sampling.temprature", "temperature"),
        ("teacher.dtpye", "dtype"),
        ("prompts.max_prompt_token", "max_prompt_tokens"),
        ("prompts.source.paths", "path"),
    ],
)
def test_an_unknown_key_is_named_with_its_near_match(
    tmp_path: Path, place: str, near: str | None
) -> None:
    said = fault(run_file(tmp_path, {place: 1}))

    assert "unknown key" in said
    assert place.rsplit(".", 1)[-1] in said
    assert f"did you mean {near!r}?" in said if near else "known keys: betas, eps, lr" in said


def test_an_unknown_key_of_a_prompt_source_is_matched_within_its_kind(tmp_path: Path) -> None:
    source = {"type": "reasoning_gym", "dataset": "chain_sum", "size": 2, "sed": 1}

    said = fault(run_file(tmp_path, {"prompts.source": source}))

    assert "'seed'" in said
    assert "sed" in said


def test_a_prompt_source_does_not_offer_the_keys_of_another_kind(tmp_path: Path) -> None:
    said = fault(run_file(tmp_path, {"prompts.source.sise": 1}))

    assert said.endswith("known keys: columns, path, task, type")


def test_an_unknown_key_of_the_evaluation_s_source_gets_its_near_match(tmp_path: Path) -> None:
    evaluation = {"source": {"type": "parquet", "path": "p", "pathh": "q"}}

    assert "did you mean 'path'?" in fault(run_file(tmp_path, {"evaluation": evaluation}))


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("student", "studnet"),
        ("teacher.model", "modle"),
        ("prompts.source", "sorce"),
        ("prompts.source.path", "pth"),
    ],
)
def test_a_misspelt_key_that_must_be_there_gets_its_near_match(
    tmp_path: Path, right: str, wrong: str
) -> None:
    *parents, last = right.split(".")
    value: Any = MINIMAL
    for name in right.split("."):
        value = value[name]

    said = fault(run_file(tmp_path, {right: None, ".".join([*parents, wrong]): value}))

    assert wrong in said
    assert f"did you mean {last!r}?" in said


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("rounds", "three"),
        ("rounds", 0),
        ("seed", 1.5),
        ("student", "models/student"),
        ("student.model", 7),
        ("teacher.dtype", "float64"),
        ("rollout.sampling.temperature", 0),
        ("rollout.sampling.top_p", 1.2),
        ("score.columns", ["sampled", "hidden_states"]),
        ("score.step", 0),
        ("train.optimizer.betas", [0.9]),
        ("train.zero_stage", 4),
        ("train.loss.k", 0),
        ("prompts.order", "random"),
    ],
)
def test_a_wrong_value_is_named_by_its_place(tmp_path: Path, place: str, value: object) -> None:
    assert f"{place}" in fault(run_file(tmp_path, {place: value}))


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    assert "teacher.model: Field required" in fault(run_file(tmp_path, {"teacher.model": None}))


def test_a_prompt_source_of_no_known_kind_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    said = fault(run_file(tmp_path, {"prompts.source": {"type": "csv", "path": "x"}}))

    assert all(kind in said for kind in ("csv", "jsonl", "parquet", "reasoning_gym"))


def test_a_wrong_value_says_what_was_there(tmp_path: Path) -> None:
    assert "'three'" in fault(run_file(tmp_path, {"rounds": "three"}))


def test_further_faults_are_counted(tmp_path: Path) -> None:
    assert "(1 more)" in fault(run_file(tmp_path, {"rounds": 0, "seed": "x"}))


def test_a_file_that_is_no_yaml_is_refused_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("seed: 1\nrounds: 2\nstudent: {model: [\nteacher: x: y\n")

    assert fault(path).startswith(f"{path}:4: not YAML")


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just text", "3"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)

    assert "a run file is a mapping" in fault(path)


@pytest.mark.parametrize("data", ["seed: é\n".encode("latin-1"), b"seed: \0\n", b"\x80\x81"])
def test_a_file_that_is_no_text_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(data)

    assert fault(path)


def test_keys_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("1: 2\n")

    assert fault(path)


def test_a_missing_file_is_refused_with_a_remedy(tmp_path: Path) -> None:
    said = fault(tmp_path / "nowhere.yaml")

    assert "No such file" in said
    assert "give the path of a run.yaml" in said


def test_a_folder_in_place_of_the_file_is_refused(tmp_path: Path) -> None:
    assert "directory" in fault(tmp_path)


def test_relative_paths_are_the_run_file_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, elsewhere = tmp_path / "a", tmp_path / "b"
    (folder / "models" / "student").mkdir(parents=True)
    elsewhere.mkdir()
    run_file(
        folder,
        {
            "cache": "../shared",
            "output": "out",
            "evaluation": {"source": {"type": "parquet", "path": "held/out.parquet"}},
        },
    )
    monkeypatch.chdir(elsewhere)

    config = load_run(Path("../a/run.yaml"))

    assert Path(config.cache).resolve() == tmp_path / "shared"
    assert config.output == str(folder / "out")
    assert config.student.model == str(folder / "models" / "student")
    assert Path(config.teacher.model).resolve() == folder / "models" / "teacher"
    assert isinstance(config.prompts.source, JsonlSource)
    assert config.prompts.source.path == str(folder / "prompts.jsonl")
    assert config.evaluation is not None
    assert config.evaluation.source.path == str(folder / "held/out.parquet")  # type: ignore[union-attr]


def test_the_output_is_named_after_the_run_file_when_it_is_not_given(tmp_path: Path) -> None:
    assert load(tmp_path).output == str(tmp_path / "run")


def test_absolute_paths_and_urls_stay(tmp_path: Path) -> None:
    config = load(tmp_path, {"cache": "s3://bucket/cache", "student.model": "/models/one"})

    assert (config.cache, config.student.model) == ("s3://bucket/cache", "/models/one")


def test_a_model_that_is_no_folder_but_may_be_the_hub_s_stays(tmp_path: Path) -> None:
    config = load(tmp_path, {"student.model": "Qwen/Qwen2.5-0.5B"})

    assert config.student.model == "Qwen/Qwen2.5-0.5B"


def test_a_generated_prompt_source_has_no_path(tmp_path: Path) -> None:
    source = {"type": "reasoning_gym", "dataset": "chain_sum", "size": 2}

    loaded = load(tmp_path, {"prompts.source": source}).prompts.source

    assert loaded == ReasoningGymSource.model_validate(source)


@pytest.mark.parametrize(
    ("asked", "found"),
    [("data/own", "data/own"), ("./new", "new"), ("them/theirs", None), ("/data/own", "/data/own")],
)
def test_a_dataset_is_a_folder_of_the_run_file_s_or_a_hub_id(
    tmp_path: Path, asked: str, found: str | None
) -> None:
    (tmp_path / "data" / "own").mkdir(parents=True)

    source = load(
        tmp_path, {"prompts.source": {"type": "huggingface", "dataset": asked}}
    ).prompts.source

    assert isinstance(source, HuggingFaceSource)
    assert source.dataset == ("them/theirs" if found is None else str(tmp_path / found))


def test_a_column_that_is_none_of_ours_is_refused_with_the_near_match(tmp_path: Path) -> None:
    said = fault(run_file(tmp_path, {"prompts.source.columns": {"promt": "question"}}))

    assert "did you mean 'prompt'?" in said


@pytest.mark.parametrize("verifier", ["maths", "module", "module:", "a.b:c.d", "a b:c"])
def test_a_verifier_is_one_of_two_names_or_a_function_of_a_module(
    tmp_path: Path, verifier: str
) -> None:
    evaluation = {"source": {"type": "jsonl", "path": "p"}, "verifier": verifier}
    assert "evaluation.verifier" in fault(run_file(tmp_path, {"evaluation": evaluation}))


def test_reasoning_gym_s_scorers_are_refused_for_prompts_from_elsewhere(tmp_path: Path) -> None:
    gym = {"type": "reasoning_gym", "dataset": "chain_sum", "size": 9}
    evaluation = {"source": gym, "verifier": "reasoning_gym"}
    load_run(run_file(tmp_path, {"evaluation": evaluation}))
    split = {"prompts.held_out_share": 0.5, "evaluation": {"verifier": "reasoning_gym"}}
    said = fault(run_file(tmp_path, split))
    assert (
        "evaluation.verifier: 'reasoning_gym' scores answers to prompts of a reasoning_gym" in said
    )
    load_run(run_file(tmp_path, split | {"prompts.source": gym}))


def test_an_evaluation_without_prompts_is_refused(tmp_path: Path) -> None:
    said = fault(run_file(tmp_path, {"evaluation": {"num_prompts": 4}}))

    assert "give evaluation.source, or prompts.held_out_share" in said


def test_an_evaluation_may_take_what_the_hash_holds_out(tmp_path: Path) -> None:
    changes = {"evaluation": {"num_prompts": 4}, "prompts.held_out_share": 0.1}

    config = load(tmp_path, changes)

    assert config.evaluation is not None
    assert config.evaluation.source is None


def test_near_copies_of_no_evaluation_are_refused(tmp_path: Path) -> None:
    said = fault(run_file(tmp_path, {"prompts.near_duplicates": {"threshold": 0.8}}))

    assert "no evaluation prompts to compare with" in said


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("prompts.shares.maths", 0),
        ("prompts.shares.maths", float("inf")),
        ("prompts.max_epochs", 0),
        ("prompts.held_out_share", 1),
        ("prompts.near_duplicates.threshold", 0.1),
        ("prompts.source.task", ""),
    ],
)
def test_a_prompt_setting_out_of_range_is_named(tmp_path: Path, place: str, value: object) -> None:
    assert place.rsplit(".", 1)[-1] in fault(run_file(tmp_path, {place: value}))


def test_a_number_that_yaml_takes_for_text_is_a_number(tmp_path: Path) -> None:
    path = run_file(tmp_path)
    path.write_text(path.read_text() + "train:\n  optimizer:\n    lr: 1e-6\n")

    assert load_run(path).train.optimizer.lr == 1e-6


@pytest.mark.parametrize("loss", EVERY_LOSS, ids=str)
def test_a_loss_is_refused_with_a_reason_or_is_one_of_the_registry(loss: LossConfig) -> None:
    reason = refusal(loss)
    form = (loss.support, loss.direction, loss.normalisation)
    meaningless = (loss.normalisation, loss.k) == ("renormalised", 1) and loss.support != "union"

    if form in ALLOWED and not meaningless:
        assert reason is None
        assert cell(loss) is CELLS[form]
    else:
        assert reason is not None
        assert len(reason.split()) > 4


def test_the_registry_has_the_allowed_combinations_and_no_other() -> None:
    assert set(CELLS) == ALLOWED


@pytest.mark.parametrize("loss", [loss for loss in EVERY_LOSS if refusal(loss)], ids=str)
def test_a_refused_loss_is_one_line_with_its_reason(tmp_path: Path, loss: LossConfig) -> None:
    said = fault(run_file(tmp_path, {"train.loss": loss.model_dump()}))

    assert f"train.loss: {refusal(loss)}" in said


@pytest.mark.parametrize("form", CELLS, ids="-".join)
def test_every_combination_of_the_registry_is_accepted(
    tmp_path: Path, form: tuple[str, str, str]
) -> None:
    loss = dict(zip(("support", "direction", "normalisation"), form, strict=True))

    changes = {"train.loss": loss, "score.draws": 12 if form[0] == "draws" else 0}
    if form[:2] == ("sampled", "forward"):
        changes["rollouts.from"] = "other"

    assert load(tmp_path, changes).train.loss.support == form[0]


@pytest.mark.parametrize("name", ["tp_plan", "tp_size", "distributed_config"])
def test_an_argument_that_wants_several_processes_is_refused(tmp_path: Path, name: str) -> None:
    backend = {"type": "transformers", "arguments": {name: "auto", "device_map": "auto"}}

    said = fault(run_file(tmp_path, {"teacher.backend": backend}))

    assert f"{name!r} needs several processes, and a worker is one; split the model with" in said


@pytest.mark.parametrize(
    "url", ["http://teacher:80o0", "http://", "http://teacher:99999", "http:x"]
)
def test_a_url_that_cannot_be_one_is_refused(tmp_path: Path, url: str) -> None:
    backend = {"type": "http", "url": url, "tokenizer": "t", "budget_tokens": 1}

    said = fault(run_file(tmp_path, {"teacher.backend": backend, "teacher.revision": "1"}))

    assert "teacher.backend.url: it " in said


def test_the_student_s_own_completions_are_not_imitated(tmp_path: Path) -> None:
    loss = {"support": "sampled", "direction": "forward", "normalisation": "none"}

    said = fault(run_file(tmp_path, {"train.loss": loss, "score.columns": []}))

    assert "take completions of another model with 'rollouts: {from: …}'" in said
    changes = {"train.loss": loss, "score.columns": [], "rollouts.from": "other"}
    assert load(tmp_path, changes).score.columns == ()


def test_a_loss_on_draws_without_draws_is_told_where_to_ask_for_them(tmp_path: Path) -> None:
    loss = {"support": "draws", "direction": "forward", "normalisation": "none"}

    said = fault(run_file(tmp_path, {"train.loss": loss}))

    assert "train.loss: support 'draws' needs score.draws to say how many" in said


def test_tokens_chosen_by_an_entropy_that_is_not_stored_are_refused(tmp_path: Path) -> None:
    changes = {"train.tokens": {"fraction": 0.2, "by": "entropy"}, "score.columns": ["topk"]}

    said = fault(run_file(tmp_path, changes))

    assert "train.tokens.by: it needs the score column entropy; add it" in said


@pytest.mark.parametrize(
    "loss",
    [
        {"support": "sampled", "normalisation": "none"},
        {"normalisation": "reference"},
        {"normalisation": "truncated", "stop_gradient": True},
    ],
)
def test_tokens_are_not_chosen_by_a_loss_that_is_no_divergence(
    tmp_path: Path, loss: dict[str, Any]
) -> None:
    changes = {"train.loss": loss, "train.tokens": {"fraction": 0.2}}

    assert "train.tokens.by: the value of this loss is no" in fault(run_file(tmp_path, changes))
    changes["train.tokens"]["by"] = "entropy"
    assert load(tmp_path, changes).train.tokens.fraction == 0.2


@pytest.mark.parametrize("place", ["loss.importance_cap", "loss.clamp", "tokens.half_life"])
def test_an_option_that_json_cannot_hold_is_refused(tmp_path: Path, place: str) -> None:
    said = fault(run_file(tmp_path, {f"train.{place}": float("inf")}))

    assert place.rpartition(".")[2] in said


@pytest.mark.parametrize("support", ["student_topk", "union", "symmetric_difference"])
def test_a_loss_on_recorded_ids_without_them_is_refused_whatever_else_it_looks_at(
    tmp_path: Path, support: str
) -> None:
    loss = {"support": support, "normalisation": "reference"}

    said = fault(run_file(tmp_path, {"train.loss": loss, "rollout.student_topk": 8}))

    assert "set rollout.student_topk to 16 or more, not 8" in said


def test_a_student_topk_loss_without_recorded_top_k_is_refused(tmp_path: Path) -> None:
    said = fault(
        run_file(tmp_path, {"train.loss.support": "student_topk", "rollout.student_topk": 0})
    )

    assert "set rollout.student_topk to 16 or more, not 0" in said


def test_a_student_topk_loss_of_more_entries_than_recorded_is_refused(tmp_path: Path) -> None:
    changes = {"train.loss": {"support": "student_topk", "k": 17}, "rollout.student_topk": 16}

    assert "set rollout.student_topk to 17 or more" in fault(run_file(tmp_path, changes))


@pytest.mark.parametrize("support", ["teacher_topk", "overlap"])
def test_a_loss_of_more_entries_than_stored_is_refused(tmp_path: Path, support: str) -> None:
    changes = {"train.loss": {"support": support, "k": 32}, "score.k": 16}

    assert "k = 32 is more than score.k = 16 keeps" in fault(run_file(tmp_path, changes))


def test_a_loss_of_fewer_entries_than_stored_is_accepted(tmp_path: Path) -> None:
    changes = {"train.loss.k": 4, "score.k": 16}

    assert load(tmp_path, changes).train.loss.k == 4


@pytest.mark.parametrize(
    ("support", "column"),
    [("sampled", "sampled"), ("overlap", "topk"), ("student_topk", "student_topk")],
)
def test_a_loss_whose_column_is_not_stored_is_refused(
    tmp_path: Path, support: str, column: str
) -> None:
    changes = {
        "train.loss": {
            "support": support,
            "normalisation": "none" if support == "sampled" else "tail",
        },
        "score.columns": ["entropy"],
    }

    said = fault(run_file(tmp_path, changes))

    assert f"needs the score column {column}; add it to score.columns" in said


def test_the_student_s_entries_are_not_scored_when_none_are_recorded(tmp_path: Path) -> None:
    config = load(tmp_path, {"rollout.student_topk": 0})

    assert config.columns_of(config.teacher) == {"sampled", "entropy", "topk"}


HTTP = {
    "type": "http",
    "url": "http://teacher:8000",
    "tokenizer": "models/tokens",
    "budget_tokens": 10**6,
}
SERVED = {"model": "big", "revision": "2", "backend": HTTP}
VLLM = {"model": "models/big", "backend": {"type": "vllm"}}
SAMPLED = {"support": "sampled", "normalisation": "none"}
STUDENT_TOPK = {"support": "student_topk"}


def test_a_run_file_without_a_backend_is_scored_with_transformers_and_as_sampled(
    tmp_path: Path,
) -> None:
    config = load(tmp_path)

    assert config.teacher == TeacherConfig(
        model=str(tmp_path / "models" / "teacher"),
        revision=None,
        dtype="bfloat16",
        backend=TransformersBackend(),
        prompt=None,
    )
    assert (config.teachers, config.references) == ({}, {})


@pytest.mark.parametrize("part", ["teachers.maths", "references.base"])
def test_more_models_are_teachers_like_the_first(tmp_path: Path, part: str) -> None:
    config = load(tmp_path, {part: {"model": "x/y", "dtype": "float32"}})

    assert config.model_dump()[part.split(".")[0]][part.split(".")[1]]["dtype"] == "float32"


@pytest.mark.parametrize(
    ("teacher", "columns"),
    [
        ({"model": "m"}, {"sampled", "entropy", "topk", "student_topk"}),
        (VLLM, {"sampled", "topk"}),
        (SERVED, {"sampled", "topk"}),
        (
            {"model": "m", "backend": {"type": "vllm", "gathers_ids": True}},
            {"sampled", "topk", "student_topk"},
        ),
    ],
)
def test_columns_that_a_backend_cannot_give_are_left_out_by_default(
    tmp_path: Path, teacher: dict[str, Any], columns: set[str]
) -> None:
    config = load(tmp_path, {"teacher": teacher})

    assert config.columns_of(config.teacher) == columns


@pytest.mark.parametrize("part", ["teacher", "teachers.maths", "references.base"])
@pytest.mark.parametrize(("model", "kind"), [(VLLM, "vllm"), (SERVED, "http")])
def test_columns_that_a_backend_cannot_give_are_refused_by_name(
    tmp_path: Path, part: str, model: dict[str, Any], kind: str
) -> None:
    said = fault(run_file(tmp_path, {part: model, "score.columns": ["topk", "entropy"]}))

    assert f"the backend '{kind}' cannot give 'entropy', only sampled, topk" in said


def test_draws_of_a_teacher_that_gives_none_are_refused(tmp_path: Path) -> None:
    said = fault(run_file(tmp_path, {"teacher": VLLM, "score.draws": 4}))

    assert "the backend 'vllm' cannot give 'draws'" in said


@pytest.mark.parametrize("part", ["teacher", "teachers.maths"])
@pytest.mark.parametrize("model", [VLLM, SERVED])
def test_a_loss_that_one_teacher_cannot_serve_is_refused(
    tmp_path: Path, part: str, model: dict[str, Any]
) -> None:
    said = fault(run_file(tmp_path, {part: model, "train.loss": STUDENT_TOPK}))

    assert "needs the score column student_topk" in said
    assert "take a backend that gives it" in said


def test_a_loss_needs_nothing_of_a_reference(tmp_path: Path) -> None:
    changes = {"references.base": VLLM, "train.loss": STUDENT_TOPK}

    assert load(tmp_path, changes).references["base"].backend.type == "vllm"


@pytest.mark.parametrize("loss", [SAMPLED, {"support": "overlap"}])
@pytest.mark.parametrize("model", [VLLM, SERVED])
def test_every_other_loss_is_served_by_every_backend(
    tmp_path: Path, model: dict[str, Any], loss: dict[str, Any]
) -> None:
    assert load(tmp_path, {"teacher": model, "train.loss": loss}).teacher.model.endswith("big")


@pytest.mark.parametrize(
    ("backend", "said"),
    [
        ({**HTTP, "budget_tokens": None}, "budget_tokens"),
        ({k: v for k, v in HTTP.items() if k != "budget_tokens"}, "budget_tokens: Field required"),
        ({**HTTP, "budget_tokens": 0}, "budget_tokens"),
        ({k: v for k, v in HTTP.items() if k != "url"}, "url: Field required"),
        ({k: v for k, v in HTTP.items() if k != "tokenizer"}, "tokenizer: Field required"),
        ({**HTTP, "concurrency": 0}, "concurrency"),
        ({"type": "sglang"}, "'transformers', 'vllm', 'http'"),
    ],
)
def test_a_backend_that_lacks_something_is_refused_by_its_key(
    tmp_path: Path, backend: dict[str, Any], said: str
) -> None:
    assert said in fault(run_file(tmp_path, {"teacher": SERVED | {"backend": backend}}))


def test_a_served_teacher_needs_a_declared_version(tmp_path: Path) -> None:
    served = {name: value for name, value in SERVED.items() if name != "revision"}

    assert "a served model needs a declared version" in fault(
        run_file(tmp_path, {"teacher": served})
    )


@pytest.mark.parametrize("url", ["http://me:secret@teacher:8000", "https://secret@teacher"])
def test_credentials_in_a_url_are_refused_and_not_repeated(tmp_path: Path, url: str) -> None:
    said = fault(run_file(tmp_path, {"teacher": SERVED | {"backend": HTTP | {"url": url}}}))

    assert "name the variable that holds the key in api_key_variable" in said
    assert "secret" not in said


@pytest.mark.parametrize("part", ["teacher", "teachers.maths"])
def test_the_student_is_no_teacher(tmp_path: Path, part: str) -> None:
    said = fault(run_file(tmp_path, {part: {"model": STUDENT}}))

    assert "@student can only be a reference" in said


def test_the_student_may_be_a_reference_that_is_not_served(tmp_path: Path) -> None:
    assert load(tmp_path, {"references.policy.model": STUDENT}).references["policy"].model == (
        STUDENT
    )
    served = SERVED | {"model": STUDENT}
    assert "@student is not served by http" in fault(
        run_file(tmp_path, {"references.policy": served})
    )


@pytest.mark.parametrize("part", ["teacher", "teachers.maths"])
def test_an_evaluation_of_a_served_teacher_is_refused(tmp_path: Path, part: str) -> None:
    evaluation = {"source": {"type": "jsonl", "path": "held-out"}}
    changes: dict[str, Any] = {part: SERVED, "evaluation": evaluation}

    assert "it compares whole distributions" in fault(run_file(tmp_path, changes))
    changes["evaluation"] |= {"verifier": "math"}
    assert "evaluation.teacher to false" in fault(run_file(tmp_path, changes))


@pytest.mark.parametrize("part", ["teacher", "teachers.maths"])
def test_students_alone_may_be_evaluated_beside_a_served_teacher(tmp_path: Path, part: str) -> None:
    source = {"type": "jsonl", "path": "held-out"}
    alone = {"source": source, "verifier": "math", "teacher": False}
    evaluation = load(tmp_path, {part: SERVED, "evaluation": alone}).evaluation
    assert evaluation is not None
    assert not evaluation.teacher


def test_an_evaluation_does_not_mind_a_served_reference(tmp_path: Path) -> None:
    changes = {
        "references.base": SERVED,
        "evaluation": {"source": {"type": "jsonl", "path": "held-out"}},
    }

    assert load(tmp_path, changes).evaluation is not None


@pytest.mark.parametrize("context", ["The answer is {answer}.", "{ prompt }", ""])
def test_context_that_does_not_say_where_the_prompt_goes_is_refused(
    tmp_path: Path, context: str
) -> None:
    said = fault(run_file(tmp_path, {"teacher.prompt": {"context": context}}))

    assert "say where the prompt goes, with {prompt}" in said


def test_a_system_message_of_a_raw_prompt_is_refused(tmp_path: Path) -> None:
    said = fault(run_file(tmp_path, {"teacher.prompt": {"template": "raw", "system": "S"}}))

    assert "teacher.prompt.system: a raw prompt has no system message" in said


@pytest.mark.parametrize(
    ("place", "value", "near"),
    [
        ("teacher.backend", {"type": "vllm", "engin": {}}, "engine"),
        ("teacher.backend", {"type": "transformers", "argument": {}}, "arguments"),
        ("teacher.backend", {**HTTP, "concurency": 2}, "concurrency"),
        ("teachers.maths", {"model": "m", "backend": {"type": "vllm", "engin": {}}}, "engine"),
        ("references.base", {"model": "m", "backned": {}}, "backend"),
        ("teacher.prompt", {"contxt": "{prompt}"}, "context"),
        ("teachers.model", {"model": "m", "dtpye": "float32"}, "dtype"),
    ],
)
def test_a_misspelt_key_of_a_teacher_gets_its_near_match(
    tmp_path: Path, place: str, value: dict[str, Any], near: str
) -> None:
    changes = {"teacher.revision": "1", place: value}

    assert f"did you mean {near!r}?" in fault(run_file(tmp_path, changes))


def test_a_backend_does_not_offer_the_keys_of_another_kind(tmp_path: Path) -> None:
    said = fault(run_file(tmp_path, {"teacher.backend": {"type": "vllm", "url_": "x"}}))

    assert said.endswith("known keys: engine, gathers_ids, type")


def test_every_scoring_model_s_paths_are_the_run_file_s(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        {
            "teacher": {"model": "./t"},
            "teachers": {"maths": {"model": "./m"}, "code": {"model": "Qwen/Coder"}},
            "references": {"base": {"model": "../b"}, "policy": {"model": STUDENT}, "far": SERVED},
        },
    )

    models = {name: teacher.model for name, teacher in config.references.items()}
    assert config.teacher.model == str(tmp_path / "t")
    assert config.teachers["maths"].model == str(tmp_path / "m")
    assert config.teachers["code"].model == "Qwen/Coder"
    assert Path(models["base"]).resolve() == (tmp_path.parent / "b").resolve()
    assert (models["policy"], models["far"]) == (STUDENT, "big")
    backend = config.references["far"].backend
    assert isinstance(backend, HttpBackend)
    assert (backend.url, backend.tokenizer) == ("http://teacher:8000", "models/tokens")
    (tmp_path / "models").mkdir()
    backend = load(tmp_path, {"teacher": SERVED}).teacher.backend
    assert isinstance(backend, HttpBackend)
    assert backend.tokenizer == str(tmp_path / "models" / "tokens")


@pytest.mark.parametrize(
    ("loss", "serves"),
    [
        ({"support": "student_topk"}, False),
        ({"support": "union"}, False),
        ({"support": "sampled", "normalisation": "none"}, False),
        ({"support": "sampled", "normalisation": "none", "importance_cap": 2.0}, True),
        ({"support": "teacher_topk"}, True),
        ({"support": "overlap"}, True),
        ({"support": "overlap", "reference": "base", "reference_kl": 0.1}, False),
    ],
)
def test_older_rounds_serve_only_a_loss_that_any_policys_rollouts_serve(
    tmp_path: Path, loss: dict[str, Any], serves: bool
) -> None:
    changes = {"train.loss": loss, "train.max_staleness": 2, "references.base": {"model": "b"}}
    if serves:
        train = load(tmp_path, changes).train
        assert [list(train.trained_rounds(r)) for r in (0, 1, 4)] == [[0], [0, 1], [2, 3, 4]]
    else:
        assert "train.max_staleness: this loss looks" in fault(run_file(tmp_path, changes))


@pytest.mark.parametrize(
    ("train", "layout"),
    [
        ({}, "padded"),
        ({"packing": True}, "packed"),
        ({"attention": "flash_attention_2", "dtype": "bfloat16"}, "packed"),
        ({"attention": "flash_attention_2", "dtype": "bfloat16", "packing": False}, "padded"),
        ({"attention": "sdpa"}, "padded"),
        ({"share_prompts": True}, "shared"),
        ({"share_prompts": True, "packing": False, "attention": "eager"}, "shared"),
    ],
)
def test_sequences_are_packed_where_attention_skips_pairs_of_two_or_when_asked(
    tmp_path: Path, train: dict[str, Any], layout: str
) -> None:
    changes = {f"train.{name}": value for name, value in train.items()}
    assert load(tmp_path, changes or {"seed": 1}).train.layout == layout


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "train.loss.reference: 'base' is not in references (none)"),
        ({"references.other": {"model": "m"}}, "is not in references (other)"),
        (
            {"references.base": {"model": "m"}, "score.columns": ["topk"]},
            "needs the score column sampled of references.base",
        ),
        ({"references.base": {"model": "m"}}, None),
    ],
)
def test_a_losss_reference_must_be_scored_with_what_the_loss_needs(
    tmp_path: Path, changes: dict[str, Any], words: str | None
) -> None:
    loss = {"reference": "base", "reference_kl": 0.1}
    if words is None:
        assert load(tmp_path, {"train.loss": loss} | changes).train.loss.reference == "base"
    else:
        assert words in fault(run_file(tmp_path, {"train.loss": loss} | changes))


def test_limits_of_a_round_need_what_they_look_at(tmp_path: Path) -> None:
    sampled = {"train.loss": {"support": "sampled", "normalisation": "none"}}
    changes = {"score.columns": ["sampled"], "train.end_round": {"overlap": 0.5}} | sampled

    assert "need the score column topk of every teacher" in fault(run_file(tmp_path, changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train.packing": True}, "a row holds one prompt; leave out train.packing"),
        ({"train.attention": "flash_attention_2"}, "flash attention takes no mask"),
    ],
)
def test_prompts_are_shared_only_where_a_mask_can_say_so(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    shared = {"train.share_prompts": True, "train.dtype": "bfloat16"}

    assert words in fault(run_file(tmp_path, shared | changes))


def test_flash_attention_in_float32_is_refused(tmp_path: Path) -> None:
    changes = {"train.attention": "flash_attention_2", "train.dtype": "float32"}

    assert "flash attention does not compute in float32" in fault(run_file(tmp_path, changes))
