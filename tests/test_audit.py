"""The audit: numbers of whole rounds, and planted faults, each found by its name."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from opdcache.audit.checks import Alignment, Shift
from opdcache.audit.run import _unlike_others, audit
from opdcache.audit.targets import of_keys, of_run, target
from opdcache.cli.main import cli
from opdcache.errors import InputsMissing, UsageError
from opdcache.schemas.audit import Audit, AuditLimits
from opdcache.schemas.comparison import Estimate
from opdcache.store import rollouts as tables
from opdcache.store.cache import data_prefix
from opdcache.store.scores import Scores, StudentTopK, TopK

from . import shards
from .audited import Made, add_round, make_run
from .dense import Distributions, block_of, distributions, entropy, rows_of, scores_of
from .test_measures import by_hand

LENGTHS = (9, 30, 1, 17)
LIMITS = AuditLimits()


def names(found: Audit, level: str = "no-go") -> set[str]:
    return {finding.check for finding in found.findings if finding.level == level}


def cli_audit(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["audit", *map(str, arguments)])


@pytest.fixture
def run(tmp_path: Path) -> Made:
    return make_run(tmp_path)


def five_shards(made: Made, spoilt: Scores | None = None) -> list[Distributions]:
    """A round of five shards, the third of them scored as said."""
    given = [distributions(*LENGTHS, seed=i, apart=0.5) for i in range(5)]
    scores = [scores_of(one.q, one, 16, 16) for one in given]
    if spoilt is not None:
        scores[2] = spoilt
    add_round(made, 0, given, scores)
    return given


def test_a_round_s_numbers_are_those_of_its_distributions(run: Made) -> None:
    given = [distributions(9, 30), distributions(1, 17, seed=1, apart=3)]
    add_round(run, 0, given)
    (part,) = audit(of_run(run.path)).parts
    found = part.diagnostics
    told = [by_hand(one, 16) for one in given]
    p, q = (np.concatenate([getattr(one, side) for one in given]) for side in "pq")
    exact = np.concatenate([one.at(one.q) - one.at(one.p) for one in given])

    def mean(name: str) -> float:
        return float(np.nanmean(np.concatenate([one[name] for one in told])))

    assert found.num_tokens == 57
    assert found.overlap == pytest.approx(mean("overlap"))
    assert found.overlap_mass_student == pytest.approx(mean("p"), abs=1e-3)
    assert found.overlap_mass_teacher == pytest.approx(mean("q"), abs=1e-3)
    assert found.overlap_advantage == pytest.approx(mean("advantage"), abs=1e-4)
    assert found.advantage == pytest.approx(exact.mean(), abs=1e-3)
    assert found.teacher_entropy == pytest.approx(entropy(q).mean(), abs=1e-3)
    assert found.student_entropy is None
    assert found.student_entropy_low is not None
    assert found.student_entropy_high is not None
    assert found.student_entropy_low <= entropy(p).mean() <= found.student_entropy_high
    assert part.reward.mean == pytest.approx(
        np.mean([
            part.mean()
            for one in given
            for part in np.split(one.at(one.q) - one.at(one.p), one.offsets[1:-1])
        ]),
        abs=1e-3,
    )  # fmt: skip


def test_the_policy_s_own_scores_give_its_entropy(run: Made) -> None:
    one = distributions(*LENGTHS)
    ((rollout, _),) = add_round(run, 0, [one])
    own = scores_of(one.p, one, 16)
    shards.commit_scores(
        run.cache, rollout, *sorted(own.columns), scores=own, teacher=rollout.identity.student, k=16
    )
    made = run.folder.scored(0)[0].model_copy(update={"student": rollout.identity.student})
    run.folder.write(made, anew=True)
    (part,) = audit(of_run(run.path)).parts
    gap = np.abs(entropy(one.q) - entropy(one.p))
    assert part.num_own == 1
    assert part.diagnostics.student_entropy == pytest.approx(entropy(one.p).mean(), abs=1e-3)
    assert part.diagnostics.entropy_gap == pytest.approx(gap.mean(), abs=1e-3)
    (by_key,) = audit(of_keys(run.cache, [rollout.key])).parts
    assert by_key.diagnostics == part.diagnostics


def test_positions_are_told_apart_and_sum_up_to_the_whole(run: Made) -> None:
    one = distributions(5, 12)
    add_round(run, 0, [one])
    (part,) = audit(of_run(run.path), chunk_tokens=4).parts
    at = np.concatenate([np.arange(5), np.arange(12)]) // 4
    assert [chunk.first for chunk in part.by_position] == [0, 4, 8]
    assert [chunk.num_tokens for chunk in part.by_position] == np.bincount(at).tolist()
    exact = entropy(one.q)
    assert [chunk.teacher_entropy for chunk in part.by_position] == pytest.approx(
        [exact[at == i].mean() for i in range(3)], abs=1e-3
    )


def test_masses_by_k_are_those_of_the_likeliest_entries(run: Made) -> None:
    one = distributions(25)
    add_round(run, 0, [one])
    (part,) = audit(of_run(run.path)).parts
    assert [at.k for at in part.by_k] == [1, 2, 4, 8, 16]
    for at in part.by_k:
        for said, side in ((at.teacher_mass, one.q), (at.student_mass, one.p)):
            held = np.exp(-np.sort(-side, axis=1)[:, : at.k]).sum(axis=1).mean()
            assert said == pytest.approx(held, abs=1e-3)
        assert at.overlap == pytest.approx(np.mean(by_hand(one, at.k)["overlap"]))


def test_blocks_of_a_few_rows_give_the_numbers_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "small").mkdir()
    run = make_run(tmp_path / "small")
    monkeypatch.setattr(tables, "GROUP_TOKENS", 20)
    monkeypatch.setattr("opdcache.store.files.BLOCK_BYTES", 256)
    given = five_shards(run)
    opened = of_run(run.path)
    small = audit(opened)
    groups = opened.cache.open_rollouts(
        opened.cache.need_rollouts(opened.parts[0].shards[0].scored.rollouts), whole=False
    )
    assert len(groups.starts) > 2
    monkeypatch.undo()
    whole = make_run(tmp_path)
    add_round(whole, 0, given)
    again = audit(of_run(whole.path))
    for name, value in again.parts[0].diagnostics.model_dump().items():
        assert getattr(small.parts[0].diagnostics, name) == pytest.approx(value, abs=1e-9), name
    assert small.parts[0].by_k == again.parts[0].by_k
    assert small.parts[0].completions == again.parts[0].completions


def test_tokens_that_are_not_supervised_are_in_no_number(run: Made) -> None:
    one = distributions(8, 8)
    masks = (np.arange(8) < 3, np.ones(8, np.bool_))
    add_round(run, 0, [one], tables=[rows_of(one, 16, masks=masks)])
    (part,) = audit(of_run(run.path)).parts
    kept = np.concatenate(masks)
    assert part.diagnostics.num_tokens == 11
    assert part.diagnostics.teacher_entropy == pytest.approx(entropy(one.q)[kept].mean(), abs=1e-3)
    assert part.by_k[0].teacher_mass == pytest.approx(
        np.exp(one.q.max(axis=1))[kept].mean(), abs=1e-3
    )
    assert part.completions.num_tokens == 16


def test_a_copy_in_another_shard_of_the_round_is_a_copy(run: Made) -> None:
    one = distributions(6, 4)
    other = replace(one, p=one.p[:6], q=one.q[:6], ids=one.ids[:6], lengths=(6,))
    add_round(run, 0, [one, other])
    assert audit(of_run(run.path)).parts[0].completions.duplicates == 1


def test_completions_are_counted_as_texts(run: Made) -> None:
    one = distributions(6, 6, 6, 4)
    ids = one.ids.copy()
    ids[6:12] = ids[:6]
    same = replace(one, ids=ids)
    table = rows_of(same, 16, texts=("a", "b", "a line of some length\n" * 6, "c"))
    prompts = table.column("prompt_token_ids").to_pylist()
    prompts[1] = prompts[0]
    place = table.column_names.index("prompt_token_ids")
    field = table.schema.field(place)
    table = table.set_column(place, field, [tables.pa.array(prompts, field.type)])
    add_round(run, 0, [same], [scores_of(one.q, same, 16, 16)], [table])
    texts = audit(of_run(run.path)).parts[0].completions
    assert (texts.num, texts.num_tokens, texts.num_prompts) == (4, 22, 3)
    assert (texts.truncated, texts.repetitive, texts.duplicates) == (2, 1, 1)
    assert (texts.median_tokens, texts.longest_tokens) == (6, 6)


def test_the_reward_is_held_against_labels_where_there_are_some(run: Made) -> None:
    one = distributions(*LENGTHS)
    add_round(run, 0, [one])
    scores = np.array([1.0, 0.0, np.nan, 1.0])
    (part,) = audit(of_run(run.path), judge=lambda table: scores).parts
    rewards = [r.mean() for r in np.split(one.at(one.q) - one.at(one.p), one.offsets[1:-1])]
    above = [rewards[i] > rewards[1] for i in (0, 3)]
    assert (part.reward.num_labelled, part.reward.num_correct) == (3, 2)
    assert part.reward.auroc == np.mean(above)


@pytest.fixture
def sums(tmp_path: Path) -> Made:
    """A round of three completions with answers, two of them right, and one without."""
    made = make_run(
        tmp_path,
        evaluation={"verifier": "math", "source": {"type": "jsonl", "path": "held-out.jsonl"}},
    )
    texts = ("it is $4$", "$\\boxed{5}$", "$3$", "four")
    table = rows_of(distributions(*LENGTHS), 16, texts=texts, answers=("4", "5", "4", None))
    add_round(made, 0, [distributions(*LENGTHS)], tables=[table])
    return made


def test_labels_are_what_the_evaluation_s_verifier_says_of_rows_with_an_answer(sums: Made) -> None:
    found = Audit.model_validate_json(cli_audit(sums.path, "--json").stdout)
    reward = found.parts[0].reward
    assert (reward.num_labelled, reward.num_correct) == (3, 2)
    assert reward.auroc is not None


def test_a_verifier_may_be_named_for_keys_too(sums: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    (shard,) = of_run(sums.path).parts[0].shards
    folder = sums.path.parent
    (folder / "strict_labels.py").write_text("def same(text, answer):\n    return text == answer\n")
    monkeypatch.syspath_prepend(str(folder))
    key = shard.scored.rollouts.key
    done = cli_audit("--cache", folder / "cache", key, "--verifier", "strict_labels:same", "--json")
    reward = Audit.model_validate_json(done.stdout).parts[0].reward
    assert (reward.num_labelled, reward.num_correct, reward.auroc) == (3, 0, None)


def test_a_verifier_that_cannot_know_the_prompts_is_refused_when_it_is_named(sums: Made) -> None:
    done = cli_audit(sums.path, "--verifier", "reasoning_gym")
    assert isinstance(done.exception, UsageError)
    assert "--verifier reasoning_gym" in str(done.exception)


def test_a_sound_run_is_a_go_and_exits_0(run: Made) -> None:
    five_shards(run)
    found = audit(of_run(run.path))
    assert found.is_go
    assert names(found) == set()
    done = cli_audit(run.path)
    assert done.exit_code == 0
    assert "verdict: go" in done.stdout


def shifted(scores: Scores, *, sampled: int, entries: int) -> Scores:
    """What was stored, some places on."""

    def moved(values: Any, by: int) -> Any:
        return np.roll(values, -by, axis=0)

    assert scores.topk is not None
    assert scores.sampled_logprobs is not None
    assert scores.entropy is not None
    topk = TopK(*(moved(getattr(scores.topk, name), entries) for name in TopK.__slots__))
    return replace(
        scores,
        sampled_logprobs=moved(scores.sampled_logprobs, sampled),
        entropy=moved(scores.entropy, sampled),
        topk=topk,
    )


@pytest.mark.parametrize(
    ("sampled", "entries", "said"),
    [
        (1, 1, "all of them are shifted by +1 token"),
        (-1, -1, "all of them are shifted by -1 token"),
        (0, 1, "the top-k entries are shifted by +1 token"),
        (1, 0, "the sampled are shifted by +1 token"),
    ],
)
def test_a_shift_by_one_token_is_found_by_name(
    run: Made, sampled: int, entries: int, said: str
) -> None:
    one = distributions(*LENGTHS, seed=2, apart=0.5)
    spoilt = shifted(scores_of(one.q, one, 16, 16), sampled=sampled, entries=entries)
    five_shards(run, spoilt)
    found = audit(of_run(run.path))
    finding, *_ = (f for f in found.findings if f.check == "alignment")
    assert finding.reason.startswith("the scores' sampled log-probs")
    assert said in finding.reason
    spoilt_shard = of_run(run.path).parts[0].shards[2].name
    assert spoilt_shard in finding.where
    done = cli_audit(run.path)
    assert done.exit_code == 3
    assert f"no-go: alignment [round 0, shard {spoilt_shard}]" in done.stdout


def test_scores_of_a_teacher_that_is_not_the_run_s_are_found_by_name(run: Made) -> None:
    add_round(run, 0, [distributions(*LENGTHS)], teacher="5" * 64)
    assert names(audit(of_run(run.path))) == {"wrong teacher"}


def test_a_shard_that_another_model_scored_is_found_by_name(run: Made) -> None:
    given = [distributions(*LENGTHS, seed=i, apart=0.5) for i in range(5)]
    other = replace(given[2], q=distributions(*LENGTHS, seed=9).q)
    scores = [scores_of(one.q, one, 16, 16) for one in [*given[:2], other, *given[3:]]]
    add_round(run, 0, given, scores)
    (finding,) = (f for f in audit(of_run(run.path)).findings if f.level == "no-go")
    assert finding.check == "wrong teacher"
    assert of_run(run.path).parts[0].shards[2].name in finding.where


def test_a_teacher_that_knows_less_than_a_blind_guess_is_found_by_name(run: Made) -> None:
    one = distributions(30, num_ids=60)
    rare = one.q.copy()
    rare[np.arange(30), one.ids] = -20  # below one of 2**20 ids
    add_round(run, 0, [one], [scores_of(rare, one, 16, 16)])
    assert "wrong teacher" in names(audit(of_run(run.path)))


def test_zeros_in_the_place_of_missing_scores_are_found_by_name(run: Made) -> None:
    one = distributions(*LENGTHS, seed=2, apart=0.5)
    spoilt = scores_of(one.q, one, 16, 16)
    assert spoilt.sampled_logprobs is not None
    spoilt.sampled_logprobs[20:30] = 0
    five_shards(run, spoilt)
    assert "missing scores" in names(audit(of_run(run.path)))


def test_zeros_are_doubted_by_the_entropy_where_no_entries_are_stored(run: Made) -> None:
    one = distributions(*LENGTHS)
    spoilt = replace(scores_of(one.q, one, 16), topk=None)
    assert spoilt.sampled_logprobs is not None
    spoilt.sampled_logprobs[20:30] = 0
    add_round(run, 0, [one], [spoilt])
    assert "missing scores" in names(audit(of_run(run.path)))


@pytest.mark.parametrize("column", ["topk", "student_topk"])
def test_entries_and_a_tail_that_do_not_sum_to_1_are_found_by_name(run: Made, column: str) -> None:
    one = distributions(*LENGTHS)
    spoilt = scores_of(one.q, one, 16, 16)
    getattr(spoilt, column).tail_logprobs[40:] = -0.5
    add_round(run, 0, [one], [spoilt])
    assert names(audit(of_run(run.path))) == {"mass"}


def test_tokens_of_other_completions_tell_nothing_of_a_shift() -> None:
    given, found = distributions(*([1] * 40)), Alignment()
    block = block_of(given)
    found.add(block, block.teacher, block.scores.sampled_logprobs, block.step)
    assert found.share(Shift(0, 0)) == 1
    assert found.share(Shift(1, 1)) == found.share(Shift(-1, -1)) == 0
    assert found.best() == Shift(0, 0)


def test_rows_of_zeros_in_every_column_are_found_by_name(run: Made) -> None:
    one = distributions(*LENGTHS, seed=2, apart=0.5)
    spoilt = scores_of(one.q, one, 16, 16)
    assert spoilt.topk is not None
    assert spoilt.student_topk is not None
    for values in (
        spoilt.sampled_logprobs,
        spoilt.entropy,
        *(getattr(spoilt.topk, name) for name in ("ids", "logprobs", "tail_logprobs")),
        *(getattr(spoilt.student_topk, name) for name in StudentTopK.__slots__),
    ):
        assert values is not None
        values[40:] = 0
    five_shards(run, spoilt)
    assert {"missing scores", "mass"} <= names(audit(of_run(run.path)))


def test_a_certain_teacher_s_zeros_are_no_fault(run: Made) -> None:
    one = distributions(40)
    sure = np.full_like(one.q, -25.0)
    sure[np.arange(40), one.ids] = np.log1p(-59 * np.exp(-25.0))
    add_round(run, 0, [one], [scores_of(sure, one, 16, 16)])
    scores = audit(of_run(run.path))
    assert {"missing scores", "mass"} & names(scores) == set()


def test_scores_of_other_lengths_are_found_by_name_and_the_rest_is_read(run: Made) -> None:
    one = distributions(*LENGTHS, seed=2, apart=0.5)
    short = scores_of(one.q, one, 16, 16).rows(0, 3)
    five_shards(run, short)
    found = audit(of_run(run.path))
    assert names(found) == {"unreadable shard"}
    assert found.parts[0].num_unreadable == 1
    assert found.total.num_tokens == 4 * sum(LENGTHS)


def test_scores_of_other_completions_with_as_many_tokens_are_found_by_name(run: Made) -> None:
    one = distributions(*LENGTHS, seed=2, apart=0.5)
    moved = replace(scores_of(one.q, one, 16, 16), token_offsets=np.array([0, 10, 39, 40, 57]))
    five_shards(run, moved)
    found = audit(of_run(run.path))
    assert names(found) == {"unreadable shard"}
    assert "their lengths differ" in found.findings[0].reason


def test_shards_that_all_differ_are_not_unlike_each_other() -> None:
    def estimates(error: float, *means: float) -> dict[str, Estimate]:
        return {
            f"shard {i}": Estimate(mean=mean, standard_error=error) for i, mean in enumerate(means)
        }

    alike = estimates(0.1, -1.0, -1.1, -1.2, -1.3, -1.4, -1.5)
    apart = estimates(0.1, -1.0, -2.5, -4.0, -5.5, -7.0, -8.5)
    far = alike | {"shard 3": Estimate(mean=-5.0, standard_error=0.1)}
    small = alike | {"shard 3": Estimate(mean=-5.0, standard_error=0.8)}
    named = [
        [f.where for f in _unlike_others({("task", "teacher"): by_shard}, LIMITS, "round 0")]
        for by_shard in (alike, apart, far, small)
    ]
    assert named == [[], [], ["shard 3"], []]


def test_counts_of_a_manifest_are_taken_once_however_many_blocks_a_shard_has(
    run: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "GROUP_TOKENS", 20)
    monkeypatch.setattr("opdcache.store.files.BLOCK_BYTES", 256)
    counts = {"truncated": 3, "repetitive": 1}
    monkeypatch.setattr("opdcache.audit.run._counted", lambda cache, shard: counts)
    five_shards(run)
    texts = audit(of_run(run.path)).parts[0].completions
    assert (texts.truncated, texts.repetitive) == (15, 5)


def test_a_truncated_object_is_found_by_name_and_the_rest_is_read(run: Made) -> None:
    given = [distributions(*LENGTHS, seed=i) for i in range(2)]
    _, (rollout, scored) = add_round(run, 0, given)
    for of in (rollout, scored):
        prefix = data_prefix(of.key, of.attempt)
        largest = max(of.objects, key=lambda entry: entry.size_bytes)
        path = run.path.parent / "cache" / prefix / largest.path
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        found = audit(of_run(run.path))
        (finding,) = (f for f in found.findings if f.level == "no-go")
        assert finding.check == "unreadable shard"
        assert largest.path in finding.reason
        assert found.total.num_tokens == sum(LENGTHS)
        assert cli_audit(run.path).exit_code == 3
        path.write_bytes(whole)
    assert audit(of_run(run.path)).is_go


def test_a_teacher_that_cannot_end_completions_is_a_no_go(run: Made) -> None:
    one = distributions(*([3] * 20))
    ids = one.ids.copy()
    ids[2::3] = 59
    q = one.q.copy()
    q[:, 59] = -30
    ends = replace(one, ids=ids, q=q)
    add_round(run, 0, [ends], [scores_of(q, ends, 16, 16)])
    asked = replace(of_run(run.path), special={59: "<|end|>"})
    found = audit(asked)
    (token,) = found.parts[0].special
    assert (token.token, token.num, token.num_outliers) == ("<|end|>", 20, 20)
    assert "special tokens" in names(found)


def test_the_verdict_follows_the_limits(run: Made) -> None:
    given = [distributions(*LENGTHS, seed=i, apart=3) for i in range(2)]
    add_round(run, 0, given[:1])
    add_round(run, 1, given[1:])
    found = audit(of_run(run.path), limits=AuditLimits(min_overlap=1, max_entropy_gap=0))
    assert names(found) == {"overlap"}
    assert {"entropy gap", "overlap mass"} <= names(found, "warning")
    assert [f.level for f in found.findings] == sorted(f.level for f in found.findings)
    rises = audit(of_run(run.path), limits=AuditLimits(min_overlap_rise=1))
    assert "overlap over rounds" in names(rises, "warning")


def test_limits_are_the_run_file_s_and_then_the_command_line_s(tmp_path: Path) -> None:
    made = make_run(tmp_path, audit={"min_overlap": 1.0})
    add_round(made, 0, [distributions(*LENGTHS)])
    assert cli_audit(made.path).exit_code == 3
    assert cli_audit(made.path, "--limit", "min_overlap=0").exit_code == 0
    wrong = cli_audit(made.path, "--limit", "min_overlp=0")
    assert wrong.exit_code == 2
    assert "min_overlp" in wrong.output
    assert "min_overlap_mass" in wrong.output


def test_json_is_the_whole_audit(run: Made) -> None:
    five_shards(run)
    done = cli_audit(run.path, "--json")
    found = Audit.model_validate(json.loads(done.stdout))
    assert found.parts == audit(of_run(run.path)).parts


def test_keys_are_looked_up_in_a_cache(run: Made) -> None:
    ((rollout, scored),) = add_round(run, 0, [distributions(*LENGTHS)])
    by_run = audit(of_run(run.path)).parts[0]
    for key in (rollout.key[:10], scored.key):
        (part,) = audit(of_keys(run.cache, [key])).parts
        assert part.diagnostics == by_run.diagnostics
        assert part.round is None
    done = cli_audit("--cache", run.path.parent / "cache", scored.key[:8])
    assert done.exit_code == 0
    assert scored.key[:8] in done.stdout


def test_what_cannot_be_looked_at_is_one_clear_line(run: Made, tmp_path: Path) -> None:
    with pytest.raises(InputsMissing, match="no scored round yet"):
        of_run(run.path)
    ((rollout, _),) = add_round(run, 0, [distributions(3)])
    with pytest.raises(InputsMissing, match="round 2 has no finished rollout"):
        of_run(run.path, [2])
    with pytest.raises(UsageError, match="0 shards have a key"):
        of_keys(run.cache, ["zz"])
    with pytest.raises(UsageError, match="--cache"):
        target([rollout.key], cache=None, rounds=[])
    with pytest.raises(UsageError, match="no scores of a reference 'base'"):
        of_run(run.path, [0], "base")


def test_an_audit_needs_no_engine(run: Made) -> None:
    five_shards(run)
    script = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'vllm', 'deepspeed', 'transformers'):\n"
        "            raise AssertionError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "from opdcache.cli.main import main\n"
        f"sys.argv = ['opdcache', 'audit', {str(run.path)!r}]\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
