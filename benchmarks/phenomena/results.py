"""What an experiment found, as JSON beside its runs."""

import fcntl
import json
from collections.abc import Callable
from typing import Any

from .common import Bench

PARTS = ("seeds", "losses", "lags", "replays", "entries", "out")
"""Arguments in which the commands of one experiment may differ."""

Row = dict[str, Any]


def written(bench: Bench, name: str, **results: Any) -> None:
    """Write an experiment's results, with its arguments."""
    _write(bench, name, {"arguments": _arguments(bench), **results})


class Rows:
    """An experiment's rows; a command adds those of its own parts to what others of its folder
    found, or puts them in their place. Others may do so meanwhile.

    Args:
        by: keys that tell the rows apart.

    Raises:
        SystemExit: the others had other settings.
    """

    def __init__(self, bench: Bench, name: str, *by: str) -> None:
        self._bench, self._name, self._by = bench, name, by
        self._file = bench.out / f"{name}.json"
        self._same(self._found)

    @property
    def runs(self) -> list[Row]:
        """All that are written."""
        rows: list[Row] = self._found.get("runs", [])
        return rows

    def add(self, run: Row, **results: Any) -> None:
        """Write a run's row, and what else is told."""
        self._change(lambda of: {**results, "runs": _with(of.get("runs", []), run, self._by)})

    def begin(self, seed: int, start: Row) -> None:
        """Write where a seed's runs began, if that is told."""
        row = {"seed": seed, **start}
        if start:
            self._change(lambda of: {"starts": _with(of.get("starts", []), row, ("seed",))})

    @property
    def _found(self) -> Row:
        return json.loads(self._file.read_text()) if self._file.exists() else {}

    @property
    def _settings(self) -> dict[str, str]:
        return {k: v for k, v in _arguments(self._bench).items() if k not in PARTS}

    def _same(self, found: Row) -> None:
        held = found.get("arguments", {})
        for key, value in self._settings.items():
            if held.get(key, value) != value:
                option = f"--{key.replace('_', '-')} {held[key]}"
                raise SystemExit(f"{self._file}: of {option}; ask for that, or another --out")

    def _change(self, of: Callable[[Row], Row]) -> None:
        self._bench.out.mkdir(parents=True, exist_ok=True)
        with self._file.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = self._found
            self._same(found)
            _write(self._bench, self._name, {**found, "arguments": self._settings, **of(found)})


def _with(rows: list[Row], row: Row, by: tuple[str, ...]) -> list[Row]:
    """The row in the place of the one with the same keys, or after all."""
    keys = [row.get(key) for key in by]
    places = [i for i, other in enumerate(rows) if [other.get(key) for key in by] == keys]
    at = places[0] if places else len(rows)
    return [*rows[:at], row, *rows[at + 1 :]]


def _write(bench: Bench, name: str, whole: Row) -> None:
    draft = bench.out / f".{name}.json"
    draft.write_text(json.dumps(whole, indent=1) + "\n")
    draft.replace(bench.out / f"{name}.json")


def _arguments(bench: Bench) -> dict[str, str]:
    asked = {key: str(value) for key, value in vars(bench.asked).items()}
    return asked | {"model": str(bench.model)}
