"""One completion token by token, against models that are known at every id."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opdcache.audit.blocks import blocks
from opdcache.audit.rows import Row, Texts, read_row, row_of
from opdcache.audit.targets import Shard, of_keys
from opdcache.errors import UsageError
from opdcache.identity import vocabulary_fingerprint
from opdcache.schemas.columns import ScoreColumn
from opdcache.store.cache import Cache

from . import two_models as dense
from .shards import STEP
from .two_models import Completion, completion

EVERY: tuple[ScoreColumn, ...] = ("sampled", "entropy", "topk", "student_topk")


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(str(tmp_path / "cache"))


@pytest.fixture
def completions() -> list[Completion]:
    rng = np.random.default_rng(1)
    return [
        completion("a", rng.integers(dense.V, size=5).tolist(), 2),
        completion("a", [], 3),
        completion("b", rng.integers(dense.V, size=9).tolist(), 4, masked=(2, 5), answer="7"),
    ]


def made(
    cache: Cache,
    completions: Sequence[Completion],
    *columns: ScoreColumn,
    recorded: bool = True,
    own: tuple[ScoreColumn, ...] = (),
) -> Shard:
    rollout = dense.commit(cache, completions, recorded=recorded)
    dense.score(cache, rollout, completions, *columns)
    if own:
        dense.score(cache, rollout, completions, *own, by_student=True)
    ((shard,),) = [part.shards for part in of_keys(cache, [rollout.key]).parts]
    return shard


def near(value: float | None) -> Any:
    """As near as a quantised log-prob is."""
    return None if value is None else pytest.approx(value, abs=0.02, rel=STEP)


def rows(cache: Cache, shard: Shard, k: int) -> list[Row]:
    return [
        read_row(cache, shard, row, Texts(), k=k) for row in range(shard.scored.rollouts.num_rows)
    ]


@pytest.mark.parametrize("k", [1, 4, 16])
def test_every_number_is_that_of_the_whole_distributions(
    cache: Cache, completions: list[Completion], k: int
) -> None:
    shard = made(cache, completions, *EVERY)

    place = 0
    for row, one in zip(rows(cache, shard, k), completions, strict=True):
        assert [token.id for token in row.tokens] == one.ids
        for t, token in enumerate(row.tokens):
            p, q = one.p_TV[t], one.q_TV[t]
            kept = dense.K - place % 4
            place += 1
            ours = one.largest(one.p_TV, min(k, dense.S))[t].tolist()
            theirs = one.largest(one.q_TV, min(k, kept))[t].tolist()
            least = min(k, dense.S, kept)
            both = set(ours[:least]) & set(theirs[:least])

            assert token.position == t
            assert token.student_logprob == pytest.approx(p[token.id], abs=1e-5)
            assert token.teacher_logprob == near(q[token.id])
            assert token.advantage == near(one.advantage(t))
            assert token.teacher_entropy == near(dense.entropy(one.q_TV)[t])
            assert token.student_entropy is None
            assert token.student_entropy_low is not None
            assert token.student_entropy_high is not None
            entropy = dense.entropy(one.p_TV)[t]
            assert token.student_entropy_low <= entropy + 1e-4
            assert token.student_entropy_high >= entropy - 1e-4
            assert token.overlap == pytest.approx(len(both) / least)
            assert token.mass_student == near(float(np.exp(p[list(both)]).sum()))
            assert token.mass_teacher == near(float(np.exp(q[list(both)]).sum()))
            assert [entry.id for entry in token.student] == ours
            assert [entry.id for entry in token.teacher] == theirs
            assert token.student_tail == near(1 - float(np.exp(p[ours]).sum()))
            assert token.teacher_tail == near(1 - float(np.exp(q[theirs]).sum()))
            for entry in (*token.student, *token.teacher):
                assert entry.shared == (entry.id in both)
                if entry.student_logprob is not None:
                    assert entry.student_logprob == pytest.approx(p[entry.id], abs=1e-5)
                if entry.teacher_logprob is not None:
                    assert entry.teacher_logprob == near(q[entry.id])


def test_the_teacher_s_log_prob_of_every_recorded_id_is_there_where_it_was_asked_for(
    cache: Cache, completions: list[Completion]
) -> None:
    shard = made(cache, completions, *EVERY)

    entries = [e for row in rows(cache, shard, 16) for token in row.tokens for e in token.student]

    assert entries
    assert all(entry.teacher_logprob is not None for entry in entries)


def test_what_is_not_stored_of_the_other_model_is_none(
    cache: Cache, completions: list[Completion]
) -> None:
    shard = made(cache, completions, "sampled", "entropy", "topk")
    without, place = 0, 0

    for row, one in zip(rows(cache, shard, 4), completions, strict=True):
        for t, token in enumerate(row.tokens):
            stored = {token.id, *one.largest(one.q_TV, dense.K - place % 4)[t].tolist()}
            recorded = {token.id, *one.largest(one.p_TV, dense.S)[t].tolist()}
            place += 1
            for entry in token.student:
                assert (entry.teacher_logprob is not None) == (entry.id in stored)
            for entry in token.teacher:
                assert (entry.student_logprob is not None) == (entry.id in recorded)
                without += entry.student_logprob is None
    assert without


def test_the_policy_s_own_scores_give_its_entropy_and_more_of_its_log_probs(
    cache: Cache, completions: list[Completion]
) -> None:
    shard = made(cache, completions, *EVERY, own=("entropy", "topk", "sampled"))
    place, beyond = 0, 0

    for row, one in zip(rows(cache, shard, 9), completions, strict=True):
        for t, token in enumerate(row.tokens):
            assert token.student_entropy == near(dense.entropy(one.p_TV)[t])
            known = set(one.largest(one.p_TV, max(dense.S, dense.K - place % 4))[t].tolist())
            place += 1
            for entry in token.teacher:
                if entry.id in known | {token.id}:
                    assert entry.student_logprob == near(one.p_TV[t, entry.id])
                    beyond += entry.id not in one.largest(one.p_TV, dense.S)[t]
                else:
                    assert entry.student_logprob is None
    assert beyond


def test_without_recorded_entries_those_of_the_policy_s_own_scores_are_shown(
    cache: Cache, completions: list[Completion]
) -> None:
    own: tuple[ScoreColumn, ...] = ("entropy", "topk", "sampled")
    shard = made(cache, completions, "sampled", "topk", recorded=False, own=own)

    token, one = rows(cache, shard, 3)[0].tokens[0], completions[0]

    ours = one.largest(one.p_TV, 3)[0].tolist()
    assert [(e.id, e.student_logprob) for e in token.student] == [
        (id, near(one.p_TV[0, id])) for id in ours
    ]


def test_the_reward_is_the_mean_advantage_of_supervised_tokens(
    cache: Cache, completions: list[Completion]
) -> None:
    first, empty, last = rows(cache, made(cache, completions, *EVERY), 4)

    one = completions[2]
    kept = [t for t in range(9) if t not in (2, 5)]
    assert [token.position for token in last.tokens if token.supervised] == kept
    assert last.reward == near(float(np.mean([one.advantage(t) for t in kept])))
    assert first.reward == near(float(np.mean([completions[0].advantage(t) for t in range(5)])))
    assert (empty.reward, empty.tokens) == (None, ())


def test_a_score_set_of_few_columns_leaves_the_rest_none(
    cache: Cache, completions: list[Completion]
) -> None:
    token = rows(cache, made(cache, completions, "sampled", recorded=False), 4)[0].tokens[0]

    assert token.advantage == near(completions[0].advantage(0))
    assert (token.student, token.teacher) == ((), ())
    nothing = {
        *(token.overlap, token.mass_student, token.mass_teacher, token.teacher_entropy),
        *(token.student_entropy, token.student_entropy_low, token.student_entropy_high),
        *(token.student_tail, token.teacher_tail),
    }
    assert nothing == {None}


def test_a_row_says_what_its_completion_is(cache: Cache, completions: list[Completion]) -> None:
    shard = made(cache, completions, "sampled")

    row = rows(cache, shard, 4)[2]

    assert (row.shard, row.row, row.rollout_id) == (shard.name, 2, "b/2")
    assert (row.task, row.answer, row.finish_reason) == ("t", "7", "stop")


def test_a_row_of_a_later_block_is_the_row_of_the_shard(
    cache: Cache, completions: list[Completion], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = rows(cache, made(cache, completions, *EVERY), 4)
    monkeypatch.setattr("opdcache.store.rollouts.GROUP_TOKENS", 1)
    monkeypatch.setattr("opdcache.store.files.BLOCK_BYTES", 64)
    parted = Cache(str(Path(cache.objects.url) / "parted"))
    shard = made(parted, completions, *EVERY)

    assert len(list(blocks(parted, shard))) == len(completions)
    assert rows(parted, shard, 4) == whole


@pytest.mark.parametrize("row", [3, -1, 900])
def test_a_row_that_is_not_there_is_named_with_those_that_are(
    cache: Cache, completions: list[Completion], row: int
) -> None:
    shard = made(cache, completions, "sampled")
    (block,) = blocks(cache, shard)

    for read in (
        lambda: read_row(cache, shard, row, Texts(), k=1),
        lambda: row_of(block, row, Texts(), k=1),
    ):
        with pytest.raises(UsageError, match=f"no row {row} .expected 0 to 2"):
            read()


def test_texts_of_bytes_are_characters_or_the_bytes(tmp_path: Path) -> None:
    texts = Texts(dense.byte_tokenizer(tmp_path))

    assert texts.token(ord("a")) == "a"
    assert texts.token(ord(" ")) == " "
    assert texts.token(0x1B) == "\x1b"
    assert texts.token(0xE6) == "\\xe6"
    assert texts.text(list("tö 🙂".encode())) == "tö 🙂"
    assert texts.token(300) == "<300>"


def test_texts_of_a_vocabulary_with_word_starts_and_byte_fallback(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models

    pieces = ["▁a", "<0xF0>", "b", "�", "<0xzz>"]
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], byte_fallback=True))
    steps = (decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse())
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    texts = Texts(tmp_path / "tokenizer.json")

    assert [texts.token(id) for id in range(5)] == [" a", "\\xf0", "b", "�", "<0xzz>"]


def test_without_a_tokenizer_ids_stand_for_themselves_and_the_chat_for_the_prompt(
    cache: Cache,
) -> None:
    chat = completion("a", [5], 0, messages=(("user", "Hi\nthere"),))
    shard = made(cache, [chat, completion("b", [6], 0)], "sampled")

    with_chat, without = rows(cache, shard, 1)

    assert with_chat.prompt == "user: Hi\nthere"
    assert without.prompt == "<72><105><10>"
    assert without.tokens[0].text == "<6>"


def test_with_a_tokenizer_the_prompt_is_the_text_of_its_ids(cache: Cache, tmp_path: Path) -> None:
    chat = completion("a", [5], 0, messages=(("user", "Hi"),))
    shard = made(cache, [chat], "sampled")

    row = read_row(cache, shard, 0, Texts(dense.byte_tokenizer(tmp_path)), k=1)

    assert row.prompt == "Hi\n"


def test_texts_tell_another_vocabulary(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    file = dense.byte_tokenizer(tmp_path)
    vocabulary = Tokenizer.from_file(str(file)).get_vocab()

    assert Texts(file).are_of(vocabulary_fingerprint(vocabulary))
    assert not Texts(file).are_of(vocabulary_fingerprint({**vocabulary, "new": 256}))


@pytest.mark.parametrize(
    ("content", "words"), [(None, "no such file"), ("{}", "not a tokenizer"), ("[", "not a")]
)
def test_a_file_that_is_no_tokenizer_is_refused(
    tmp_path: Path, content: str | None, words: str
) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)

    with pytest.raises(UsageError, match=words):
        Texts(tmp_path / "tokenizer.json")
