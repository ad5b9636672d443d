"""What the experiments print, write and draw at their end, of results that are given."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from benchmarks.phenomena import (
    cold_start,
    common,
    horizon,
    plots,
    reverse,
    staleness,
    supports,
    truncation,
)
from opdcache.schemas.rounds import PromptScores

TOLD = {"value": 0.5, "low": 0.4, "high": 0.6}
END = {"reverse_kl": 0.25, "accuracy": TOLD, "teacher": TOLD}
ROUND = {
    "accuracy": 0.3,
    "overlap": 0.6,
    "student_entropy": 1.0,
    "largest_gradient": 7.0,
    "reverse_kl_tail": 0.2,
}
ROUNDS = {"rounds": [ROUND, ROUND], "findings": [], "minutes": 1.0}
Ended = Callable[..., tuple[list[str], dict[str, Any]]]


def given(value: Any) -> Callable[..., Any]:
    return lambda *args, **more: value


@pytest.fixture
def ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Ended:
    """Runs an experiment's main with some of its functions replaced; what it prints, and its
    results. Its picture is drawn."""
    for model in ("taught", "idle"):
        monkeypatch.setattr(common.Bench, model, tmp_path / model)

    def run(of: ModuleType, name: str, *words: str, **replaced: Any) -> Any:
        for function, value in replaced.items():
            monkeypatch.setattr(of, function, value)
        monkeypatch.setattr("sys.argv", ["x", "--model", "m", "--out", str(tmp_path), *words])
        of.main()
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        results = json.loads((tmp_path / f"{name}.json").read_text())
        return capsys.readouterr().out.splitlines(), results

    return run


def test_supports_tell_a_line_a_loss_and_seed(ended: Ended) -> None:
    printed, results = ended(
        *(supports, "supports", "--seeds", "0", "1"),
        *("--losses", "sampled", "student_topk, k = 4"),
        arm=lambda bench, loss, seed: f"{loss}-{seed}",
        ended=lambda bench, run, teacher, rounds: {**END, "reverse_kl": float(run[-1])},
        by_round=lambda out, run, verifier: {
            "rounds": [{**ROUND, "largest_gradient": g} for g in (len(run), 1)]
        },
        begun=given(END),
    )
    assert printed == [
        f"seed {seed} {loss}: accuracy 0.500 [0.400, 0.600], reverse KL {seed}.0000, "
        f"largest gradient {len(loss) + 2}.0"
        for seed in (0, 1)
        for loss in ("sampled", "student_topk, k = 4")
    ]
    assert len(results["runs"]) == 4
    assert results["starts"] == [{"seed": seed, **END} for seed in (0, 1)]


def test_staleness_tells_how_old_an_arm_s_rollouts_were(ended: Ended) -> None:
    about = {"seed": 0, "loss": "sampled", "mean_age": 1.5, "ess": 0.8, "updates": 64}
    ends = [
        {**about, **END, "teacher_tokens": 8000, **how}
        for how in (
            *({"lag": lag} for lag in (0, 4)),
            *({"replayed": n, "parts": parts} for n, parts in ((3, 4), (0, 4), (0, 2))),
        )
    ]
    trained: list[Any] = []
    arms = [SimpleNamespace(train=trained.append, end=given(one)) for one in ends]
    printed, results = ended(
        *(staleness, "staleness-8"),
        Processes=given("one"),
        arms=given(arms),
        begun=given(END),
    )
    assert trained == ["one"] * 5
    rest = "(1.5 rounds old in the mean): reverse KL 0.2500, accuracy 0.500, ESS 0.80, 64 updates,"
    assert printed == [
        f"seed 0 sampled, {how} {rest} 8,000 teacher tokens"
        for how in ("lag 0", "lag 4", "replayed 3", "replayed 0", "replayed 0")
    ]
    assert results["runs"] == ends


def test_a_horizon_tells_what_was_reached_and_spent(ended: Ended) -> None:
    spent = {"bytes": 2e6, "teacher_tokens": 5000, "learner_s": 60}
    printed, results = ended(
        *(horizon, "horizon"),
        arm=given("run"),
        divergence=given([0.5, 0.25]),
        costs=given([dict.fromkeys(spent, 0), spent]),
        by_round=given(ROUNDS),
    )
    assert printed[1] == (
        "seed 0 first 25%: reverse KL 0.5000 -> 0.2500 for 2.00 MB, 5,000 teacher tokens, "
        "60 s of the learner"
    )
    assert [run["share"] for run in results["runs"]] == list(horizon.SHARES)


def test_a_cold_start_is_told_at_equal_tokens(ended: Ended) -> None:
    def model(value: float) -> dict[str, Any]:
        return {"mean_score": {**TOLD, "value": value}}

    def told(bench: common.Bench, names: list[str]) -> dict[str, Any]:
        tokens = [0, 100, 200] if names == ["without"] else [0, 50, 100]
        return {"models": [*map(model, (0.1, 0.3, 0.5)), model(0.9)], "tokens": tokens}

    printed, results = ended(
        *(cold_start, "cold_start"),
        damaged=given(Path("damaged")),
        without=given(["without"]),
        with_one=given(["sampler", "first", "then"]),
        told=told,
    )
    assert printed == [
        "seed 0 without a cold start: accuracy 0.500 [0.400, 0.600] after 200 tokens, "
        "0.300 after 100",
        "seed 0 with a cold start: accuracy 0.500 [0.400, 0.600] after 100 tokens, 0.500 after 100",
    ]
    assert [run["arm"] for run in results["runs"]] == ["without", "with"]


def test_truncation_sets_draws_against_the_bucket(ended: Ended) -> None:
    measured = {"forward_kl": 0.5, "reverse_kl": 0.4, "ece": 0.1, "full_mass": 0.999}
    printed, results = ended(
        *(truncation, "truncation"),
        sampled=given(None),
        sequences=given(None),
        damaged=given(Path("damaged")),
        arm=given("run"),
        bytes_per_token=lambda folder, cache, num: float(num),
        against=given(measured),
    )
    said = "forward KL 0.5000, reverse KL 0.4000, ECE 0.1000"
    assert printed[0] == f"before: {said}; the top 2,048 hold 0.99900"
    at = printed.index(f"seed 0 draws, 32 (32.0 bytes a token): {said}")
    assert printed[at + 1] == f"    top k and tail, as many bytes: {said}"
    assert len(results["runs"]) == sum(len(sizes) for _, sizes in truncation.ARMS.values())


def test_some_arms_of_truncation_are_trained_alone(ended: Ended) -> None:
    trained: list[tuple[str, int]] = []

    def arm(bench: common.Bench, loss: str, num: int, seed: int, rollouts: str) -> str:
        trained.append((loss, num))
        return "run"

    printed, _ = ended(
        *(truncation, "truncation", "--losses", "draws", "top k, truncated"),
        *("--entries", "8", "4", "128"),
        sampled=given(None),
        sequences=given(None),
        damaged=given(Path("damaged")),
        arm=arm,
        bytes_per_token=lambda folder, cache, num: float(num),
        against=given(dict.fromkeys([*truncation.MEASURED, "full_mass"], 0.5)),
    )
    assert trained == [("draws", 8), ("draws", 128), ("top k, truncated", 4)]
    assert len(printed) == 1 + 3


def test_reverse_distillation_tells_every_round_apart(
    ended: Ended, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common.Bench, "run", given(None))

    def verified(out: Path, name: str) -> common.Scores:
        scores = (1.0, 0.0) if "base" in name else (0.0, 0.0)
        of = {"task": "t", "num_truncated": 0, "num_failed": 0}
        asked = [PromptScores(prompt_id="a", scores=scores, **of)]
        return {0: asked, 1: asked, None: asked}

    printed, results = ended(
        *(reverse, "reverse"),
        damaged=given(Path("damaged")),
        preflight=given({"base, idle": [{"verdict": "indistinguishable"}]}),
        verified=verified,
        by_round=given(ROUNDS),
    )
    assert printed == [
        "base, idle: indistinguishable",
        "seed 0 from base: accuracy by round 0.500, 0.500",
        "seed 0 from idle: accuracy by round 0.000, 0.000",
        "seed 0 from pruned: accuracy by round 0.000, 0.000",
        *(
            f"base minus {name}, by round: " + ", ".join(["+0.500 [+0.500, +0.500]"] * 2)
            for name in ("idle", "pruned")
        ),
    ]
    assert set(results["accuracy_of_base_minus"]) == {"idle", "pruned"}


def test_ages_that_a_seed_lacks_have_no_mean() -> None:
    def run(seed: int, lag: int, kl: float) -> dict[str, Any]:
        about = {"seed": seed, "loss": "sampled", "lag": lag, "mean_age": lag, "ess": 1.0}
        return {**about, **END, "reverse_kl": kl}

    figure = staleness.picture([run(0, 4, 0.4), run(1, 0, 0.2), run(0, 0, 0.1)])
    *seeds, mean = ([*map(list, line.get_data())] for line in figure.axes[0].get_lines())
    assert seeds == [[[0, 4], [0.1, 0.4]], [[0], [0.2]]]
    assert mean == [[0], [pytest.approx(0.15)]]


def test_a_seed_that_was_stopped_is_drawn_as_far_as_it_came() -> None:
    def run(seed: int, entries: int, kl: float) -> dict[str, Any]:
        of = dict.fromkeys(truncation.MEASURED, kl)
        about = {"seed": seed, "loss": "draws", "bytes_per_token": 10 * entries + seed}
        return {**about, "entries": entries, **of}

    panels = truncation.panels([run(0, 8, 0.4), run(0, 32, 0.2), run(1, 8, 0.3)])
    assert [panel.runs for panel in panels] == [
        [("draws", [80, 320], [0.4, 0.2]), ("draws", [81, None], [0.3, None])]
    ] * len(truncation.MEASURED)
    assert plots.drawn(panels).axes[0].get_lines()[-1].get_xdata() == [80.5]
