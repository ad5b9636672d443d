"""Curves, a panel a figure; runs of the same name are seeds of one arm."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Values = Sequence[float | None]
Curves = Mapping[str, Sequence[tuple[str, Values]]]
"""By panel: name and values of each run."""


@dataclass(frozen=True, slots=True)
class Panel:
    """What one panel shows: name, places and values of each run, equally many a name, None where
    a run has none.

    Attributes:
        across: what the places are.
        ticks: what the places are called, where they are 0, 1, …; their numbers by default.
        logarithmic: whether the places are drawn by their logarithm.
    """

    title: str
    across: str
    runs: Sequence[tuple[str, Values, Values]]
    ticks: Sequence[str] | None = None
    logarithmic: bool = False


def by_panel(
    panels: Mapping[str, Callable[[dict[str, Any]], Values]],
    runs: Sequence[dict[str, Any]],
    name: Callable[[dict[str, Any]], str],
) -> Curves:
    """What each panel shows of each run."""
    return {title: [(name(run), values(run)) for run in runs] for title, values in panels.items()}


def lines(curves: Curves, across: str, ticks: Sequence[str] | None = None) -> Figure:
    """A figure of values at 0, 1, …; see ``drawn``."""
    figure = drawn(
        [
            Panel(title, across, [(name, range(len(of)), of) for name, of in runs], ticks)
            for title, runs in curves.items()
        ]
    )
    for axis in figure.axes if ticks is None else ():
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


Row = Mapping[str, Any]
Run = tuple[str, int]
"""An arm's name, and its seed."""


def aligned(rows: Sequence[tuple[Run, Any, Row]]) -> dict[Run, list[Row | None]]:
    """Of each run the rows at all places that any run of its arm has, in order.

    Args:
        rows: run and place of each.
    """
    places: dict[str, set[Any]] = {}
    of: dict[Run, dict[Any, Row]] = {}
    for run, place, row in rows:
        places.setdefault(run[0], set()).add(place)
        of.setdefault(run, {})[place] = row
    return {run: [held.get(place) for place in sorted(places[run[0]])] for run, held in of.items()}


def values(rows: Sequence[Row | None], value: Callable[[Any], float]) -> Values:
    """Of aligned rows."""
    return [None if row is None else value(row) for row in rows]


def drawn(panels: Sequence[Panel]) -> Figure:
    """A figure with the panels; seeds are thin, their mean is thick, where all have a value."""
    figure = Figure(figsize=(3.4 * len(panels), 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        arms: dict[str, list[tuple[Values, Values]]] = {}
        for name, at, of in panel.runs:
            arms.setdefault(name, []).append((at, of))
        for colour, (name, seeds) in enumerate(arms.items()):
            style = {"color": f"C{colour}"}
            for seed in seeds if len(seeds) > 1 else ():
                axis.plot(*_held(*seed), alpha=0.35, linewidth=0.8, marker=".", **style)
            means = _held(*map(_means, zip(*seeds, strict=True)))
            axis.plot(*means, marker="o", markersize=3, label=name, **style)
        axis.set(title=panel.title, xlabel=panel.across)
        if panel.logarithmic:
            axis.set_xscale("log")
        elif panel.ticks is not None:
            axis.set_xticks(range(len(panel.ticks)), panel.ticks)
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    columns = min(len(panels), len(labels))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    figure.savefig(path, dpi=120)


def _means(seeds: Sequence[Values]) -> list[float | None]:
    """The mean over seeds at each place."""
    return [_mean(at) for at in zip(*seeds, strict=True)]


def _mean(values: Values) -> float | None:
    held = [value for value in values if value is not None]
    return sum(held) / len(held) if len(held) == len(values) else None


def _held(places: Values, values: Values) -> tuple[list[float], list[float]]:
    """Those that are there."""
    pairs = zip(places, values, strict=True)
    held = [(x, y) for x, y in pairs if x is not None and y is not None]
    return [x for x, _ in held], [y for _, y in held]
