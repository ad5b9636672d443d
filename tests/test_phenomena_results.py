"""Rows of an experiment that several commands find, and its settings."""

import json
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from benchmarks.phenomena.common import Bench
from benchmarks.phenomena.results import Rows


def bench(out: Path, **asked: Any) -> Bench:
    usual = {"out": out, "model": Path("m"), "seeds": [0], "losses": ["a"], "lags": [0], "lr": 1e-4}
    return Bench(Namespace(**{**usual, **asked}))


def read(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "name.json").read_text())
    return found


def test_rows_of_other_seeds_and_losses_stay(tmp_path: Path) -> None:
    first = Rows(bench(tmp_path), "name", "seed", "loss")
    first.add({"seed": 0, "loss": "a", "kl": 1.0}, before=2.0)
    first.begin(0, {"kl": 3.0})
    assert read(tmp_path)["before"] == 2.0
    second = Rows(bench(tmp_path, seeds=[0, 1], losses=["b"]), "name", "seed", "loss")
    second.add({"seed": 0, "loss": "b", "kl": 4.0})
    first.add({"seed": 2, "loss": "a", "kl": 7.0})
    second.add({"seed": 1, "loss": "a", "kl": 5.0})
    second.begin(1, {"kl": 6.0})
    second.begin(2, {})
    found = read(tmp_path)
    told = [(row["seed"], row["loss"], row["kl"]) for row in found["runs"]]
    assert told == [(0, "a", 1.0), (0, "b", 4.0), (2, "a", 7.0), (1, "a", 5.0)]
    assert second.runs == found["runs"]
    assert found["starts"] == [{"seed": 0, "kl": 3.0}, {"seed": 1, "kl": 6.0}]
    assert found["before"] == 2.0


def test_a_row_found_again_takes_its_place(tmp_path: Path) -> None:
    rows = Rows(bench(tmp_path), "name", "seed", "lag", "replayed")
    for kl, how in enumerate(({"lag": 0}, {"replayed": 0}, {"lag": 4}, {"replayed": 0})):
        rows.add({"seed": 0, **how, "kl": kl})
    for kl in (7, 8):
        rows.begin(0, {"kl": kl})
    assert [row["kl"] for row in read(tmp_path)["runs"]] == [0, 3, 2]
    assert [row["kl"] for row in read(tmp_path)["starts"]] == [8]


@pytest.mark.parametrize("other", [{"lr": 1e-5}, {"model": Path("/m")}], ids=str)
def test_rows_of_other_settings_are_refused(tmp_path: Path, other: dict[str, Any]) -> None:
    late = Rows(bench(tmp_path), "name", "seed")
    Rows(bench(tmp_path, **other), "name", "seed").add({"seed": 0})
    before = (tmp_path / "name.json").read_text()
    message = r"name\.json: of --(lr 1e-05|model /m); ask for that, or another --out"
    for refused in (lambda: Rows(bench(tmp_path), "name", "seed"), lambda: late.add({"seed": 1})):
        with pytest.raises(SystemExit, match=message):
            refused()
    assert (tmp_path / "name.json").read_text() == before


def test_commands_that_run_at_once_lose_no_row(tmp_path: Path) -> None:
    def add(seed: int) -> None:
        rows = Rows(bench(tmp_path, seeds=[seed], lags=[seed]), "name", "seed", "n")
        for n in range(25):
            rows.add({"seed": seed, "n": n})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(4)))
    assert len(read(tmp_path)["runs"]) == 100
