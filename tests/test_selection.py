"""Prompts chosen by what is cached of them, held against a plain loop over the samples."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from opdcache import apart
from opdcache.cli.main import cli
from opdcache.data import Sample, open_cache
from opdcache.errors import InputsMissing, ModelError, NotInstalled, PromptError, UsageError
from opdcache.prompts import PromptSet, load_prompts, scheduled
from opdcache.schemas.prompts import JsonlSource, PromptsConfig
from opdcache.schemas.selection import Selection
from opdcache.selection import Choice, select
from opdcache.store import rollouts
from opdcache.store.scores import Scores

from .audited import Made, add_round, make_run
from .conftest import make_tiny_model
from .dense import Distributions, distributions, scores_of, top

TEXTS = ("what is two and two", "name a river", "spell rhythm", "who was Ada", "count to five")
LENGTHS = (3, 5, 2, 4, 6, 3, 1, 7, 2, 4)


def rows(
    given: Distributions,
    texts: Sequence[str | None] = TEXTS,
    *,
    recorded: int = 16,
    masked: bool = False,
) -> Any:
    """Completions of prompts in turn: each text has as many as fit; None has no recorded chat."""
    ids, values = top(given.p, recorded)
    behavior, random = given.at(given.p).astype(np.float32), np.random.default_rng(5)
    made = []
    for i, (start, stop) in enumerate(zip(given.offsets[:-1], given.offsets[1:], strict=True)):
        text, part = texts[i % len(texts)], slice(int(start), int(stop))
        made.append(
            rollouts.Completion(
                prompt_id=f"p{i % len(texts)}",
                sample_index=i // len(texts),
                prompt_token_ids=[1, i % len(texts)],
                completion_token_ids=given.ids[part].tolist(),
                behavior_logprobs=behavior[part],
                sampling_logprobs=behavior[part],
                topk_ids=ids[part],
                topk_logprobs=values[part],
                finish_reason="stop",
                text="",
                task="maths",
                answer=f"answer {i % len(texts)}",
                messages=None if text is None else (("system", "be brief"), ("user", text)),
                loss_mask=random.random(stop - start) < 0.7 if masked else None,
            )
        )
    return rollouts.rollout_table(made)


@pytest.fixture
def run(tmp_path: Path) -> Made:
    """Two rounds of five prompts, two completions each; not every token is supervised."""
    made = make_run(tmp_path)
    for index in range(2):
        given = distributions(*LENGTHS, seed=index)
        add_round(made, index, [given], tables=[rows(given, masked=True)])
    return made


def of(made: Made, **choice: Any) -> tuple[Selection, list[dict[str, Any]]]:
    """What is said of a choice, and the rows that are written."""
    file = made.path.with_name("chosen.jsonl")
    file.unlink(missing_ok=True)
    rounds = choice.pop("rounds", ())
    said = select(made.path, file, Choice(**choice), rounds)
    return said, [json.loads(line) for line in file.read_text().splitlines()]


def asked(row: dict[str, Any]) -> str:
    return str(row["messages"][-1]["content"])


def by_a_loop(made: Made, rounds: Sequence[int] | None = None) -> dict[str, tuple[float, float]]:
    """Likelihood and overlap of every text, token by token."""
    tokens: dict[str, list[tuple[float, float]]] = {}
    for sample in open_cache(made.cache.objects.url).of_run(made.folder.path, rounds):
        text = json.loads(sample.messages or "")[-1][1]
        tokens.setdefault(text, []).extend(
            token(sample, t) for t in range(len(sample.loss_mask)) if sample.loss_mask[t]
        )
    return {
        text: (sum(a for a, _ in of) / len(of), sum(b for _, b in of) / len(of))
        for text, of in tokens.items()
    }


def token(sample: Sample, t: int) -> tuple[float, float]:
    scores = sample.scores
    assert scores.topk is not None
    assert scores.sampled_logprobs is not None
    assert sample.student_topk_ids is not None
    k = min(sample.student_topk_ids.shape[1], int(scores.topk.num_kept[t]))
    ours, theirs = sample.student_topk_ids[t, :k].tolist(), scores.topk.ids[t, :k].tolist()
    return float(scores.sampled_logprobs[t]), len(set(ours) & set(theirs)) / k


def written(folder: Path, name: str, *texts: str, **fields: str) -> Path:
    file = folder / name
    file.write_text("".join(json.dumps({"prompt": text, **fields}) + "\n" for text in texts))
    return file


@pytest.mark.parametrize("rounds", [(), (1,)])
def test_both_values_are_means_over_the_supervised_tokens_of_the_rounds(
    run: Made, rounds: tuple[int, ...]
) -> None:
    said, chosen = of(run, keep=1.0, rounds=rounds)

    expected = by_a_loop(run, rounds or None)
    assert {asked(row) for row in chosen} == set(TEXTS)
    for row in chosen:
        told = (row["likelihood"], row["overlap"])
        assert told == pytest.approx(expected[asked(row)], rel=1e-9)
    assert (said.num_prompts, said.num_kept, said.left_out) == (5, 5, {})
    assert said.rounds == (rounds or (0, 1))


def test_the_overlap_is_taken_of_as_many_entries_as_both_have(tmp_path: Path) -> None:
    made, given = make_run(tmp_path), distributions(*LENGTHS)
    whole = scores_of(given.q, given, 16, 5)
    assert whole.topk is not None
    assert whole.student_topk is not None
    few = whole.topk.cut(16, mass=0.6)
    assert 1 <= few.num_kept.min() < 5 < few.num_kept.max()
    kept = Scores(given.offsets, whole.sampled_logprobs, whole.entropy, few, whole.student_topk)
    add_round(made, 0, [given], scores=[kept], tables=[rows(given, recorded=5)])

    for row in of(made, keep=1.0, by="overlap")[1]:
        assert row["overlap"] == pytest.approx(by_a_loop(made)[asked(row)][1], rel=1e-9)


@pytest.mark.parametrize(("by", "place"), [("likelihood", 0), ("overlap", 1)])
@pytest.mark.parametrize(("keep", "num"), [(0.0, 1), (0.2, 1), (0.5, 3), (0.6, 3), (0.61, 4)])
def test_the_best_share_is_kept_rounded_up(
    run: Made, by: str, place: int, keep: float, num: int
) -> None:
    said, chosen = of(run, by=by, keep=keep)

    values = by_a_loop(run)
    best = sorted(values, key=lambda text: -values[text][place])[:num]
    assert {asked(row) for row in chosen} == set(best)
    told = said.likelihood if by == "likelihood" else said.overlap
    assert told is not None
    assert told.least == pytest.approx(values[best[-1]][place])
    assert told.most == pytest.approx(values[best[0]][place])
    assert said.left_out == {f"not in the best {keep:g} by {by}": 5 - num}


def test_equal_prompts_are_chosen_alike_whatever_their_order(tmp_path: Path) -> None:
    kept = []
    for name, texts in (("one", TEXTS), ("other", TEXTS[::-1])):
        folder = tmp_path / name
        folder.mkdir()
        made, given = make_run(folder), distributions(2, 2, 2, 2, 2)
        same = scores_of(given.q, given, 16, 16)
        flat = np.full(10, -1, np.float32)
        same = Scores(given.offsets, flat, same.entropy, same.topk, same.student_topk)
        table = rows(given, texts)
        table = table.set_column(
            table.schema.get_field_index("answer"), "answer", [["same"] * len(texts)]
        )
        add_round(made, 0, [given], scores=[same], tables=[table.cast(rows(given, texts).schema)])
        kept.append({asked(row) for row in of(made, keep=0.4)[1]})

    assert len(kept[0]) == 2
    assert kept[0] == kept[1]


def test_what_is_written_is_a_source_of_the_same_prompts(run: Made) -> None:
    _, chosen = of(run, keep=1.0)

    file = run.path.with_name("chosen.jsonl")
    prompts = load_prompts(JsonlSource(type="jsonl", path=str(file)))
    assert prompts.dropped == {}
    assert [p.prompt_id for p in prompts.prompts] == [row["id"] for row in chosen]
    for prompt in prompts.prompts:
        number = TEXTS.index(prompt.messages[-1][1])
        assert prompt.messages[0] == ("system", "be brief")
        assert (prompt.prompt_id, prompt.task) == (f"p{number}", "maths")
        assert prompt.answer == f"answer {number}"


def test_copies_are_left_out_and_counted_by_the_file_that_has_them(
    run: Made, tmp_path: Path
) -> None:
    first, second = (
        written(tmp_path, "first.jsonl", TEXTS[0], "something else"),
        written(tmp_path, "second.jsonl", TEXTS[0], TEXTS[3]),
    )

    said, chosen = of(run, keep=1.0, apart_from=(first, second))

    assert {asked(row) for row in chosen} == {TEXTS[1], TEXTS[2], TEXTS[4]}
    assert said.left_out == {f"also in {first}": 1, f"also in {second}": 1}


def test_a_run_file_stands_for_its_training_and_its_evaluation_prompts(
    run: Made, tmp_path: Path
) -> None:
    sources = {
        name: {"type": "jsonl", "path": str(written(tmp_path, f"{name}.jsonl", text))}
        for name, text in (("theirs", TEXTS[1]), ("held-out", TEXTS[2]))
    }
    other = make_run(
        tmp_path,
        "another",
        prompts={"source": sources["theirs"]},
        evaluation={"source": sources["held-out"]},
    )

    said, chosen = of(run, keep=1.0, apart_from=(other.path,))

    assert {asked(row) for row in chosen} == {TEXTS[0], TEXTS[3], TEXTS[4]}
    assert said.left_out == {f"also in {other.path}": 2}


def test_a_run_file_that_takes_rollouts_stands_for_their_prompts(run: Made, tmp_path: Path) -> None:
    theirs, given = make_run(tmp_path, "theirs"), distributions(2, 3)
    add_round(theirs, 0, [given], tables=[rows(given, (TEXTS[1], TEXTS[4]))])
    placeholder = {"type": "jsonl", "path": str(written(tmp_path, "p.jsonl", TEXTS[0]))}
    taking = make_run(
        tmp_path,
        "taking",
        rounds=1,
        prompts={"source": placeholder},
        rollouts={"from": str(theirs.folder.path)},
    )

    said, chosen = of(run, keep=1.0, apart_from=(taking.path,))

    assert {asked(row) for row in chosen} == {TEXTS[0], TEXTS[2], TEXTS[3]}
    assert said.left_out == {f"also in {taking.path}": 2}


def test_rollouts_without_texts_cannot_be_kept_apart_from(run: Made, tmp_path: Path) -> None:
    theirs, given = make_run(tmp_path, "theirs"), distributions(2)
    add_round(theirs, 0, [given], tables=[rows(given, (None,))])
    taking = make_run(tmp_path, "taking", rounds=1, rollouts={"from": str(theirs.folder.path)})

    with pytest.raises(PromptError, match=r"texts are not recorded.*name the file"):
        of(run, apart_from=(taking.path,))


def test_others_are_added_as_a_task_of_their_own(run: Made, tmp_path: Path) -> None:
    other = written(tmp_path, "other.jsonl", "far away", "farther", TEXTS[0], "far away", task="x")
    apart_from = written(tmp_path, "evaluation.jsonl", "farther")

    said, chosen = of(
        run, keep=1.0, task="aligned", other=other, other_task="far", apart_from=(apart_from,)
    )

    assert said.tasks == {"aligned": 5, "far": 1}
    assert (said.num_kept, said.num_other) == (5, 1)
    assert said.other_left_out == {
        "copy of another prompt": 1,
        "copy of a written prompt": 1,
        f"also in {apart_from}": 1,
    }
    assert chosen[-1]["likelihood"] is chosen[-1]["overlap"] is None
    assert asked(chosen[-1]) == "far away"


def test_shares_of_a_run_file_mix_what_was_written(run: Made, tmp_path: Path) -> None:
    other = written(tmp_path, "other.jsonl", *(f"far {i}" for i in range(9)))
    of(run, keep=1.0, task="aligned", other=other)

    source = {"type": "jsonl", "path": str(run.path.with_name("chosen.jsonl"))}
    config = PromptsConfig.model_validate(
        {"source": source, "per_round": 5, "shares": {"aligned": 4, "other": 1}}
    )
    prompts: PromptSet = load_prompts(config.source)
    tasks = [p.task for p in scheduled(prompts.prompts, config, 0, 0)]
    assert sorted(tasks) == ["aligned"] * 4 + ["other"]


def test_an_id_that_two_prompts_have_is_made_anew_and_counted(run: Made, tmp_path: Path) -> None:
    other = written(tmp_path, "other.jsonl", "far away", id="p0")

    said, chosen = of(run, keep=1.0, other=other)

    assert said.num_new_ids == 1
    assert len({row["id"] for row in chosen}) == 6
    assert len(load_prompts(apart.file_source(run.path.with_name("chosen.jsonl"))).prompts) == 6


def test_others_that_would_share_a_task_with_the_chosen_are_refused(
    run: Made, tmp_path: Path
) -> None:
    other = written(tmp_path, "other.jsonl", "far away")

    with pytest.raises(UsageError, match=r"chosen prompts have the task 'maths' too; give another"):
        of(run, other=other, other_task="maths")
    assert not list(tmp_path.glob("*chosen*"))


def test_prompts_whose_chat_is_not_recorded_are_counted(tmp_path: Path) -> None:
    made, given = make_run(tmp_path), distributions(2, 3, 4, 2)
    add_round(made, 0, [given], tables=[rows(given, (TEXTS[0], None))])

    said, chosen = of(made, keep=1.0)

    assert [asked(row) for row in chosen] == [TEXTS[0]]
    assert said.left_out == {"chat not recorded": 1}


def test_nothing_that_can_be_kept_is_an_error_that_says_why(tmp_path: Path) -> None:
    made, given = make_run(tmp_path), distributions(2, 3)
    add_round(made, 0, [given], tables=[rows(given, (None,))])

    with pytest.raises(PromptError, match=r"no prompt is left \(got \{'chat not recorded': 1\}\)"):
        of(made)


def test_a_run_without_a_scored_round_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputsMissing, match="no scored round yet"):
        of(make_run(tmp_path))


@pytest.mark.parametrize(
    ("by", "other", "needs"),
    [("likelihood", "overlap", "'sampled'"), ("overlap", "likelihood", "'topk'")],
)
def test_what_no_round_stores_is_named(tmp_path: Path, by: str, other: str, needs: str) -> None:
    made, given = make_run(tmp_path), distributions(2, 3)
    every = scores_of(given.q, given, 16, 16)
    topk, sampled = (every.topk, None) if by == "likelihood" else (None, every.sampled_logprobs)
    held = Scores(given.offsets, sampled, every.entropy, topk, every.student_topk)
    add_round(made, 0, [given], scores=[held], tables=[rows(given, TEXTS[:1])])

    with pytest.raises(UsageError, match=f"no {by} is told by what these rounds store .*{needs}"):
        of(made, by=by)
    said, (row,) = of(made, by=other)
    assert row[by] is None
    assert getattr(said, by) is None


def test_a_file_that_is_there_is_left_as_it_is(run: Made, tmp_path: Path) -> None:
    file = written(tmp_path, "mine.jsonl", "precious")
    before = file.read_text()

    with pytest.raises(UsageError, match=r"mine\.jsonl: is there already"):
        select(run.path, file, Choice())
    assert file.read_text() == before


def test_texts_are_near_when_any_cosine_is_at_least_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(apart, "BLOCK", 3)
    random = np.random.default_rng(0)
    ours, theirs = (random.normal(size=(n, 4)).astype(np.float32) for n in (20, 10))
    ours[7] = 2 * theirs[9]

    def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True).astype(np.float32)

    for limit in (0.5, 0.9, 1.0):
        near = apart.are_near(unit(ours), unit(theirs), limit)
        for i, one in enumerate(ours.astype(np.float64)):
            cosines = [
                float(one @ other) / float(np.linalg.norm(one) * np.linalg.norm(other))
                for other in theirs.astype(np.float64)
            ]
            assert near[i] == (max(cosines) >= limit - 1e-6)
    assert near.tolist() == [i == 7 for i in range(20)]


def test_an_embedder_that_is_no_folder_is_refused(run: Made, tmp_path: Path) -> None:
    evaluation = written(tmp_path, "evaluation.jsonl", "x")

    with pytest.raises(ModelError, match="gone: no such model folder"):
        of(run, apart_from=(evaluation,), embedder=tmp_path / "gone")


def test_a_library_that_is_not_there_is_named_with_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", None)

    with pytest.raises(NotInstalled, match=r"pip install 'opdcache\[embeddings\]'"):
        apart.Embedder(tmp_path)


def test_the_command_writes_the_file_and_says_what_it_did(run: Made, tmp_path: Path) -> None:
    file, evaluation = tmp_path / "a.jsonl", written(tmp_path, "evaluation.jsonl", TEXTS[0])
    other = written(tmp_path, "other.jsonl", "far away", "far away")
    options = ["--keep", "0.5", "--apart-from", str(evaluation), "--other", str(other)]

    done = CliRunner().invoke(
        cli, ["prompts", str(run.path), "--out", str(file), *options], catch_exceptions=False
    )

    assert done.exit_code == 0
    assert len(file.read_text().splitlines()) == 3
    lines = done.output.splitlines()
    assert lines[0].startswith("read: 20 completions of 5 prompts, ")
    assert lines[1] == "kept: 2 prompts, by likelihood"
    assert f"left out: 1 also in {evaluation}" in lines
    assert "left out: 2 not in the best 0.5 by likelihood" in lines
    assert "other, left out: 1 copy of another prompt" in lines
    assert lines[-1] == f"written: {file} (maths 2, other 1)"


def test_the_command_s_json_is_a_selection(run: Made, tmp_path: Path) -> None:
    arguments = ["prompts", str(run.path), "--out", str(tmp_path / "a.jsonl"), "--json"]

    done = CliRunner().invoke(cli, [*arguments, "--round", "1"], catch_exceptions=False)

    said = Selection.model_validate_json(done.output)
    assert (said.rounds, said.num_kept, said.num_completions) == ((1,), 3, 10)


def test_an_embedder_without_prompts_to_be_apart_from_is_refused(run: Made, tmp_path: Path) -> None:
    arguments = ["prompts", str(run.path), "--out", str(tmp_path / "a"), "--embedder", "model"]

    done = CliRunner().invoke(cli, arguments)

    assert done.exit_code == 2
    assert "--apart-from" in done.output


@pytest.mark.engine
def test_prompts_near_one_of_an_evaluation_are_left_out_by_a_real_embedding(
    run: Made, tmp_path: Path, tiny_tokenizer_folder: Path
) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = make_tiny_model(tmp_path / "embedder", tiny_tokenizer_folder, seed=7)
    model, tokenizer = (
        AutoModel.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )

    def vector(text: str) -> NDArray[np.float64]:
        with torch.no_grad():
            states = model(torch.tensor([tokenizer.encode(text)])).last_hidden_state[0]
        mean: NDArray[np.float64] = states.double().mean(dim=0).numpy()
        return mean / np.linalg.norm(mean)

    theirs = ("what is two and three", "whales sing")
    cosines = {text: max(float(vector(text) @ vector(one)) for one in theirs) for text in TEXTS}
    first, second = sorted(cosines.values())[1:3]
    limit = (first + second) / 2
    evaluation = written(tmp_path, "evaluation.jsonl", *theirs)

    said, chosen = of(run, keep=1.0, apart_from=(evaluation,), embedder=folder, cosine=limit)

    assert {asked(row) for row in chosen} == {text for text in TEXTS if cosines[text] < limit}
    assert said.left_out == {f"cosine of {limit:g} or more to one of them": 3}
