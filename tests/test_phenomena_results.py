"""Rows of an experiment that several commands find, and its settings."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.phenomena.common import Bench
from benchmarks.phenomena.results import Rows


def bench(out: Path, **asked: Any) -> Bench:
    return Bench(Namespace(**{"out": out, "seeds": [0], "losses": ["a"], "lr": 1e-4, **asked}))


def read(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "name.json").read_text())
    return found


def test_rows_of_other_seeds_and_losses_stay(tmp_path: Path) -> None:
    first = Rows(bench(tmp_path), "name", "seed", "loss")
    first.add({"seed": 0, "loss": "a", "kl": 1.0}, before=2.0)
    first.begin({"seed": 0, "kl": 3.0})
    assert read(tmp_path)["before"] == 2.0
    second = Rows(bench(tmp_path, seeds=[0, 1], losses=["b"]), "name", "seed", "loss")
    second.add({"seed": 0, "loss": "b", "kl": 4.0})
    first.add({"seed": 2, "loss": "a", "kl": 7.0})
    second.add({"seed": 1, "loss": "a", "kl": 5.0})
    second.begin({"seed": 1, "kl": 6.0})
    found = read(tmp_path)
    told = [(row["seed"], row["loss"], row["kl"]) for row in found["runs"]]
    assert told == [(0, "a", 1.0), (0, "b", 4.0), (2, "a", 7.0), (1, "a", 5.0)]
    assert second.runs == found["runs"]
    assert [row["kl"] for row in found["starts"]] == [3.0, 6.0]
    assert found["before"] == 2.0


def test_a_row_found_again_takes_its_place(tmp_path: Path) -> None:
    rows = Rows(bench(tmp_path), "name", "seed", "lag", "replayed")
    for kl, how in enumerate(({"lag": 0}, {"replayed": 0}, {"lag": 4}, {"replayed": 0})):
        rows.add({"seed": 0, **how, "kl": kl})
    for kl in (7, 8):
        rows.begin({"seed": 0, "kl": kl})
    assert [row["kl"] for row in read(tmp_path)["runs"]] == [0, 3, 2]
    assert [row["kl"] for row in read(tmp_path)["starts"]] == [8]


def test_rows_of_other_settings_are_refused(tmp_path: Path) -> None:
    Rows(bench(tmp_path), "name", "seed").add({"seed": 0})
    before = (tmp_path / "name.json").read_text()
    with pytest.raises(SystemExit, match=r"name\.json: of --lr 0\.0001; ask for that, or another"):
        Rows(bench(tmp_path, lr=1e-5), "name", "seed")
    assert (tmp_path / "name.json").read_text() == before
