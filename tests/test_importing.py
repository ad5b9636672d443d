"""Rollouts from elsewhere: what a file may say, what is refused, and shards like any other."""

import json
import math
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import opdcache
from opdcache import export
from opdcache.cli.main import main
from opdcache.errors import PromptError, UsageError
from opdcache.identity import FileHashes, content_hash, key_of, model_fingerprint
from opdcache.importing import Imported, import_rollouts
from opdcache.runfolder import RunFolder
from opdcache.schemas.manifests import ImportIdentity, RolloutManifest
from opdcache.schemas.rounds import RolloutRound
from opdcache.stage import Silent
from opdcache.store import rollouts
from opdcache.store.cache import Cache
from opdcache.store.upkeep import copy, garbage, listed, verify
from opdcache.torch_data import as_tensors

from .conftest import TINY_VOCAB
from .shards import TEACHER, commit_scores, some_scores

Rows = list[dict[str, Any]]
NO_GRACE = timedelta(seconds=-5)
ROWS: Rows = [
    {
        "prompt_token_ids": [1, 2],
        "completion_token_ids": [71, 72, 256],
        "behavior_logprobs": [-0.5, -1.5, 0.0],
        "sampling_logprobs": [-0.25, None, -2],
        "loss_mask": [1, 0, True],
        "id": "first",
        "task": "sums",
        "answer": 42,
        "messages": [{"role": "user", "content": "6 + 7?"}],
        "finish_reason": "stop",
    },
    {
        "prompt_token_ids": [7],
        "completion_token_ids": [],
        "behavior_logprobs": [],
        "sampling_logprobs": [],
        "task": "sums",
        "finish_reason": "length",
    },
]
PLAIN: Rows = [{"prompt_token_ids": [1], "completion_token_ids": [5, 6, 7]}]


def write(path: Path, rows: Rows) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


Import = Callable[..., Imported]


@pytest.fixture
def take(tmp_path: Path, tiny_student: Path) -> Import:
    """Import rows into ``cache``, and pin them in ``out``."""

    def take(rows: Rows, out: str = "out", name: str = "rows.jsonl", **asked: Any) -> Imported:
        cache, file = Cache(str(tmp_path / "cache")), write(tmp_path / name, rows)
        return import_rollouts(cache, file, tiny_student, tmp_path / out, Silent(), **asked)

    return take


def cache_in(tmp_path: Path) -> Cache:
    return Cache(str(tmp_path / "cache"))


def manifests(tmp_path: Path, out: str = "out") -> list[RolloutManifest]:
    cache = cache_in(tmp_path)
    pinned = RunFolder(tmp_path / out).need(RolloutRound, 0)
    return [cache.need_rollouts(shard) for shard in pinned.shards]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_what_a_file_says_is_stored_and_nothing_else(
    take: Import, tmp_path: Path, name: str
) -> None:
    rows = [{**row, "answer": row.get("answer") and str(row["answer"])} for row in ROWS]
    for row in rows:
        row["loss_mask"] = [int(one) for one in row.get("loss_mask", [])]
    done = take(rows, name=name)
    (manifest,) = manifests(tmp_path)
    first, second = cache_in(tmp_path).read_rollouts(manifest).to_pylist()
    assert math.isnan(first["sampling_logprobs"].pop(1))
    assert first == {
        "rollout_id": "first/0",
        "prompt_id": "first",
        "sample_index": 0,
        "prompt_token_ids": [1, 2],
        "completion_token_ids": [71, 72, 256],
        "behavior_logprobs": [-0.5, -1.5, 0.0],
        "sampling_logprobs": [-0.25, -2.0],
        "loss_mask": [True, False, True],
        "finish_reason": "stop",
        "text": "hi",
        "task": "sums",
        "answer": "42",
        "messages": '[["user","6 + 7?"]]',
    }
    assert second["completion_token_ids"] == second["sampling_logprobs"] == []
    assert second["answer"] is second["messages"] is None
    assert (done.num_rows, done.num_tokens, done.num_supervised) == (2, 3, 2)
    assert dict(done.quality) == manifest.quality == {"truncated": 1, "repetitive": 0}


def test_what_a_file_does_not_say_is_absent_not_zero(take: Import, tmp_path: Path) -> None:
    take(PLAIN)
    (manifest,) = manifests(tmp_path)
    table = cache_in(tmp_path).read_rollouts(manifest)
    optional = {"behavior_logprobs", "sampling_logprobs", "loss_mask", "answer", "messages"}
    assert optional & set(table.column_names) == set()
    (row,) = table.to_pylist()
    assert (row["finish_reason"], row["task"], row["sample_index"]) == ("unknown", "default", 0)
    assert verify(cache_in(tmp_path), deep=True) == []


def test_behaviour_alone_does_not_stand_for_the_distribution_that_was_sampled(
    take: Import, tmp_path: Path
) -> None:
    take([PLAIN[0] | {"behavior_logprobs": [-1, -1, -1]}])
    (manifest,) = manifests(tmp_path)
    assert manifest.identity.absent == {"sampling_logprobs", "loss_mask", "student_topk_ids"}


def test_completions_of_one_prompt_are_counted_and_a_shard_holds_one_task(
    take: Import, tmp_path: Path
) -> None:
    rows = [PLAIN[0] | {"completion_token_ids": [i], "task": "ba"[i % 2]} for i in range(5)]
    rows += [PLAIN[0] | {"completion_token_ids": [9]}]
    assert take(rows, task="c", shard_samples=2).num_shards == 4
    made = manifests(tmp_path)
    assert [(m.task, m.num_rows) for m in made] == [("a", 2), ("b", 2), ("b", 1), ("c", 1)]
    tables = [cache_in(tmp_path).read_rollouts(m) for m in made]
    indexes = [i for t in tables for i in t.column("sample_index").to_pylist()]
    assert indexes == [1, 3, 0, 2, 4, 5]
    assert len({i for t in tables for i in t.column("prompt_id").to_pylist()}) == 1


GOOD = ROWS[0]
FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "id outside": ({"completion_token_ids": [1, TINY_VOCAB, 2]}, "not in the student's vocabulary"),
    "negative id": ({"prompt_token_ids": [-1]}, "prompt_token_ids: an id is not"),
    "id of another type": ({"prompt_token_ids": [1.5]}, "prompt_token_ids is a list of integers"),
    "no ids": ({"completion_token_ids": None}, "completion_token_ids is a list .* must be there"),
    "empty prompt": ({"prompt_token_ids": []}, "the prompt has no tokens"),
    "short mask": ({"loss_mask": [1]}, "loss_mask has not an entry a .*expected 3, got 1"),
    "mask of 2": ({"loss_mask": [1, 0, 2]}, "loss_mask is of 0 and 1"),
    "mask of null": ({"loss_mask": [1, 0, None]}, "loss_mask is of 0 and 1"),
    "short log-probs": ({"behavior_logprobs": [-1, -1]}, "behavior_logprobs has not an entry a"),
    "log-prob above 0": ({"behavior_logprobs": [-1, -1, 0.5]}, "token 2: behavior_logprobs"),
    "log-prob NaN": ({"behavior_logprobs": [math.nan, -1, -1]}, "token 0: behavior_logprobs"),
    "log-prob infinite": ({"sampling_logprobs": [-1, -math.inf, -1]}, "token 1: sampling_logprobs"),
    "log-prob too low": ({"sampling_logprobs": [-1, -1e300, -1]}, "token 1: sampling_logprobs"),
    "log-prob of digits": ({"sampling_logprobs": [-(10**400), -1, -1]}, "token 0: sampling_log"),
    "log-prob of nobody": ({"sampling_logprobs": [None, -1, -1]}, "token 0: .* got null"),
    "log-prob as text": ({"sampling_logprobs": ["-1", -1, -1]}, "token 0: sampling_logprobs"),
    "column misspelt": ({"loss_masks": [1, 1, 1]}, "'loss_masks'; did you mean 'loss_mask'"),
    "column unknown": ({"zzz": 1}, "unknown column 'zzz'; known columns: prompt_token_ids"),
    "two ids": ({"prompt_id": "another"}, "id and prompt_id differ"),
    "id of two prompts": ({"prompt_token_ids": [9]}, "'first' stands for two prompts"),
    "sample twice": ({"sample_index": 0}, "prompt 'first' has two samples 0"),
    "sample below 0": ({"sample_index": -1}, "sample_index is an integer from 0"),
    "text of another type": ({"text": ["a"]}, "text is text.*got list"),
    "messages as text": ({"messages": "hi"}, "messages are objects with role and content"),
    "messages without": ({"messages": []}, "there is a message"),
    "half a message": (
        {"messages": [{"role": "user", "content": "\ud800"}]},
        "content is not Unicode",
    ),
    "half a character": ({"text": "\ud800"}, "text is not Unicode"),
    "log-probs of some": ({"behavior_logprobs": None}, "some rows have it, and some have not"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_with_its_row_and_nothing_is_stored(
    take: Import, tmp_path: Path, fault: str
) -> None:
    change, said = FAULTS[fault]
    with pytest.raises(PromptError, match=said) as caught:
        take([GOOD, GOOD | change])
    assert f"{tmp_path / 'rows.jsonl'}:2" in str(caught.value)
    assert not (tmp_path / "cache" / "commits").exists()
    assert not (tmp_path / "out" / "rounds").exists()


def test_a_fault_of_a_parquet_file_is_named_with_its_row(take: Import, tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"rows\.parquet row 1: .*vocabulary"):
        take([*PLAIN, PLAIN[0] | {"completion_token_ids": [TINY_VOCAB]}], name="rows.parquet")


@pytest.mark.parametrize(("name", "content"), [("no.jsonl", None), ("x.parquet", b"x")])
def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, tiny_student: Path, name: str, content: bytes | None
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(PromptError, match=name):
        import_rollouts(
            cache_in(tmp_path), tmp_path / name, tiny_student, tmp_path / "out", Silent()
        )


def test_a_file_without_rows_is_refused(take: Import) -> None:
    with pytest.raises(PromptError, match="no rollouts"):
        take([])


def test_the_same_file_makes_nothing_the_second_time(take: Import, tmp_path: Path) -> None:
    assert take(ROWS).num_made == 1
    before = {p: p.read_bytes() for p in (tmp_path / "cache").rglob("*") if p.is_file()}
    round_file = (tmp_path / "out" / "rounds" / "000" / "rollout.json").read_bytes()
    again = take(ROWS)
    assert (again.num_made, again.num_shards) == (0, 1)
    assert {p: p.read_bytes() for p in before} == before
    assert (tmp_path / "out" / "rounds" / "000" / "rollout.json").read_bytes() == round_file


def test_a_folder_of_other_rollouts_is_refused_before_anything_is_stored(
    take: Import, tmp_path: Path
) -> None:
    take(ROWS)
    with pytest.raises(UsageError, match=r"other rollouts.*give another folder"):
        take(PLAIN)
    assert len(listed(cache_in(tmp_path))) == 1


@pytest.mark.parametrize(
    ("change", "same_content"),
    [
        ({"loss_mask": [1, 1, 0]}, True),
        ({"loss_mask": None}, True),
        ({"behavior_logprobs": [-0.5, -1.5, -1]}, True),
        ({"sampling_logprobs": [-0.25, -3, -2]}, True),
        ({"answer": "43"}, True),
        ({"text": "other"}, True),
        ({"finish_reason": "length"}, True),
        ({"id": "second"}, True),
        ({"messages": [{"role": "user", "content": "7 + 6?"}]}, True),
        ({"messages": None}, True),
        ({"task": "other"}, True),
        ({"completion_token_ids": [71, 72, 1]}, False),
    ],
)
def test_whatever_a_row_says_is_part_of_the_key(
    take: Import, tmp_path: Path, change: dict[str, Any], same_content: bool
) -> None:
    row = GOOD | {"sampling_logprobs": [-0.25, -1, -2]}
    take([row])
    take([row | change], out="other")
    (one,), (other,) = manifests(tmp_path), manifests(tmp_path, "other")
    assert one.key != other.key
    assert (one.content == other.content) is same_content


def test_a_key_is_that_of_its_stored_preimage_and_names_the_student(
    take: Import, tmp_path: Path, tiny_student: Path
) -> None:
    take(ROWS)
    (manifest,) = manifests(tmp_path)
    identity = manifest.identity
    assert isinstance(identity, ImportIdentity)
    assert key_of(identity) == manifest.key
    assert identity.content == content_hash(cache_in(tmp_path).read_rollouts(manifest))
    fingerprint = model_fingerprint(tiny_student, FileHashes())
    assert identity.student == fingerprint
    assert RunFolder(tmp_path / "out").need(RolloutRound, 0).student == fingerprint


def scored(tmp_path: Path, manifest: RolloutManifest) -> None:
    """Scores of three tokens in the first of two completions, as ``ROWS`` has them."""
    columns = frozenset({"topk"})
    commit_scores(cache_in(tmp_path), manifest, "topk", scores=some_scores(columns))  # type: ignore[arg-type]


def test_an_imported_shard_is_kept_listed_verified_and_copied_like_any(
    take: Import, tmp_path: Path
) -> None:
    take(ROWS)
    (manifest,) = manifests(tmp_path)
    scored(tmp_path, manifest)
    cache, other = cache_in(tmp_path), Cache(str(tmp_path / "other"))
    assert verify(cache, deep=True) == []
    rows = [one.summary for one in listed(cache)]
    assert [(one.made_by, one.of, one.k) for one in rows if one.kind == "rollouts"] == [
        (manifest.identity.student, manifest.content, 0)
    ]
    assert [item.reason for item in garbage(cache, grace=NO_GRACE)] == ["no run uses it"]  # scores
    assert copy(cache, other).shards == 2
    assert verify(other, deep=True) == []
    assert garbage(other, grace=NO_GRACE) != []


def test_an_imported_shard_whose_columns_are_not_those_of_its_identity_is_found(
    take: Import, tmp_path: Path
) -> None:
    take(PLAIN)
    (manifest,) = manifests(tmp_path)
    cache = cache_in(tmp_path)
    table = cache.read_rollouts(manifest)
    masks = pa.array([[True, True, False]], pa.list_(pa.bool_()))
    attempt = cache.attempt(manifest.key)
    masked = table.append_column("loss_mask", masks)
    attempt.put(rollouts.FILE, rollouts.encode_rollouts(masked))
    changed = {"attempt": attempt.name, "objects": tuple(attempt.entries)}
    cache.objects.delete(f"commits/rollouts/{manifest.key}.json")
    assert cache.commit(attempt, manifest.model_copy(update=changed))
    assert verify(cache) == []
    (problem,) = verify(cache, deep=True)
    assert "columns are not those of its identity" in problem.reason


def test_scores_serve_another_mask_of_the_same_tokens_when_the_first_is_gone(
    take: Import, tmp_path: Path
) -> None:
    take(ROWS)
    take([ROWS[0] | {"loss_mask": [0, 0, 1]}, ROWS[1]], out="other")
    (one,), (two,) = manifests(tmp_path), manifests(tmp_path, "other")
    scored(tmp_path, one)
    cache = cache_in(tmp_path)
    cache.objects.delete(f"commits/rollouts/{one.key}.json")
    assert verify(cache, deep=True) == []
    samples = opdcache.open_cache(tmp_path / "cache").scored_by(TEACHER)
    assert [sample.loss_mask.tolist() for sample in samples] == [[False, False, True], []]
    done = copy(cache, Cache(str(tmp_path / "copy")))
    assert (done.shards, done.left_behind) == (2, {})
    assert two.content == one.content


def test_an_export_has_the_mask_and_no_log_probs_that_nobody_gave(
    take: Import, tmp_path: Path
) -> None:
    bare = [{k: v for k, v in row.items() if not k.endswith("logprobs")} for row in ROWS]
    take(bare)
    (manifest,) = manifests(tmp_path)
    scored(tmp_path, manifest)
    cache = cache_in(tmp_path)
    export.export(cache, export.of_cache(cache)[0], tmp_path / "tables")
    table = pq.read_table(tmp_path / "tables" / "part-00000.parquet")
    assert table.column("loss_mask").to_pylist() == [[True, False, True], []]
    assert {"behavior_logprobs", "sampling_logprobs"} & set(table.column_names) == set()


def test_a_sample_without_log_probs_says_none(take: Import, tmp_path: Path) -> None:
    bare = [{k: v for k, v in row.items() if not k.endswith("logprobs")} for row in ROWS]
    take(bare)
    scored(tmp_path, manifests(tmp_path)[0])
    sample = opdcache.open_cache(tmp_path / "cache").scored_by(TEACHER)[0]
    assert sample.behavior_logprobs is sample.sampling_logprobs is None
    assert "sampling_logprobs" not in as_tensors(sample)


def test_a_log_prob_that_is_missing_where_a_token_is_supervised_is_found(
    take: Import, tmp_path: Path
) -> None:
    take(ROWS)
    (manifest,) = manifests(tmp_path)
    cache = cache_in(tmp_path)
    table = cache.read_rollouts(manifest)
    place = table.column_names.index("sampling_logprobs")
    field = table.schema.field(place)
    values = pa.array([np.array([np.nan, -1, -1], np.float32), []], field.type)
    attempt = cache.attempt(manifest.key)
    attempt.put(rollouts.FILE, rollouts.encode_rollouts(table.set_column(place, field, values)))
    changed = {"attempt": attempt.name, "objects": tuple(attempt.entries)}
    cache.objects.delete(f"commits/rollouts/{manifest.key}.json")
    assert cache.commit(attempt, manifest.model_copy(update=changed))
    (problem,) = verify(cache, deep=True)
    assert "above 0 or not finite" in problem.reason


def test_the_command_imports_says_so_and_says_when_there_is_nothing_new(
    tmp_path: Path,
    tiny_student: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, out = write(tmp_path / "rows.jsonl", ROWS), tmp_path / "out"
    command = ["opdcache", "cache", "import", str(tmp_path / "cache"), str(file)]
    monkeypatch.setattr("sys.argv", [*command, "--student", str(tiny_student), "--out", str(out)])
    for expected in ("1 shards made", "nothing made"):
        with pytest.raises(SystemExit) as left:
            main()
        said = capsys.readouterr().out
        assert left.value.code == 0
        assert "2 rollouts in 1 shards, 3 tokens, 2 of them supervised" in said
        assert "1 truncated, 0 repetitive" in said
        assert expected in said
