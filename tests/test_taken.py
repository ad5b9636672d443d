"""``rollouts: {from: RUN}``: another run's rounds, or an import, in place of sampling."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from pydantic import ValidationError

from opdcache.cli.main import cli
from opdcache.errors import (
    ConfigError,
    InputsMissing,
    LossError,
    ObjectMissing,
    RunChanged,
    TokenizerMismatch,
)
from opdcache.importing import import_rollouts
from opdcache.planner import plan
from opdcache.rollout.stage import plan_round
from opdcache.rollout.stage import run as rollout
from opdcache.rounds import status
from opdcache.runfile import load_run
from opdcache.runfolder import RunContext, RunFolder, open_run
from opdcache.schemas.config import RunConfig
from opdcache.schemas.plan import Rates
from opdcache.schemas.rounds import HeldOutRound, RolloutRound, ScoreRound, TrainRound
from opdcache.score.stage import run as score
from opdcache.score.stage import run_student
from opdcache.served import refuse_unserved
from opdcache.stage import Silent, Worker
from opdcache.store.cache import Cache, as_listed, rollout_commit
from opdcache.store.upkeep import pinned
from opdcache.train.samples import RoundSamples

from . import handmade, shards

ROWS: list[dict[str, Any]] = [
    {
        "prompt_token_ids": [104, 105],
        "completion_token_ids": [104, 105, 256],
        "sampling_logprobs": [-1, -2, -3],
        "loss_mask": [1, 0, 1],
    },
    {"prompt_token_ids": [7], "completion_token_ids": [9], "sampling_logprobs": [-1]},
]


@pytest.fixture
def base(tmp_path: Path, tiny_student: Path, tiny_teacher: Path) -> dict[str, Any]:
    """A run that takes ``elsewhere``; its models are real."""
    return {
        "cache": str(tmp_path / "cache"),
        "output": str(tmp_path / "run"),
        "student": {"model": str(tiny_student)},
        "teacher": {"model": str(tiny_teacher), "dtype": "float32"},
        "prompts": {"source": {"type": "jsonl", "path": str(tmp_path / "none.jsonl")}},
        "rollouts": {"from": str(tmp_path / "elsewhere")},
    }


def opened(config: dict[str, Any]) -> RunContext:
    return open_run(RunConfig.model_validate(config), Silent(), Worker())


def imported(tmp_path: Path, student: Path, rows: list[dict[str, Any]] = ROWS) -> RolloutRound:
    """An import in ``elsewhere``, and its shards in ``cache``."""
    file, out = tmp_path / "rows.jsonl", tmp_path / "elsewhere"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    import_rollouts(Cache(str(tmp_path / "cache")), file, student, out, Silent())
    return RunFolder(out).need(RolloutRound, 0)


def test_a_round_takes_the_shards_of_an_import_and_pins_them(
    base: dict[str, Any], tmp_path: Path, tiny_student: Path
) -> None:
    theirs = imported(tmp_path, tiny_student)
    context = opened(base)
    rollout(context, 0)
    ours = context.folder.need(RolloutRound, 0)
    assert [s.key for s in ours.shards] == [s.key for s in theirs.shards]
    assert all(shard.cached for shard in ours.shards)
    assert ours.student == theirs.student == context.resolved.student
    assert context.resolved.run_id in pinned(context.cache)["rollouts", ours.shards[0].key]
    assert context.folder.is_done(context.config, "rollout", 0, context.cache)
    rollout(context, 0)
    assert context.folder.need(RolloutRound, 0) == ours


def test_what_was_taken_is_scored_whole_and_without_ids_that_nobody_recorded(
    base: dict[str, Any], tmp_path: Path, tiny_student: Path, one_thread: None
) -> None:
    imported(tmp_path, tiny_student)
    context = opened(base)
    rollout(context, 0)
    (shard,) = score(context, 0).shards
    assert {c for served in shard.served for c in served.columns} == {"sampled", "entropy", "topk"}
    (listed,) = context.folder.need(RolloutRound, 0).shards
    scores = context.cache.open_score_set(listed.content, context.resolved.teacher, shard.served)
    assert scores.read().token_offsets.tolist() == [0, 3, 4]


@pytest.fixture
def unscored(
    base: dict[str, Any], tmp_path: Path, tiny_student: Path, one_thread: None
) -> RunContext:
    """A round that is only imitated: its score stage has made nothing."""
    bare = [{k: v for k, v in row.items() if k != "sampling_logprobs"} for row in ROWS]
    imported(tmp_path, tiny_student, bare)
    loss = {"support": "sampled", "direction": "forward", "normalisation": "none"}
    (tmp_path / "none.jsonl").write_text('{"prompt": "hi"}\n')
    config = base | {"score": {"columns": []}, "train": {"loss": loss}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    context = open_run(load_run(tmp_path / "run.yaml"), Silent(), Worker())
    rollout(context, 0)
    score(context, 0)
    return context


def test_what_is_only_imitated_is_not_scored(unscored: RunContext) -> None:
    (shard,) = unscored.folder.need(ScoreRound, 0).shards
    assert (shard.served, shard.cached) == ((), False)
    assert not list(unscored.cache.objects.list("commits/scores"))
    pinned_files = (unscored.folder.need(kind, 0) for kind in (RolloutRound, ScoreRound))
    samples = RoundSamples(unscored.cache, *pinned_files, 16)  # type: ignore[arg-type]
    micro = samples.collate([0, 1])
    assert micro.sampled_T.tolist() == [104, 256, 9]
    assert micro.teacher_sampled_T is micro.topk_ids_TK is None


@pytest.mark.parametrize(
    "words",
    [
        "audit RUN",
        "inspect RUN",
        "inspect RUN --row 0",
        "report RUN -o OUT",
        "compare RUN@0 RUN@0",
        "prompts RUN --out OUT",
        "cache export CACHE --out OUT --run FOLDER",
        "score RUN --round 0 --check 1",
    ],
)
def test_what_looks_at_scores_says_that_none_are_stored(
    unscored: RunContext, tmp_path: Path, words: str
) -> None:
    places = {
        "RUN": str(tmp_path / "run.yaml"),
        "OUT": str(tmp_path / "out"),
        "CACHE": str(tmp_path / "cache"),
        "FOLDER": str(tmp_path / "run"),
    }
    for name, place in places.items():
        words = words.replace(name, place)
    with pytest.raises(InputsMissing, match=r"no score of round 0 is stored: .* is empty"):
        CliRunner().invoke(cli, words.split(), standalone_mode=False, catch_exceptions=False)


def test_a_plan_and_the_status_count_no_scores_where_none_are_made(unscored: RunContext) -> None:
    told = plan(unscored.config, Rates())
    (scored,) = (stage for stage in told.stages if stage.stage == "score")
    assert (scored.num_units, scored.num_done, scored.left_tokens, scored.left_s) == (0, 0, 0, 0)
    assert (told.score_tokens, told.teacher, scored.size_bytes) == ({}, None, 0)
    (shown,) = (s for s in status(unscored.config).stages if s.stage == "score")
    assert (shown.state, shown.done, shown.cached, shown.num_tokens) == ("done", 1, 0, 0)


def test_later_rounds_are_the_other_runs_later_rounds(base: dict[str, Any], tmp_path: Path) -> None:
    context = opened(base | {"rounds": 3})
    folder, cache = RunFolder(tmp_path / "elsewhere"), context.cache
    made = []
    for index in range(2):
        identity = shards.rollout_identity(str(index)).model_copy(
            update={"vocabulary": context.resolved.vocabulary}
        )
        made.append(commit(cache, identity))
        folder.write(handmade.rounds([as_listed(made[-1], cached=False)], [[]], index)[0])
    for index in range(2):
        rollout(context, index)
        (shard,) = context.folder.need(RolloutRound, index).shards
        assert (shard.key, shard.cached) == (made[index].key, True)
    with pytest.raises(InputsMissing, match=r"of round 2.*elsewhere has those of 2 .* of 3 takes"):
        rollout(context, 2)


def commit(cache: Cache, identity: Any) -> Any:
    attempt = cache.attempt(shards.key_of(identity))
    manifest = shards.write_rollouts(attempt, identity)
    assert cache.commit(attempt, manifest)
    return manifest


def test_a_folder_that_is_not_there_is_named(base: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"rollouts\.from: .*elsewhere: no such folder"):
        rollout(opened(base), 0)


def test_a_shard_that_is_not_in_this_runs_cache_is_named_with_what_brings_it(
    base: dict[str, Any], tmp_path: Path, tiny_student: Path
) -> None:
    (shard,) = imported(tmp_path, tiny_student).shards
    context = opened(base | {"cache": str(tmp_path / "another")})
    with pytest.raises(ObjectMissing, match="opdcache cache copy") as caught:
        rollout(context, 0)
    assert rollout_commit(shard.key) in str(caught.value)


def test_rollouts_of_other_token_ids_are_refused(base: dict[str, Any], tmp_path: Path) -> None:
    context = opened(base)
    manifest = commit(context.cache, shards.rollout_identity())
    pinned_there = handmade.rounds([as_listed(manifest, cached=False)], [[]])[0]
    RunFolder(tmp_path / "elsewhere").write(pinned_there)
    with pytest.raises(TokenizerMismatch, match="not those of this run's student"):
        rollout(context, 0)


def test_held_out_prompts_are_still_sampled_by_this_runs_student(
    base: dict[str, Any], tmp_path: Path, tiny_student: Path
) -> None:
    imported(tmp_path, tiny_student)
    (tmp_path / "held-out.jsonl").write_text(json.dumps({"prompt": "hello"}) + "\n")
    source = {"type": "jsonl", "path": str(tmp_path / "held-out.jsonl")}
    context = opened(base | {"evaluation": {"source": source}})
    plan = plan_round(context, 0)
    assert list(plan.parts) == [HeldOutRound]
    assert plan.policy.fingerprint == context.resolved.student


def test_other_rollouts_are_refused_under_way(base: dict[str, Any], tmp_path: Path) -> None:
    opened(base)
    with pytest.raises(RunChanged, match=r"rollouts\.from changed"):
        opened(base | {"rollouts": {"from": str(tmp_path / "third")}})
    with pytest.raises(RunChanged, match="rollouts"):
        opened({name: part for name, part in base.items() if name != "rollouts"})
    opened(base)


def test_the_folder_is_relative_to_the_run_file_and_its_key_is_checked(tmp_path: Path) -> None:
    text = (
        "student: {model: ./s}\nteacher: {model: ./t}\n"
        "prompts: {source: {type: jsonl, path: p}}\nrollouts: {KEY: other/run}\n"
    )
    (tmp_path / "run.yaml").write_text(text.replace("KEY", "from"))
    rollouts = load_run(tmp_path / "run.yaml").rollouts
    assert rollouts is not None
    assert rollouts.from_ == str(tmp_path / "other" / "run")
    for wrong in ("form", "from_"):
        (tmp_path / "run.yaml").write_text(text.replace("KEY", wrong))
        with pytest.raises(ConfigError, match=f"'rollouts.{wrong}'.*did you mean 'from'"):
            load_run(tmp_path / "run.yaml")


def with_loss(base: dict[str, Any], support: str, **loss: Any) -> RunContext:
    changed = base | {"train": {"loss": {"support": support, **loss}}}
    changed["output"] = f"{base['output']}-{support}"
    return opened(changed)


SAMPLED = {"normalisation": "none"}


def test_ids_that_another_policy_recorded_are_refused_before_anything_is_scored(
    base: dict[str, Any], tmp_path: Path, tiny_teacher: Path
) -> None:
    imported(tmp_path, tiny_teacher)  # another policy than the run's student
    with pytest.raises(LossError, match=r"'student_topk' needs .*another policy's.*teacher_topk"):
        rollout(with_loss(base, "student_topk"), 0)
    for support in ("teacher_topk", "overlap"):
        rollout(with_loss(base, support), 0)


def test_recorded_ids_serve_the_round_whose_policy_recorded_them_alone(
    base: dict[str, Any],
) -> None:
    context = with_loss(base, "student_topk", k=2)
    manifest = shards.commit_rollouts(context.cache)
    files = [handmade.rounds([as_listed(manifest, cached=True)], [[]], r)[0] for r in (0, 1)]
    own = context.resolved.student
    refuse_unserved(context, files[0].model_copy(update={"student": own}))
    with pytest.raises(InputsMissing):
        refuse_unserved(context, files[1])
    trained = {"round": 0, "num_updates": 1, "num_samples": 1, "num_tokens": 1, "elapsed_s": 1.0}
    context.folder.write(TrainRound.model_validate(trained | {"student": "next", "dropped": {}}))
    refuse_unserved(context, files[1].model_copy(update={"student": "next"}))
    with pytest.raises(LossError, match="another policy"):
        refuse_unserved(context, files[1].model_copy(update={"student": own}))
    wide = with_loss(base | {"output": base["output"] + "-wide"}, "student_topk", k=3)
    with pytest.raises(LossError, match=r"k = 3 needs more than is recorded.*got 2 recorded"):
        refuse_unserved(wide, files[0].model_copy(update={"student": own}))


def test_the_sampled_token_needs_the_log_probs_that_it_was_sampled_with(
    base: dict[str, Any], tmp_path: Path, tiny_student: Path
) -> None:
    bare = [{k: v for k, v in row.items() if k != "sampling_logprobs"} for row in ROWS]
    imported(tmp_path, tiny_student, bare)
    with pytest.raises(LossError, match="'sampled' needs sampling_logprobs"):
        rollout(with_loss(base, "sampled", **SAMPLED), 0)
    rollout(with_loss(base, "teacher_topk"), 0)


def test_a_limit_on_the_sample_size_needs_the_log_probs_that_were_sampled_with(
    base: dict[str, Any], tmp_path: Path, tiny_student: Path
) -> None:
    imported(
        tmp_path,
        tiny_student,
        [{k: v for k, v in row.items() if k != "sampling_logprobs"} for row in ROWS],
    )
    limited = base | {"train": {"end_round": {"ess": 0.5}}}
    with pytest.raises(
        LossError, match=r"train.end_round.ess needs sampling_logprobs.*leave it out"
    ):
        rollout(opened(limited), 0)


def test_the_kl_to_a_reference_is_refused_on_another_policys_rollouts(
    base: dict[str, Any], tmp_path: Path, tiny_student: Path, tiny_teacher: Path
) -> None:
    imported(tmp_path, tiny_teacher)
    scored = base | {"references": {"base": {"model": str(tiny_student)}}}
    options = {"reference": "base", "reference_kl": 0.1}
    with pytest.raises(LossError, match="reference_kl needs tokens that the live student sampled"):
        rollout(with_loss(scored, "teacher_topk", **options), 0)
    rollout(with_loss(scored, "overlap"), 0)


def test_an_outcome_is_refused_on_another_policys_rollouts_without_a_cap_on_the_ratio(
    base: dict[str, Any], tmp_path: Path, tiny_teacher: Path
) -> None:
    imported(tmp_path, tiny_teacher, [row | {"answer": "4"} for row in ROWS])
    options = {"outcome": "operator:eq", "outcome_weight": 0.1}
    with pytest.raises(LossError, match=r"an outcome without .*set train.loss.importance_cap"):
        rollout(with_loss(base, "teacher_topk", **options), 0)
    rollout(with_loss(base, "overlap", **options, importance_cap=2.0), 0)


@pytest.mark.parametrize(
    "options", [{"sft_weight": 0.1}, {"outcome": "operator:eq", "outcome_weight": 0.1}]
)
def test_a_loss_that_looks_at_answers_is_refused_on_rollouts_without_any(
    base: dict[str, Any], tmp_path: Path, tiny_student: Path, options: dict[str, Any]
) -> None:
    imported(tmp_path, tiny_student)
    with pytest.raises(ConfigError, match=r"has (no|a) reference answer"):
        rollout(with_loss(base, "teacher_topk", **options), 0)


def test_a_cap_on_the_ratio_needs_the_log_probs_that_were_sampled_with(
    base: dict[str, Any], tmp_path: Path, tiny_student: Path
) -> None:
    bare = [{k: v for k, v in row.items() if k != "sampling_logprobs"} for row in ROWS]
    imported(tmp_path, tiny_student, bare)
    options = {"outcome": "operator:eq", "outcome_weight": 0.1, "importance_cap": 2.0}
    with pytest.raises(LossError, match=r"importance_cap needs sampling_logprobs.*leave it out"):
        rollout(with_loss(base, "teacher_topk", **options), 0)


def test_the_sampled_token_is_served_where_the_log_probs_are(
    base: dict[str, Any], tmp_path: Path, tiny_student: Path
) -> None:
    imported(tmp_path, tiny_student)
    rollout(with_loss(base, "sampled", **SAMPLED), 0)


def test_what_is_dropped_must_be_a_known_fault(base: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="truncated"):
        RunConfig.model_validate(base | {"train": {"drop": ["long"]}})


def test_without_sampling_log_probs_there_is_no_effective_sample_size_and_no_other_loss(
    base: dict[str, Any], tmp_path: Path, tiny_student: Path, one_thread: None
) -> None:
    from opdcache.heads import support_view
    from opdcache.train.live import ids_to_gather, live, means, metric_values, within_support

    def averaged(rows: list[dict[str, Any]], name: str) -> dict[str, float]:
        (tmp_path / name).mkdir()
        imported(tmp_path / name, tiny_student, rows)
        places = {"cache": str(tmp_path / name / "cache"), "output": str(tmp_path / name / "run")}
        theirs = {"rollouts": {"from": str(tmp_path / name / "elsewhere")}}
        context = opened(base | places | theirs)
        rollout(context, 0)
        score(context, 0)
        pinned_files = (context.folder.need(kind, 0) for kind in (RolloutRound, ScoreRound))
        samples = RoundSamples(context.cache, *pinned_files, 16)  # type: ignore[arg-type]
        micro = samples.collate([0, 1])
        loss = context.config.train.loss
        hidden = torch.arange(3 * 8).reshape(3, 8) / 10
        head = torch.arange(258 * 8).reshape(258, 8).remainder(7) / 5
        ids, within = ids_to_gather(loss, micro), within_support(loss, micro)
        view = support_view(hidden, head, ids, within_TK=within, topk=16, chunk_tokens=8)
        values = metric_values(micro, live(loss, micro, view))
        sums = {key: float(value.sum()) for key, value in values.items()}
        return means(sums | {"loss": 3, "num_tokens": 3})

    whole = averaged(ROWS, "whole")
    bare = [{k: v for k, v in row.items() if k != "sampling_logprobs"} for row in ROWS]
    without = averaged(bare, "bare")
    assert 0 < whole.pop("ess") <= 1
    assert without == whole


def test_a_reference_that_is_the_policy_that_sampled_is_refused_where_another_one_did(
    base: dict[str, Any], tmp_path: Path, tiny_student: Path, tiny_teacher: Path, one_thread: None
) -> None:
    imported(tmp_path, tiny_student)
    policy = {"references": {"policy": {"model": "@student", "dtype": "float32"}}}
    same = opened(base | policy)
    rollout(same, 0)
    (shard,) = score(same, 0).references["policy"]
    assert shard.teacher == same.resolved.student

    other = {"student": {"model": str(tiny_teacher)}, "output": str(tmp_path / "other")}
    context = opened(base | policy | other)
    rollout(context, 0)
    with pytest.raises(
        ConfigError, match=r"references\.policy: @student is the policy that sampled"
    ):
        score(context, 0)


def test_a_student_is_scored_on_its_own_completions_alone(
    base: dict[str, Any], tmp_path: Path, tiny_student: Path, tiny_teacher: Path, one_thread: None
) -> None:
    imported(tmp_path, tiny_student)
    same = opened(base)
    rollout(same, 0)
    run_student(same, 0)
    (shard,) = same.folder.need(RolloutRound, 0).shards
    (made,) = same.cache.score_sets(shard.content, same.resolved.student)
    assert set(made.identity.columns) == {"entropy", "sampled", "topk"}
    assert made.key in same.cache.pins(same.resolved.run_id)["scores"]

    other = {"student": {"model": str(tiny_teacher)}, "output": str(tmp_path / "other")}
    context = opened(base | other)
    rollout(context, 0)
    with pytest.raises(ConfigError, match="--student: what scores is the policy that sampled"):
        run_student(context, 0)
