"""What an audit must not call a fault, and what it must not pass over: edges of the checks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opdcache.audit.run import audit
from opdcache.audit.targets import of_run, target
from opdcache.errors import UsageError
from opdcache.schemas.audit import Audit
from opdcache.schemas.rounds import RolloutRound, ScoreRound, ServedColumns
from opdcache.store.cache import data_prefix
from opdcache.store.scores import Scores, StudentTopK

from . import shards
from .audited import RECORDED, Made, add_own, add_round, make_run
from .dense import Distributions, distributions, entropy, rows_of, scores_of
from .test_audit import LENGTHS, cli_audit, names


@pytest.fixture
def run(tmp_path: Path) -> Made:
    return make_run(tmp_path)


def noisy(given: Distributions, nats: float) -> Distributions:
    """The same teacher, as another engine computes it."""
    logits = given.q + nats * np.random.default_rng(1).normal(size=given.q.shape)
    return replace(given, q=logits - np.logaddexp.reduce(logits, axis=1)[:, None])


def only(scores: Scores, *columns: str) -> Scores:
    """Some columns of scores."""
    kept = {"sampled": "sampled_logprobs"}
    held = {kept.get(c, c) for c in columns}
    fields = ("sampled_logprobs", "entropy", "topk", "student_topk")
    return replace(scores, **{name: None for name in fields if name not in held})


def test_a_stray_special_token_is_a_warning_and_no_no_go(run: Made) -> None:
    one = distributions(40)
    ids, q = one.ids.copy(), one.q.copy()
    ids[7], q[7, 59] = 59, -30
    strange = replace(one, ids=ids, q=q)
    add_round(run, 0, [strange], [scores_of(q, strange, 16, 16)])
    found = audit(replace(of_run(run.path), special={59: "<repo>"}))
    assert "special tokens" in names(found, "warning")
    assert "special tokens" not in names(found)


@pytest.mark.parametrize(
    "columns", [("sampled", "student_topk"), ("sampled", "topk", "student_topk")]
)
def test_shifted_scores_of_recorded_ids_are_found_by_name(
    run: Made, columns: tuple[str, ...]
) -> None:
    one = distributions(*LENGTHS, apart=0.5)
    scores = only(scores_of(one.q, one, 16, 16), *columns)
    assert scores.student_topk is not None
    parts = (getattr(scores.student_topk, name) for name in StudentTopK.__slots__)
    moved = StudentTopK(*(np.roll(values, -1, axis=0) for values in parts))
    add_round(run, 0, [one], [replace(scores, student_topk=moved)])
    assert names(audit(of_run(run.path))) == {"alignment"}


def test_recorded_entries_of_other_tokens_are_found_by_name(run: Made) -> None:
    one = distributions(*LENGTHS, apart=0.5)
    table, other = (rows_of(each, 16) for each in (one, replace(one, p=np.roll(one.p, -1, axis=0))))
    for name in ("student_topk_ids", "student_topk_logprobs"):
        place = table.column_names.index(name)
        table = table.set_column(place, table.schema.field(place), other.column(name))
    scores = only(scores_of(one.q, one, 16), "sampled", "topk")
    add_round(run, 0, [one], [scores], [table])
    finding, *_ = (f for f in audit(of_run(run.path)).findings if f.check == "alignment")
    assert finding.reason.startswith("the rollouts' sampled log-probs")
    assert "the top-k entries are shifted by +1 token" in finding.reason


@pytest.mark.parametrize("spoil", [lambda h: 0 * h, lambda h: np.roll(h, 3), lambda h: h + 3])
def test_an_entropy_that_the_entries_do_not_allow_is_found_by_name(run: Made, spoil: Any) -> None:
    one = distributions(*LENGTHS, *LENGTHS, apart=2)
    peaked = replace(one, q=_sharpened(one.q))
    scores = scores_of(peaked.q, peaked, 16, 16)
    add_round(run, 0, [peaked], [replace(scores, entropy=spoil(scores.entropy))])
    assert "entropy" in names(audit(of_run(run.path)))


def _sharpened(q: np.ndarray) -> np.ndarray:
    """Every second distribution, so that neighbours' entropies differ."""
    logits = q * np.where(np.arange(len(q)) % 2, 1.0, 4.0)[:, None]
    return np.asarray(logits - np.logaddexp.reduce(logits, axis=1)[:, None])


def test_sound_entropies_are_no_fault_however_few_entries_are_stored(run: Made) -> None:
    one = distributions(*LENGTHS, apart=2)
    peaked = replace(one, q=_sharpened(one.q))
    add_round(run, 0, [peaked], [scores_of(peaked.q, peaked, k, 16) for k in (1,)])
    assert "entropy" not in names(audit(of_run(run.path)))


def test_two_scorings_of_one_teacher_are_not_held_against_each_other(run: Made) -> None:
    """Sampled log-probs of one engine, entries and entropies of another."""
    one = distributions(*LENGTHS, apart=0.5)
    ((rollout, scored),) = add_round(run, 0, [one], [only(scores_of(one.q, one, 16), "topk")])
    again = only(scores_of(noisy(one, 1.0).q, one, 16), "sampled", "entropy")
    other = shards.commit_scores(
        run.cache, rollout, "entropy", "sampled", scores=again, k=16, dtype="bfloat16"
    )
    file = run.folder.need(ScoreRound, 0)
    served = (
        ServedColumns(key=scored.key, columns=("topk",)),
        ServedColumns(key=other.key, columns=("entropy", "sampled")),
    )
    both = tuple(s.model_copy(update={"served": served}) for s in file.shards)
    run.folder.write(file.model_copy(update={"shards": both}), anew=True)
    assert names(audit(of_run(run.path))) == set()


def test_entries_of_the_policy_s_own_scores_are_not_held_against_the_engine_s(run: Made) -> None:
    one = distributions(*LENGTHS, apart=0.5)
    table = rows_of(one, 0)
    add_round(run, 0, [one], [scores_of(one.q, one, 16)], [table])
    other = replace(one, p=noisy(replace(one, q=one.p), 0.1).q)
    add_own(run, 0, [other])
    found = audit(of_run(run.path))
    assert found.total.overlap is not None
    assert names(found) == set()


def test_zeros_that_only_the_student_doubts_are_a_warning(run: Made) -> None:
    one = distributions(*LENGTHS)
    scores = only(scores_of(one.q, one, 16), "sampled")
    assert scores.sampled_logprobs is not None
    scores.sampled_logprobs[20:30] = 0
    add_round(run, 0, [one], [scores])
    found = audit(of_run(run.path))
    assert "missing scores" in names(found, "warning")
    assert found.is_go


def test_the_captured_mass_is_that_of_all_stored_entries(run: Made) -> None:
    """Where the student recorded more entries than the teacher's scores keep."""
    one = distributions(*LENGTHS)
    add_round(run, 0, [one], [scores_of(one.q, one, 2, 16)])
    found = audit(of_run(run.path))
    exact = np.sort(np.exp(one.q), axis=1)[:, -2:].sum(axis=1).mean()
    assert found.total.captured_mass == pytest.approx(exact, abs=1e-3)
    assert "captured mass" in names(found, "warning")


def test_what_cannot_be_judged_is_said(run: Made) -> None:
    one = distributions(*LENGTHS)
    add_round(run, 0, [one], [only(scores_of(one.q, one, 16), "sampled")])
    found = audit(of_run(run.path))
    assert [what.split(" (")[0] for what in found.not_judged] == [
        "captured mass",
        "overlap, overlap mass, empty intersections",
        "entropy gap",
        "special tokens",
    ]
    assert "not judged: captured mass" in cli_audit(run.path).stdout


def test_nothing_read_is_no_go(run: Made) -> None:
    add_round(run, 0, [])
    assert names(audit(of_run(run.path))) == {"no tokens"}


def test_an_entropy_that_is_known_of_some_shards_alone_is_not_told_for_all(run: Made) -> None:
    given = [distributions(*LENGTHS, seed=i) for i in range(3)]
    add_round(run, 0, given)
    add_own(run, 0, given, every=3)
    (part,) = audit(of_run(run.path)).parts
    assert part.num_own == 1
    assert part.diagnostics.student_entropy is part.diagnostics.entropy_gap is None
    low, high = part.diagnostics.student_entropy_low, part.diagnostics.student_entropy_high
    assert low is not None
    assert high is not None
    assert low < np.mean([entropy(one.p).mean() for one in given]) < high


def test_a_reference_of_the_policy_without_entropy_does_not_hide_its_own_scores(run: Made) -> None:
    given = [distributions(*LENGTHS)]
    ((rollout, _),) = add_round(run, 0, given)
    student = run.folder.need(RolloutRound, 0).student
    some = only(scores_of(given[0].p, given[0], 16), "sampled")
    shards.commit_scores(run.cache, rollout, "sampled", scores=some, teacher=student, k=0)
    add_own(run, 0, given)
    assert audit(of_run(run.path)).total.student_entropy is not None


def test_own_scores_that_cannot_be_read_cost_their_numbers_alone(run: Made) -> None:
    given = [distributions(*LENGTHS)]
    add_round(run, 0, given)
    (own,) = add_own(run, 0, given)
    largest = max(own.objects, key=lambda entry: entry.size_bytes)
    path = run.path.parent / "cache" / data_prefix(own.key, own.attempt) / largest.path
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    found = audit(of_run(run.path))
    assert found.is_go
    assert "unreadable own scores" in names(found, "warning")
    assert (found.total.num_tokens, found.total.student_entropy) == (57, None)


def test_rounds_are_looked_at_in_order_and_once(run: Made) -> None:
    for index in (0, 2):
        add_round(run, index, [distributions(*LENGTHS, seed=index)])
    assert [part.round for part in of_run(run.path).parts] == [0, 2]
    assert [part.round for part in of_run(run.path, [2, 0, 2]).parts] == [0, 2]


def test_without_the_student_s_files_its_end_of_sequence_is_known_from_the_shards(
    run: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = shards.rollout_identity
    monkeypatch.setattr(
        shards,
        "rollout_identity",
        lambda *args: plain(*args).model_copy(update={"eos_token_id": 3}),
    )
    add_round(run, 0, [distributions(*LENGTHS)])
    assert of_run(run.path).special == {3: None}


def test_a_run_file_has_its_own_cache_and_stands_alone(run: Made) -> None:
    add_round(run, 0, [distributions(*LENGTHS)])
    with pytest.raises(UsageError, match="a run file names its cache"):
        target([str(run.path)], cache="cache", rounds=[])
    with pytest.raises(UsageError, match="one run file, or keys"):
        target([str(run.path), "abc"], cache="cache", rounds=[])


def test_a_text_that_a_terminal_would_act_on_is_spelt_out(
    run: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = distributions(40)
    ids = one.ids.copy()
    ids[3] = 59
    add_round(run, 0, [replace(one, ids=ids)], [scores_of(one.q, replace(one, ids=ids), 16, 16)])
    monkeypatch.setattr("opdcache.audit.targets._eos", lambda *_: {59: "\x1b[2Jx"})
    done = cli_audit(run.path)
    assert "\\x1b[2Jx" in done.stdout
    assert "\x1b" not in done.stdout


FAILS = """
def verify(text, answer):
    raise ValueError(text)
"""


def labelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verifier: str) -> Made:
    (tmp_path / "faulty_labels.py").write_text(FAILS)
    monkeypatch.syspath_prepend(str(tmp_path))
    held_out = {"type": "jsonl", "path": "held-out.jsonl"}
    made = make_run(tmp_path, evaluation={"verifier": verifier, "source": held_out})
    one = distributions(*LENGTHS)
    add_round(made, 0, [one], tables=[rows_of(one, RECORDED, answers=("1", "2", "3", "4"))])
    return made


@pytest.mark.parametrize("verifier", ["faulty_labels:verify", "nowhere_to_be_found:verify"])
def test_labels_that_nobody_asked_for_are_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verifier: str
) -> None:
    made = labelled(tmp_path, monkeypatch, verifier)
    found = Audit.model_validate_json(cli_audit(made.path, "--json").stdout)
    assert found.parts[0].reward.num_labelled == 0
    assert isinstance(cli_audit(made.path, "--verifier", verifier).exception, UsageError)
    assert cli_audit(made.path, "--verifier", "none").exit_code == 0
