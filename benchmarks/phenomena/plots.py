"""Curves over rounds, a panel a figure; runs of the same name are seeds of one arm."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

Values = Sequence[float | None]
Curves = Mapping[str, Sequence[tuple[str, Values]]]
"""By panel: name and values of each run."""


def by_panel(
    panels: Mapping[str, Callable[[dict[str, Any]], Values]],
    runs: Sequence[dict[str, Any]],
    name: Callable[[dict[str, Any]], str],
) -> Curves:
    """What each panel shows of each run."""
    return {title: [(name(run), values(run)) for run in runs] for title, values in panels.items()}


def lines(curves: Curves, across: str, ticks: Sequence[str] | None = None) -> Figure:
    """A figure with a panel of each; seeds are thin, their mean is thick.

    Args:
        ticks: what the places of the values are called; their numbers by default.
    """

    figure = Figure(figsize=(3.4 * len(curves), 3.4), layout="constrained")
    axes = figure.subplots(1, len(curves), squeeze=False)
    for axis, (title, runs) in zip(axes[0], curves.items(), strict=True):
        arms: dict[str, list[Values]] = {}
        for name, values in runs:
            arms.setdefault(name, []).append(values)
        for colour, (name, seeds) in enumerate(arms.items()):
            style = {"color": f"C{colour}"}
            for values in seeds if len(seeds) > 1 else ():
                axis.plot(range(len(values)), values, alpha=0.35, linewidth=0.8, **style)
            mean = [_mean(place) for place in zip(*seeds, strict=True)]
            axis.plot(range(len(mean)), mean, marker="o", markersize=3, label=name, **style)
        axis.set(title=title, xlabel=across)
        if ticks is None:
            axis.xaxis.get_major_locator().set_params(integer=True)
        else:
            axis.set_xticks(range(len(ticks)), ticks)
        axis.grid(alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    figure.savefig(path, dpi=120)


def _mean(values: Values) -> float | None:
    held = [value for value in values if value is not None]
    return sum(held) / len(held) if held else None
