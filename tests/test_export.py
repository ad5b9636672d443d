"""Flat tables, read back by the programs that they are written for."""

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import duckdb
import numpy as np
import polars
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

import opdcache
from opdcache import export
from opdcache.cli.main import main
from opdcache.data import of_run
from opdcache.errors import InputsMissing, InvalidShard, UsageError
from opdcache.runfolder import RunFolder
from opdcache.schemas.columns import SCORE_COLUMNS
from opdcache.schemas.rounds import RolloutRound, ScoreRound
from opdcache.store import rollouts
from opdcache.store.cache import Cache, as_listed, rollout_commit
from opdcache.store.scores import Draws, Scores, StudentTopK, TopK

from . import shards
from .handmade import TEACHER, commit_scores, rounds

OTHER_TEACHER = "79" * 32
VOCAB, K, S = 1000, 3, 2
LENGTHS = ((4, 0, 2), (1,), (3, 5))
Rows = list[dict[str, Any]]


def completion(index: int, num_tokens: int, *, recorded: bool) -> rollouts.Completion:
    rng = np.random.default_rng([index, num_tokens])
    width = S if recorded else 0
    return rollouts.Completion(
        prompt_id=f"prompt-{index}",
        sample_index=index % 2,
        prompt_token_ids=rng.integers(VOCAB, size=1 + index).tolist(),
        completion_token_ids=rng.integers(VOCAB, size=num_tokens).tolist(),
        behavior_logprobs=rng.uniform(-3, 0, num_tokens).astype(np.float32),
        sampling_logprobs=rng.uniform(-3, 0, num_tokens).astype(np.float32),
        topk_ids=rng.integers(VOCAB, size=(num_tokens, width)).astype(np.int32),
        topk_logprobs=-rng.uniform(0, 3, (num_tokens, width)).astype(np.float32),
        finish_reason="length" if index else "stop",
        text=f"Größe {num_tokens}\n",
        task="sums",
        answer=str(index) if recorded else None,
        messages=(("user", f"Größe {index}?"),) if recorded else None,
    )


def some_scores(lengths: tuple[int, ...], *columns: str) -> Scores:
    rng = np.random.default_rng(lengths)
    num_tokens = sum(lengths)

    def floats(*shape: int) -> Any:
        return -rng.uniform(0.01, 9, (num_tokens, *shape)).astype(np.float32)

    ids = np.stack([rng.permutation(VOCAB)[:K] for _ in range(num_tokens)]).astype(np.int32)
    tail = floats()
    tail[0] = -np.inf
    num_kept = (1 + np.arange(num_tokens) % K).astype(np.uint16)
    topk = TopK(ids, np.sort(floats(K))[:, ::-1], num_kept, tail)
    every = {
        "sampled": ("sampled_logprobs", floats()),
        "entropy": ("entropy", -floats()),
        "topk": ("topk", topk),
        "student_topk": ("student_topk", StudentTopK(floats(S), floats())),
        "draws": ("draws", Draws.of(rng.integers(4, size=(num_tokens, 5)))),
    }
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Scores(offsets, **dict(every[column] for column in columns))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of two rounds and its cache.

    Its first two shards have every column. The last has no recorded entries, no answers and no
    draws, and the scores of it are in two sets.
    """
    home = tmp_path_factory.mktemp("made")
    cache, folder = Cache(str(home / "cache")), RunFolder(home / "run")
    listed, served = [], []
    for number, lengths in enumerate(LENGTHS):
        recorded = number < 2
        rows = [completion(i, n, recorded=recorded) for i, n in enumerate(lengths)]
        manifest = shards.commit_rollouts(
            cache, str(number), rollouts.rollout_table(rows), student_topk=S if recorded else 0
        )
        listed.append(as_listed(manifest, cached=False))
        sets = [[*SCORE_COLUMNS, "draws"]] if recorded else [["entropy", "sampled"], ["topk"]]
        served.append(
            [commit_scores(cache, listed[-1], some_scores(lengths, *s), s) for s in sets]  # type: ignore[arg-type]
        )
    for index, part in enumerate((slice(0, 2), slice(2, 3))):
        for file in rounds(listed[part], served[part], index):
            folder.write(file)
    return home


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """That run's folder, in a place of the test's own."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "run"


def cache_of(run: Path) -> Cache:
    return Cache(str(run.parent / "cache"))


def exported(run: Path, name: str = "tables", file_format: export.Format = "parquet") -> Path:
    out = run.parent / name
    export.export(cache_of(run), of_run(run), out, file_format)
    return out


def with_duckdb(folder: Path, file_format: str) -> Rows:
    parts = pyarrow.dataset.dataset(folder, format="ipc") if file_format == "arrow" else None
    source = "parts" if parts else f"'{folder}/part-*.parquet'"
    found = duckdb.sql(f"SELECT * FROM {source}")
    return [dict(zip(found.columns, row, strict=True)) for row in found.fetchall()]


def with_polars(folder: Path, file_format: str) -> Rows:
    scan = polars.scan_ipc if file_format == "arrow" else polars.scan_parquet
    return scan(folder / f"part-*.{file_format}").collect().to_dicts()


def with_datasets(folder: Path, file_format: str) -> Rows:
    files = str(folder / f"part-*.{file_format}")
    kept = str(folder.parent / "hf")
    return list(datasets.load_dataset(file_format, data_files=files, split="train", cache_dir=kept))


def rows_of(folder: Path) -> Rows:
    return pq.ParquetDataset(sorted(folder.glob("part-*"))).read().to_pylist()


def expected(sample: opdcache.Sample) -> dict[str, Any]:
    """A sample as the row that a reader shall give, token by token."""

    def kept(values: Any, counts: Any) -> list[list[float]]:
        return [line[: int(n)].tolist() for line, n in zip(values, counts, strict=True)]

    row: dict[str, Any] = {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name in sample.__slots__
        if name not in ("scores", "loss_mask")  # no token is masked, so there is no column
        for value in [getattr(sample, name)]
    }
    names = [f.name for fields in export.TEACHER_FIELDS.values() for f in fields]
    row |= dict.fromkeys(names)
    scores = sample.scores
    if scores.sampled_logprobs is not None:
        row["teacher_sampled_logprobs"] = scores.sampled_logprobs.tolist()
    if scores.entropy is not None:
        row["teacher_entropy"] = scores.entropy.tolist()
    if scores.topk is not None:
        row["teacher_topk_ids"] = kept(scores.topk.ids, scores.topk.num_kept)
        row["teacher_topk_logprobs"] = kept(scores.topk.logprobs, scores.topk.num_kept)
        row["teacher_tail_logprobs"] = scores.topk.tail_logprobs.tolist()
    if scores.student_topk is not None:
        row["teacher_student_topk_logprobs"] = scores.student_topk.logprobs.tolist()
        row["teacher_student_tail_logprobs"] = scores.student_topk.tail_logprobs.tolist()
    if scores.draws is not None:
        distinct = [np.count_nonzero(counts) for counts in scores.draws.counts]
        row["teacher_draw_ids"] = kept(scores.draws.ids, distinct)
        row["teacher_draw_counts"] = kept(scores.draws.counts, distinct)
    return row


@pytest.mark.parametrize("file_format", ["parquet", "arrow"])
@pytest.mark.parametrize("read", [with_duckdb, with_polars, with_datasets])
def test_every_reader_gives_back_what_the_samples_hold(
    run: Path, read: Callable[[Path, str], Rows], file_format: export.Format
) -> None:
    found = read(exported(run, file_format=file_format), file_format)
    samples = opdcache.open_cache(run.parent / "cache").of_run(
        run, columns=[*SCORE_COLUMNS, "draws"]
    )
    pinned = [
        (shard, RunFolder(run).need(ScoreRound, index).shards[place])
        for index in (0, 1)
        for place, shard in enumerate(RunFolder(run).need(RolloutRound, index).shards)
    ]
    sources = [
        {"rollout_key": shard.key, "teacher": TEACHER, "score_keys": [s.key for s in scored.served]}
        for shard, scored in pinned
        for _ in range(shard.num_rows)
    ]
    for row in found:
        assert row["rollout_id"] == f"{row.pop('prompt_id')}/{row.pop('sample_index')}"
    assert found == [expected(s) | source for s, source in zip(samples, sources, strict=True)]


def test_an_empty_completion_is_a_row_of_empty_lists(run: Path) -> None:
    row = rows_of(exported(run))[1]
    assert row["prompt_token_ids"]
    per_token = [name for name in row if name.startswith("teacher_")]
    assert len(per_token) == 9
    for name in ("completion_token_ids", "behavior_logprobs", "student_topk_ids", *per_token):
        assert row[name] == []


def test_a_token_has_its_kept_entries_alone(run: Path) -> None:
    row = rows_of(exported(run))[0]
    assert [len(ids) for ids in row["teacher_topk_ids"]] == [1, 2, 3, 1]
    assert [len(logprobs) for logprobs in row["teacher_topk_logprobs"]] == [1, 2, 3, 1]
    assert [sum(counts) for counts in row["teacher_draw_counts"]] == [5] * 4


def test_what_a_shard_lacks_is_null_and_all_parts_have_one_schema(run: Path) -> None:
    out = exported(run)
    schemas = [pq.read_schema(part) for part in sorted(out.iterdir())]
    assert len(schemas) == len(LENGTHS)
    assert all(schema.equals(schemas[0], check_metadata=True) for schema in schemas)
    for row in rows_of(out)[-len(LENGTHS[2]) :]:
        lacking = {name for name, value in row.items() if value is None}
        draws = {"teacher_draw_ids", "teacher_draw_counts"}
        student = {"teacher_student_topk_logprobs", "teacher_student_tail_logprobs"}
        recorded = {"student_topk_ids", "student_topk_logprobs"}
        assert lacking == {"answer", "messages", *draws, *student, *recorded}


def test_a_column_that_no_shard_has_is_absent(run: Path) -> None:
    out = run.parent / "tables"
    export.export(cache_of(run), of_run(run)[2:], out)
    names = set(pq.read_schema(out / "part-00000.parquet").names)
    assert {"teacher_topk_ids", "teacher_entropy", "answer"} <= names
    assert not any("draw" in name or "student_" in name for name in names)


def test_every_column_says_what_it_is_and_its_unit(run: Path) -> None:
    for field in pq.read_schema(exported(run) / "part-00000.parquet"):
        description = field.metadata[b"description"].decode()
        leaf = field.type
        while pa.types.is_list(leaf):
            leaf = leaf.value_type
        assert leaf in (pa.string(), pa.int32(), pa.float32())
        assert (leaf == pa.float32()) == ("nats" in description)


@pytest.mark.parametrize("file_format", ["parquet", "arrow"])
def test_a_shard_is_written_in_groups_of_rows(
    run: Path, file_format: export.Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = with_polars(exported(run, "whole", file_format), file_format)
    monkeypatch.setattr("opdcache.export.GROUP_TOKENS", 2)
    part = exported(run, file_format=file_format) / f"part-00000.{file_format}"
    if file_format == "parquet":
        assert pq.ParquetFile(part).num_row_groups == 2
    else:
        assert pa.ipc.open_file(part).num_record_batches == 2
    assert with_polars(part.parent, file_format) == whole


def test_without_a_run_every_pair_of_rollouts_and_scores_is_a_part(run: Path) -> None:
    found, left_out = export.of_cache(cache_of(run))
    assert ([len(pair.served) for pair in found], left_out) == ([1] * 4, 0)
    done = export.export(cache_of(run), found, run.parent / "tables")
    rows = rows_of(run.parent / "tables")
    assert (done.num_parts, done.num_rows) == (4, len(rows))
    assert done.num_tokens == sum(len(row["completion_token_ids"]) for row in rows)
    assert done.size_bytes == sum(f.stat().st_size for f in (run.parent / "tables").iterdir())
    split = [row for row in rows if row["teacher_draw_ids"] is None]
    assert len(split) == 2 * len(LENGTHS[2])
    for row in split:  # each set's columns, and no other's
        assert (row["teacher_topk_ids"] is None) != (row["teacher_entropy"] is None)


def test_a_teacher_is_asked_for_by_what_tells_it_from_others(run: Path) -> None:
    cache = cache_of(run)
    rollout = cache.need_rollouts(RunFolder(run).need(RolloutRound, 0).shards[0])
    scores = some_scores(LENGTHS[0], "entropy")
    made = shards.commit_scores(cache, rollout, "entropy", scores=scores, teacher=OTHER_TEACHER)
    (pair,), _ = export.of_cache(cache, OTHER_TEACHER[:2])
    assert (pair.teacher, pair.rollouts.key, pair.served[0].key) == (
        OTHER_TEACHER,
        rollout.key,
        made.key,
    )
    assert len(export.of_cache(cache, TEACHER)[0]) == 4
    with pytest.raises(UsageError, match="2 teachers have a fingerprint that starts with '7'"):
        export.of_cache(cache, "7")
    with pytest.raises(UsageError, match="0 teachers"):
        export.of_cache(cache, "ab")


def test_scores_without_their_rollouts_are_left_out_and_counted(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = cache_of(run)
    cache.objects.delete(rollout_commit(RunFolder(run).need(RolloutRound, 1).shards[0].key))
    found, left_out = export.of_cache(cache)
    assert (len(found), left_out) == (2, 2)
    assert command(run, monkeypatch, "--out", run.parent / "tables") == 0
    assert capsys.readouterr().out.startswith("left out 2 score sets whose rollouts are gone\n")


def test_nothing_to_export_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputsMissing, match="holds no scored completions"):
        export.of_cache(Cache(str(tmp_path / "cache")))
    with pytest.raises(InputsMissing, match="no scored round"):
        of_run(tmp_path / "run")


def test_scores_that_divide_their_tokens_otherwise_are_refused(run: Path) -> None:
    cache, shard = cache_of(run), RunFolder(run).need(RolloutRound, 0).shards[0]
    served = commit_scores(cache, shard, some_scores((2, 2, 2), "entropy"), ["entropy"])
    pairs = [p for p in export.of_cache(cache)[0] if p.served == (served,)]
    with pytest.raises(InvalidShard, match="not those of the rollouts"):
        export.export(cache, pairs, run.parent / "tables")


def test_an_interrupted_export_leaves_no_part(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, read, calls = run.parent / "tables", Cache.read_rollouts, 0

    def interrupted(self: Cache, manifest: Any) -> pa.Table:
        nonlocal calls
        calls += 1
        if calls == 2:
            assert list(out.rglob("part-00000.parquet"))
            assert not list(out.glob("part-*"))
            raise KeyboardInterrupt
        return read(self, manifest)

    with monkeypatch.context() as patch:
        patch.setattr(Cache, "read_rollouts", interrupted)
        with pytest.raises(KeyboardInterrupt):
            exported(run)
    assert list(out.iterdir()) == []
    assert len(list(exported(run).iterdir())) == len(LENGTHS)


def command(run: Path, monkeypatch: pytest.MonkeyPatch, *options: object) -> int:
    """Exit code of ``opdcache cache export`` with options."""
    arguments = ["opdcache", "cache", "export", run.parent / "cache", *options]
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_the_command_says_what_it_wrote_and_refuses_to_write_over_it(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run.parent / "tables"
    assert command(run, monkeypatch, "--out", out, "--format", "arrow", "--run", run) == 0
    size = sum(part.stat().st_size for part in out.iterdir())
    said = f"wrote 3 parts, 6 rows, 15 tokens, {size:,} bytes\n"
    assert capsys.readouterr() == (said, "")
    before = {part: part.stat().st_mtime_ns for part in out.iterdir()}
    assert command(run, monkeypatch, "--out", out) == 2
    refusal = capsys.readouterr().err
    assert re.fullmatch(r"error: .*tables: has part files .*; delete them.*\n", refusal)
    assert {part: part.stat().st_mtime_ns for part in out.iterdir()} == before
    assert command(run, monkeypatch, "--out", out, "--run", run, "--teacher", "7") == 2
    assert "do not go together" in capsys.readouterr().err


def test_the_documented_reads_give_what_they_say(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(exported(run))
    document = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
    section = document.partition("\n## Exporting flat tables\n")[2]
    blocks = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    assert len(blocks) == 3
    monkeypatch.chdir(run.parent)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", run.parent / "hf")
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    entropies = [h for row in rows for h in row["teacher_entropy"]]
    ((task, tokens, entropy),) = names["by_task"].fetchall()
    assert (task, tokens) == ("sums", len(entropies))
    assert entropy == pytest.approx(np.mean(entropies))
    gaps = [
        np.mean(np.subtract(row["behavior_logprobs"], row["teacher_sampled_logprobs"]))
        for row in rows
        if row["completion_token_ids"]
    ]
    found = [gap for gap in names["gaps"]["gap"].to_list() if gap is not None]
    assert found == pytest.approx(gaps, abs=1e-6)
    assert list(names["dataset"]) == rows
