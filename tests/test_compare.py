"""Two sets of scores against each other: dense distributions are the oracle of what is stored."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from opdcache import documents
from opdcache.agreement import Matched
from opdcache.audit import likeness
from opdcache.audit.clustered import ClusteredSums
from opdcache.audit.compare import compare
from opdcache.audit.operands import operand
from opdcache.audit.targets import of_keys
from opdcache.cli.main import cli
from opdcache.errors import InputsMissing, UsageError
from opdcache.runfile import load_run
from opdcache.runfolder import RunFolder
from opdcache.schemas.comparison import (
    Agreement,
    CompareLimits,
    Comparison,
    Estimate,
    SharedRollouts,
)
from opdcache.schemas.manifests import ScoreManifest
from opdcache.schemas.rounds import (
    Resolved,
    RolloutRound,
    RolloutShard,
    ScoredShard,
    ScoreRound,
    ServedColumns,
)
from opdcache.store.cache import Cache
from opdcache.store.scores import Scores, TopK

from . import shards
from .handmade import Row, commit_rollouts

Dense = NDArray[np.float64]
NUM_IDS = 12
ONE, OTHER = "1" * 64, "2" * 64
FINE = 1 / 4096
LENGTHS = (5, 0, 3, 9, 1)


def dense(seed: int, num_tokens: int = sum(LENGTHS)) -> Dense:
    """Log-probs [T, V] far from uniform."""
    logits = np.random.default_rng(seed).normal(0, 2, (num_tokens, NUM_IDS))
    return normalised(logits)


def normalised(logits: Dense) -> Dense:
    total: Dense = np.logaddexp.reduce(logits, axis=1)
    return logits - total[:, None]


def kept(logprobs: Dense, num_kept: Sequence[int]) -> TopK:
    """The likeliest entries of each token and what they leave."""
    width = max(num_kept)
    order = np.argsort(-logprobs, axis=1)
    ranked = np.take_along_axis(logprobs, order, axis=1)
    tails = [np.log(np.exp(row[num:]).sum()) for row, num in zip(ranked, num_kept, strict=True)]
    return TopK(
        ids=order[:, :width].astype(np.int32),
        logprobs=ranked[:, :width].astype(np.float32),
        num_kept=np.asarray(num_kept, np.uint16),
        tail_logprobs=np.asarray(tails, np.float32),
    )


def row(seed: int, num_tokens: int, mask: NDArray[np.bool_] | None = None) -> Row:
    rng = np.random.default_rng(seed)
    return Row(
        prompt=[seed, 1],
        completion=rng.integers(NUM_IDS, size=num_tokens).tolist(),
        sampling_T=rng.uniform(-3, 0, num_tokens).astype(np.float32),
        recorded_ids_TS=np.tile(np.arange(2, dtype=np.int32), (num_tokens, 1)),
        loss_mask=mask,
    )


def rows(seed: int = 0, masked: bool = False) -> list[Row]:
    """Completions; of masked ones every third token is context."""
    masks = [np.arange(num) % 3 != 1 if masked else None for num in LENGTHS]
    return [row(10 * seed + i, n, masks[i]) for i, n in enumerate(LENGTHS)]


def scored(logprobs: Dense, completions: Sequence[Row], k: int = 6) -> Scores:
    """What a scorer stores of dense distributions."""
    sampled = [token for row in completions for token in row.completion]
    lengths = [len(row.completion) for row in completions]
    return Scores(
        token_offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        sampled_logprobs=logprobs[np.arange(len(sampled)), sampled].astype(np.float32),
        entropy=-(np.exp(logprobs) * logprobs).sum(axis=1).astype(np.float32),
        topk=kept(logprobs, [k] * len(logprobs)),
    )


def commit(
    cache: Cache, shard: RolloutShard, scores: Scores, teacher: str, **how: object
) -> ScoreManifest:
    return shards.commit_scores(
        cache,
        cache.need_rollouts(shard),
        *sorted(scores.columns),
        scores=scores,
        teacher=teacher,
        **({"k": 6, "step": FINE} | how),  # type: ignore[arg-type]
    )


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(str(tmp_path / "cache"))


def by_key(
    cache: Cache, a: ScoreManifest, b: ScoreManifest, k: int = 16, chunk_tokens: int = 1024
) -> Comparison:
    targets = (of_keys(cache, [manifest.key]) for manifest in (a, b))
    return compare(*targets, k=k, chunk_tokens=chunk_tokens)


def two_teachers(cache: Cache, k: int = 6, other_k: int = 6) -> tuple[Dense, Dense, Comparison]:
    """Two dense distributions, and what is said of them when they went through the store."""
    one, other, completions = dense(1), dense(2), rows(masked=True)
    shard = commit_rollouts(cache, completions)
    a = commit(cache, shard, scored(one, completions, k), ONE, k=k)
    b = commit(cache, shard, scored(other, completions, other_k), OTHER, k=other_k)
    return one, other, by_key(cache, a, b, k=4)


def supervised() -> NDArray[np.bool_]:
    return np.concatenate([row.loss_mask for row in rows(masked=True) if row.loss_mask is not None])


def kl(p: Sequence[float], q: Sequence[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def coarse(p: Dense, q: Dense, num: int, other_num: int) -> tuple[list[float], list[float]]:
    """Two distributions of one token, what is not among the likeliest of both put together."""
    both = set(np.argsort(-p)[:num].tolist()) & set(np.argsort(-q)[:other_num].tolist())
    alone = [id for id in range(len(p)) if id not in both]
    sides = []
    for logs in (p, q):
        sides.append([math.exp(logs[id]) for id in sorted(both)])
        sides[-1].append(sum(math.exp(logs[id]) for id in alone))
    return sides[0], sides[1]


@settings(deadline=None)  # a busy machine is no failure
@given(
    st.integers(0, 10**6),
    st.lists(st.tuples(st.integers(1, NUM_IDS), st.integers(1, NUM_IDS)), min_size=1, max_size=6),
)
def test_local_kl_is_that_of_what_both_keep_and_the_rest_and_at_most_the_full_one(
    seed: int, sizes: list[tuple[int, int]]
) -> None:
    one = dense(seed, len(sizes))
    other = normalised(one + np.random.default_rng(seed + 1).normal(0, 1, one.shape))
    with np.errstate(divide="ignore"):  # all ids kept leave nothing
        matched = Matched.of(kept(one, [a for a, _ in sizes]), kept(other, [b for _, b in sizes]))

    local = matched.local()

    for t, (num, other_num) in enumerate(sizes):
        p, q = coarse(one[t], other[t], num, other_num)
        assert local.kl[t] == pytest.approx(kl(p, q), abs=1e-5)
        assert local.kl_back[t] == pytest.approx(kl(q, p), abs=1e-5)
        assert matched.same_first_T[t] == (one[t].argmax() == other[t].argmax())
        full = np.exp(one[t]), np.exp(other[t])
        assert local.kl[t] <= kl(*(side.tolist() for side in full)) + 1e-5
        assert local.kl_back[t] <= kl(*(side.tolist() for side in full[::-1])) + 1e-5


def test_local_kl_is_the_full_one_when_all_is_kept() -> None:
    one, other = dense(3, 4), dense(4, 4)
    with np.errstate(divide="ignore"):
        matched = Matched.of(kept(one, [NUM_IDS] * 4), kept(other, [NUM_IDS] * 4))
    full = (np.exp(one) * (one - other)).sum(axis=1)
    assert matched.local().kl == pytest.approx(full, abs=1e-5)


def test_padding_is_no_entry() -> None:
    one, other = kept(dense(5, 2), [3, 1]), kept(dense(5, 2), [1, 3])
    same = Matched.of(one, other)
    assert same.both_TS.tolist() == [[True, False, False]] * 2
    assert same.kept_by_both_T.tolist() == [1, 1]


def test_what_is_said_of_two_teachers_is_what_their_dense_distributions_say(cache: Cache) -> None:
    one, other, found = two_teachers(cache)
    (shared,) = found.shared
    said, tokens = shared.agreement, np.flatnonzero(supervised())
    sampled = [token for row in rows(masked=True) for token in row.completion]
    tops = [[set(np.argsort(-side[t])[:4].tolist()) for side in (one, other)] for t in tokens]
    oracle = {
        "kl_ab": [kl(*coarse(one[t], other[t], 6, 6)) for t in tokens],
        "kl_ba": [kl(*coarse(one[t], other[t], 6, 6)[::-1]) for t in tokens],
        "mass_a": [1 - coarse(one[t], other[t], 6, 6)[0][-1] for t in tokens],
        "mass_b": [1 - coarse(one[t], other[t], 6, 6)[1][-1] for t in tokens],
        "overlap": [len(a & b) / 4 for a, b in tops],
        "overlap_mass_a": [
            sum(math.exp(one[t, id]) for id in a & b)
            for t, (a, b) in zip(tokens, tops, strict=True)
        ],
        "argmax_agreement": [one[t].argmax() == other[t].argmax() for t in tokens],
        "kept_by_both": [(len(coarse(one[t], other[t], 6, 6)[0]) - 1) / 6 for t in tokens],
        "sampled_difference": [abs(one[t, sampled[t]] - other[t, sampled[t]]) for t in tokens],
        "entropy_difference": [
            abs((np.exp(one[t]) * one[t]).sum() - (np.exp(other[t]) * other[t]).sum())
            for t in tokens
        ],
    }
    assert said.num_tokens == len(tokens)
    for name, values in oracle.items():
        assert getattr(said, name).mean == pytest.approx(float(np.mean(values)), abs=2e-3), name
    largest = max(oracle["sampled_difference"])
    assert shared.largest["sampled_difference"] == pytest.approx(largest, abs=5e-3)
    assert (shared.teacher_a, shared.teacher_b) == (ONE, OTHER)


def test_the_student_s_distance_from_either_is_that_of_the_tokens_it_sampled(cache: Cache) -> None:
    one, other, found = two_teachers(cache)
    completions = rows(masked=True)
    ids = [token for row in completions for token in row.completion]
    log_p = np.concatenate([row.sampling_T for row in completions])
    for name, logprobs in (("student_kl_a", one), ("student_kl_b", other)):
        apart = (log_p - logprobs[np.arange(len(ids)), ids])[supervised()]
        said = getattr(found.shared[0].agreement, name)
        assert said.mean == pytest.approx(apart.mean(), abs=2e-3)


def test_swapping_the_two_swaps_what_is_said(cache: Cache, tmp_path: Path) -> None:
    completions = rows()
    shard = commit_rollouts(cache, completions)
    a = commit(cache, shard, scored(dense(1), completions), ONE)
    b = commit(cache, shard, scored(dense(2), completions), OTHER)
    ((there,), (back,)) = by_key(cache, a, b).shared, by_key(cache, b, a).shared
    mirrored = (("kl_ab", "kl_ba"), ("mass_a", "mass_b"), ("overlap_mass_a", "overlap_mass_b"))
    for name, mirror in mirrored:
        ours, theirs = (getattr(each.agreement, n) for each, n in ((there, name), (back, mirror)))
        assert ours.mean == pytest.approx(theirs.mean)
    change = there.agreement.student_kl_change
    assert change
    assert back.agreement.student_kl_change
    assert change.mean == pytest.approx(-back.agreement.student_kl_change.mean)


def test_a_narrower_set_is_counted(cache: Cache) -> None:
    _, _, found = two_teachers(cache, other_k=3)
    assert found.shared[0].agreement.num_narrow == supervised().sum()


def test_chunks_of_positions_add_up(cache: Cache) -> None:
    completions = rows()
    shard = commit_rollouts(cache, completions)
    a = commit(cache, shard, scored(dense(1), completions), ONE)
    b = commit(cache, shard, scored(dense(2), completions), OTHER)
    (shared,) = by_key(cache, a, b, chunk_tokens=4).shared
    assert [at.first for at in shared.by_position] == [0, 4, 8]
    assert [at.num_tokens for at in shared.by_position] == [4 + 3 + 4 + 1, 1 + 4, 1]
    whole = shared.agreement.kl_ab
    assert whole
    assert whole.mean * shared.agreement.num_tokens == pytest.approx(
        sum(at.kl_ab.mean * at.num_tokens for at in shared.by_position if at.kl_ab)
    )


def test_several_shards_say_what_one_of_all_their_completions_says(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other, completions = dense(1), dense(2), rows()
    shard = commit_rollouts(cache, completions)
    (whole,) = by_key(
        cache,
        commit(cache, shard, scored(one, completions), ONE),
        commit(cache, shard, scored(other, completions), OTHER),
        chunk_tokens=4,
    ).shared
    halves: dict[str, list[str]] = {ONE: [], OTHER: []}
    for number, some in enumerate((slice(0, 3), slice(3, 5))):
        part = completions[some]
        tokens = slice(0, 8) if number == 0 else slice(8, None)
        half = commit_rollouts(cache, part, name=f"half {number}")
        for teacher, logprobs in ((ONE, one), (OTHER, other)):
            made = commit(cache, half, scored(logprobs[tokens], part), teacher)
            halves[teacher].append(made.key)
    monkeypatch.setattr(likeness, "_AT_ONCE", 3)
    targets = (of_keys(cache, keys) for keys in halves.values())

    (parted,) = compare(*targets, chunk_tokens=4).shared

    assert parted.num_shards == 2
    for ours, theirs in (
        (parted.agreement, whole.agreement),
        *zip(parted.by_position, whole.by_position, strict=True),
    ):
        for name, value in ours.model_dump().items():
            expected = theirs.model_dump()[name]
            assert value == pytest.approx(expected), name
    assert parted.largest == pytest.approx(whole.largest)


def test_a_chunk_s_error_takes_its_completions_as_the_draws(cache: Cache) -> None:
    one, other, completions = dense(1), dense(2), rows()
    shard = commit_rollouts(cache, completions)
    a = commit(cache, shard, scored(one, completions), ONE)
    b = commit(cache, shard, scored(other, completions), OTHER)
    first, *_ = by_key(cache, a, b, chunk_tokens=1).shared[0].by_position
    starts = np.cumsum([0, *LENGTHS])[:-1][np.asarray(LENGTHS) > 0]
    sampled = [token for row in completions for token in row.completion]
    apart = [abs(one[t, sampled[t]] - other[t, sampled[t]]) for t in starts]
    assert first.sampled_difference
    assert first.sampled_difference.standard_error == pytest.approx(
        np.std(apart, ddof=1) / len(apart) ** 0.5, abs=2e-3
    )


def test_completions_of_one_length_have_the_error_of_their_means() -> None:
    values = np.random.default_rng(0).normal(size=(30, 7))
    sums = ClusteredSums()
    for part in np.split(values, 3):
        sums.add("x", part.reshape(-1), np.repeat(np.arange(10), 7))
    found = sums.estimate("x")
    assert found
    assert found.mean == pytest.approx(values.mean())
    assert found.standard_error == pytest.approx(values.mean(axis=1).std(ddof=1) / 30**0.5)


def test_the_error_is_how_far_means_of_new_completions_are_spread() -> None:
    rng, means, errors = np.random.default_rng(1), [], []
    for _ in range(400):
        lengths = rng.integers(1, 20, size=60)
        of_rows = np.repeat(np.arange(60), lengths)
        values = rng.normal(size=60)[of_rows] + rng.normal(size=len(of_rows))
        sums = ClusteredSums()
        sums.add("x", values, of_rows)
        found = sums.estimate("x")
        assert found
        assert found.standard_error
        means.append(found.mean)
        errors.append(found.standard_error)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.1)


def test_one_completion_has_no_error_and_nan_is_no_value() -> None:
    sums = ClusteredSums()
    sums.add("x", np.asarray([1.0, np.nan, 3.0]), np.asarray([1, 0, 1]))
    found = sums.estimate("x")
    assert found
    assert (found.mean, found.standard_error) == (2, None)


def again(cache: Cache, change: float, **how: object) -> SharedRollouts:
    """A teacher against itself, its logits changed at random by so much."""
    completions, logits = rows(), dense(1)
    noise = np.random.default_rng(7).normal(0, change, logits.shape)
    changed = normalised(logits + noise)
    shard = commit_rollouts(cache, completions)
    a = commit(cache, shard, scored(logits, completions), ONE)
    b = commit(cache, shard, scored(changed, completions), ONE, **how)
    (shared,) = by_key(cache, a, b).shared
    return shared


def test_coarser_storage_of_the_same_scores_is_within_rounding(cache: Cache) -> None:
    shared = again(cache, 0.0, step=1 / 256)
    assert shared.verdict == "the same within rounding"
    assert any(line.startswith("step: ") for line in shared.made_otherwise)
    assert shared.agreement.kl_ab
    # A log-prob is off by half a step of its size at most, a KL by about half its square.
    assert 0 < shared.agreement.kl_ab.mean < (4 / 256) ** 2


def test_a_teacher_that_is_not_what_it_was_has_drifted(cache: Cache) -> None:
    shared = again(cache, 0.8, dtype="bfloat16")
    assert shared.verdict == "different"
    assert "dtype: float32 | bfloat16" in shared.made_otherwise
    assert {test.name for test in shared.tests if test.outcome == "beyond"} >= {"kl_ab", "kl_ba"}


def test_another_prompt_rendering_makes_another_teacher(cache: Cache) -> None:
    shared = again(cache, 0.0, rendering="another")
    assert not shared.same_model
    assert shared.verdict == "indistinguishable"


def test_two_teachers_of_nearly_one_distribution_are_indistinguishable(cache: Cache) -> None:
    completions = rows()
    shard = commit_rollouts(cache, completions)
    a = commit(cache, shard, scored(dense(1), completions), ONE)
    b = commit(cache, shard, scored(dense(1), completions), OTHER, step=1 / 256)
    assert by_key(cache, a, b).shared[0].verdict == "indistinguishable"


def test_two_teachers_far_apart_are_different_and_that_is_no_failure(cache: Cache) -> None:
    _, _, found = two_teachers(cache)
    assert found.shared[0].verdict == "different"
    assert found.is_sound


def test_little_that_both_keep_leaves_likeness_undecided(cache: Cache) -> None:
    flat = np.full((sum(LENGTHS), NUM_IDS), -math.log(NUM_IDS)) - 1e-3 * np.arange(NUM_IDS)
    completions = rows()
    shard = commit_rollouts(cache, completions)
    a, b = (
        commit(cache, shard, scored(flat, completions, 1), teacher, k=1) for teacher in (ONE, OTHER)
    )
    (shared,) = by_key(cache, a, b).shared
    assert shared.verdict == "undecided"
    assert {t.name for t in shared.tests if t.outcome == "undecided"} == {"mass_a", "mass_b"}


def test_one_stored_set_is_not_held_against_itself(cache: Cache) -> None:
    completions = rows()
    shard = commit_rollouts(cache, completions)
    a = commit(cache, shard, scored(dense(1), completions), ONE)
    found = by_key(cache, a, a)
    assert (found.shared, found.side_by_side) == ((), ())
    assert [(left.reason, left.num_tokens) for left in found.left_out] == [
        ("both read the same stored scores", sum(LENGTHS))
    ]


def test_a_column_that_one_lacks_is_counted_and_the_others_compared(cache: Cache) -> None:
    completions = rows()
    whole = scored(dense(1), completions)
    shard = commit_rollouts(cache, completions)
    a = commit(cache, shard, whole, ONE)
    b = commit(cache, shard, Scores(whole.token_offsets, topk=whole.topk), OTHER)
    (shared,) = by_key(cache, a, b).shared
    assert [(left.reason, left.num_tokens) for left in shared.left_out] == [
        ("B stores no sampled", sum(LENGTHS)),
        ("B stores no entropy", sum(LENGTHS)),
    ]
    assert shared.agreement.sampled_difference is None
    assert shared.agreement.kl_ab


class Run:
    """A run file and the rounds that it pinned, made by hand."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / f"{name}.yaml"
        self.path.write_text(
            f"student: {{model: s}}\nteacher: {{model: t}}\ncache: {folder / 'cache'}\n"
            f"output: {folder / name}\nprompts: {{source: {{type: jsonl, path: none.jsonl}}}}\n"
        )
        self.folder = RunFolder(folder / name)
        resolved = Resolved(
            run_id=name,
            opdcache="0",
            config=load_run(self.path),
            student="s",
            teacher=ONE,
            vocabulary="v",
            tokenizers="t",
            vocab_size=NUM_IDS,
        )
        documents.create(folder / name / "resolved.json", resolved)

    def pin(
        self, index: int, shard: RolloutShard, scores: ScoreManifest, other: ScoreManifest | None
    ) -> None:
        """A round of one shard, and another teacher's scores of it as the reference ``other``."""
        of = [_listed(manifest) for manifest in (scores, other) if manifest is not None]
        self.folder.write(
            RolloutRound(round=index, student="s", shards=(shard,), dropped={}, elapsed_s=0)
        )
        references = {"other": (of[1],)} if other else {}
        self.folder.write(
            ScoreRound(round=index, shards=(of[0],), references=references, elapsed_s=0)
        )


def _listed(manifest: ScoreManifest) -> ScoredShard:
    identity = manifest.identity
    served = ServedColumns(key=manifest.key, columns=identity.columns)
    return ScoredShard(
        content=identity.content, teacher=identity.teacher, served=(served,), cached=False
    )


@pytest.fixture
def runs(tmp_path: Path, cache: Cache) -> tuple[Path, Path]:
    """Two runs that share round 0, which each scored with its own teacher; A has a round more."""
    one, other = Run(tmp_path, "one"), Run(tmp_path, "other")
    shared = commit_rollouts(cache, rows(0), name="shared")
    sets = [commit(cache, shared, scored(dense(i), rows(0)), str(i) * 64) for i in (1, 2)]
    one.pin(0, shared, sets[0], sets[1])
    other.pin(0, shared, sets[1], None)
    for run, index, seed in ((one, 1, 1), (other, 1, 2), (one, 2, 3)):
        shard = commit_rollouts(cache, rows(seed), name=f"shard {seed}")
        run.pin(index, shard, commit(cache, shard, scored(dense(seed), rows(seed)), ONE), None)
    return one.path, other.path


def test_two_runs_are_compared_where_they_share_and_side_by_side_where_not(
    runs: tuple[Path, Path],
) -> None:
    found = compare(*(operand(str(path), None) for path in runs))

    assert [(of.teacher_a, of.teacher_b, of.num_shards) for of in found.shared] == [(ONE, OTHER, 1)]
    (pair,) = found.side_by_side
    assert (pair.a.round, pair.b.round) == (1, 1)
    assert (pair.num_shared_shards, pair.num_shared_prompts) == (0, 0)
    assert found.unpaired == ("A's round 2",)
    assert [(left.reason, left.num_shards) for left in found.left_out] == [
        ("only A has scores of these rollouts", 2),
        ("only B has scores of these rollouts", 1),
    ]


def test_differences_of_rounds_are_those_of_their_audits(runs: tuple[Path, Path]) -> None:
    found = compare(operand(f"{runs[0]}@1", None), operand(f"{runs[0]}@2", None))
    (pair,) = found.side_by_side
    assert not found.shared
    for row in pair.differences:
        ours, theirs = (getattr(part.diagnostics, row.name) for part in (pair.a, pair.b))
        if ours is None or theirs is None:
            assert row.change is None
            continue
        assert row.a
        assert row.b
        assert row.change
        assert row.change.mean == pytest.approx(theirs - ours)
        assert row.change.standard_error == pytest.approx(
            math.hypot(row.a.standard_error or 0, row.b.standard_error or 0)
        )


def test_rounds_that_share_some_shards_have_differences_without_errors(
    tmp_path: Path, runs: tuple[Path, Path], cache: Cache
) -> None:
    folder = RunFolder(tmp_path / "one")
    rollouts, scores = zip(*(folder.scored(index) for index in (0, 1)), strict=True)
    wide = Run(tmp_path, "wide")
    both = tuple(shard for each in rollouts for shard in each.shards)
    wide.folder.write(rollouts[0].model_copy(update={"shards": both}))
    listed = tuple(shard for each in scores for shard in each.shards)
    wide.folder.write(scores[0].model_copy(update={"shards": listed, "references": {}}))
    (pair,) = compare(operand(f"{wide.path}@0", None), operand(f"{runs[0]}@1", None)).side_by_side
    assert (pair.num_shared_shards, pair.num_shared_prompts) == (1, len(LENGTHS))
    changes = [row.change for row in pair.differences if row.change is not None]
    assert changes
    assert all(change.standard_error is None for change in changes)


def test_a_reference_is_a_second_teacher_on_the_same_rollouts(runs: tuple[Path, Path]) -> None:
    found = compare(operand(f"{runs[0]}@0", None), operand(f"{runs[0]}@0#other", None))
    (shared,) = found.shared
    assert (shared.teacher_a, shared.teacher_b) == (ONE, OTHER)
    assert (found.side_by_side, found.left_out, found.unpaired) == ((), (), ())


def test_scores_in_two_caches_are_compared_though_their_keys_are_the_same(
    tmp_path: Path, cache: Cache
) -> None:
    elsewhere, completions = Cache(str(tmp_path / "elsewhere")), rows()
    sets = []
    for number, place in enumerate((cache, elsewhere)):
        shard = commit_rollouts(place, completions)
        logprobs = dense(1) + 1e-3 * number
        sets.append(commit(place, shard, scored(np.minimum(logprobs, 0), completions), ONE))
    assert sets[0].key == sets[1].key
    found = compare(of_keys(cache, [sets[0].key]), of_keys(elsewhere, [sets[1].key]))
    assert found.shared[0].verdict == "the same within rounding"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{run}@x", "'x' is no round"),
        ("{run}@-1", "'-1' is no round"),
        ("{run}@", "'' is no round"),
        ("{run}@0@1", "'0@1' is no round"),
        ("{run}#", "the reference has no name"),
        ("{run}@0#nobody", "no scores of a reference 'nobody'"),
        ("run.json", "names nothing to compare"),
        ("abc", "give --cache"),
    ],
)
def test_what_names_nothing_is_told_in_one_line(
    runs: tuple[Path, Path], text: str, said: str
) -> None:
    with pytest.raises(UsageError) as caught:
        operand(text.format(run=runs[0]), None)
    assert said in str(caught.value)


def test_a_round_that_is_not_scored_is_told(runs: tuple[Path, Path]) -> None:
    with pytest.raises(InputsMissing):
        operand(f"{runs[0]}@9", None)


def test_a_round_of_a_run_in_a_folder_with_odd_characters_is_found(
    tmp_path: Path, cache: Cache
) -> None:
    folder = tmp_path / "a.yaml@2#b"
    folder.mkdir()
    run = Run(folder, "run")
    place = Cache(str(folder / "cache"))
    shard = commit_rollouts(place, rows())
    run.pin(0, shard, commit(place, shard, scored(dense(1), rows()), ONE), None)
    (part,) = operand(f"{run.path}@0", None).parts
    assert part.round == 0


def test_rollouts_that_several_teachers_scored_are_no_single_set(cache: Cache) -> None:
    completions = rows()
    shard = commit_rollouts(cache, completions)
    a, _ = (commit(cache, shard, scored(dense(1), completions), by) for by in (ONE, OTHER))
    with pytest.raises(UsageError, match="name one score set"):
        compare(of_keys(cache, [shard.key]), of_keys(cache, [a.key]))


def run_command(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(cli, ["compare", *arguments], standalone_mode=False)
    assert done.exception is None
    return done.return_value, done.output


def test_drift_exits_3_and_a_limit_can_be_set(tmp_path: Path, cache: Cache) -> None:
    again(cache, 0.8, dtype="bfloat16")
    keys = [manifest.key for manifest in cache.score_sets(_only_content(cache))]
    url = str(tmp_path / "cache")
    code, said = run_command(*keys, "--cache", url)
    assert code == 3
    assert "verdict: different" in said
    limits = [f"--limit={name}=9" for name in ("max_drift_kl", "max_drift_nats")]
    code, said = run_command(*keys, "--cache", url, *limits)
    assert code == 0
    assert "verdict: the same within rounding" in said


def _only_content(cache: Cache) -> str:
    (info,) = cache.objects.list("commits/rollouts")
    manifest = cache.manifest(info.path)
    assert manifest
    assert not isinstance(manifest, ScoreManifest)
    return manifest.content


def test_two_runs_as_text_and_as_json_say_the_same(runs: tuple[Path, Path]) -> None:
    code, text = run_command(str(runs[0]), str(runs[1]))
    assert code == 0
    found = Comparison.model_validate_json(run_command(*map(str, runs), "--json")[1])
    assert f"verdict: {found.shared[0].verdict}" in text
    assert "side by side: round 1 of A, round 1 of B" in text
    assert "A's round 2" in text
    for left in found.left_out:
        assert left.reason in text


def test_a_damaged_shard_is_named_in_no_number_and_exits_3(
    tmp_path: Path, runs: tuple[Path, Path], cache: Cache
) -> None:
    found = compare(*(operand(str(path), None) for path in runs))
    (scores,) = RunFolder(tmp_path / "other").scored(0)[1].shards
    (manifest,) = cache.score_sets(scores.content, scores.teacher)
    for entry in manifest.objects:
        file = tmp_path / "cache" / "data" / manifest.key[:2] / manifest.key / manifest.attempt
        data = (file / entry.path).read_bytes()
        (file / entry.path).write_bytes(bytes(255 - byte for byte in data))
    code, said = run_command(*map(str, runs), "--json")
    damaged = json.loads(said)
    assert code == 3
    assert damaged["shared"] == []
    assert len(damaged["unreadable"]) == 1
    assert {"reason": "unreadable", "num_shards": 1, "num_tokens": sum(LENGTHS)} in (
        damaged["left_out"]
    )
    assert len(found.side_by_side) == len(damaged["side_by_side"])


@pytest.mark.parametrize(
    ("mean", "error", "outcome"),
    [
        (0.05, 0.02, "within"),
        (0.09, 0.02, "undecided"),
        (0.12, 0.02, "undecided"),
        (0.15, 0.02, "beyond"),
        (0.05, None, "undecided"),
    ],
)
def test_a_mean_must_be_two_errors_clear_of_its_limit(
    mean: float, error: float | None, outcome: str
) -> None:
    value = Estimate(mean=mean, standard_error=error)
    nothing = dict.fromkeys(Agreement.model_fields)
    said = Agreement(**(nothing | {"num_tokens": 1, "num_narrow": 0, "kl_ab": value}))
    (test,) = likeness.tests(said, CompareLimits(max_kl=0.1), same_model=False)
    assert (test.name, test.outcome) == ("kl_ab", outcome)
    verdict = likeness.verdict([test], same_model=False)
    named = {"within": "indistinguishable", "beyond": "different", "undecided": "undecided"}
    assert verdict == named[outcome]
