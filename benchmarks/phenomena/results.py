"""What an experiment found, as JSON beside its runs."""

import json
from typing import Any

from .common import Bench

PARTS = ("seeds", "losses", "lags", "replays", "out", "model")
"""Arguments in which the commands of one experiment may differ: parts of it, and places."""

Row = dict[str, Any]


def written(bench: Bench, name: str, **results: Any) -> None:
    """Write an experiment's results, with its arguments."""
    whole = {"arguments": _arguments(bench), **results}
    (bench.out / f"{name}.json").write_text(json.dumps(whole, indent=1) + "\n")


class Rows:
    """An experiment's rows; a command adds those of its own parts to what others of its folder
    found, or puts them in their place. Others may do so meanwhile.

    Args:
        by: keys that tell the rows apart.

    Raises:
        SystemExit: the others had other arguments.
    """

    def __init__(self, bench: Bench, name: str, *by: str) -> None:
        self._bench, self._name, self._by = bench, name, by
        self._file, asked = bench.out / f"{name}.json", _arguments(bench)
        found = self._found.get("arguments", asked)
        for key in (key for key in asked if key not in PARTS):
            if found.get(key) != asked[key]:
                option = f"--{key.replace('_', '-')} {found.get(key)}"
                raise SystemExit(f"{self._file}: of {option}; ask for that, or another --out")

    @property
    def runs(self) -> list[Row]:
        """All that are written."""
        rows: list[Row] = self._found.get("runs", [])
        return rows

    def add(self, run: Row, **results: Any) -> None:
        """Write a run's row, and what else is told."""
        self._write(results | {"runs": _with(self.runs, run, self._by)})

    def begin(self, start: Row) -> None:
        """Write where a seed's runs began."""
        self._write({"starts": _with(self._found.get("starts", []), start, ("seed",))})

    @property
    def _found(self) -> dict[str, Any]:
        return json.loads(self._file.read_text()) if self._file.exists() else {}

    def _write(self, results: dict[str, Any]) -> None:
        whole = {**self._found, **results}
        whole.pop("arguments", None)
        written(self._bench, self._name, **whole)


def _with(rows: list[Row], row: Row, by: tuple[str, ...]) -> list[Row]:
    """The row in the place of the one with the same keys, or after all."""
    keys = [row.get(key) for key in by]
    places = [i for i, other in enumerate(rows) if [other.get(key) for key in by] == keys]
    at = places[0] if places else len(rows)
    return [*rows[:at], row, *rows[at + 1 :]]


def _arguments(bench: Bench) -> dict[str, str]:
    return {key: str(value) for key, value in vars(bench.asked).items()}
