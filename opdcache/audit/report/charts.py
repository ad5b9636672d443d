"""The figures of a report, as Vega-Lite, each with its numbers.

Nothing relies on colour alone: series differ in dash and shape too, and every figure comes with a
table.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from ...schemas.audit import Audit, Diagnostics, PartAudit
from ...schemas.evaluation import ModelAccuracy
from ...schemas.rounds import EvaluationRound

COLOURS = ("#2f7fc4", "#d0690a", "#2a9068", "#a758c0", "#8a7a20", "#c2405a")
"""Readable on white and on black, and told apart by the colour-blind."""
_DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [4, 4], [1, 3])
_SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")
_DIVERGING = ("#b35806", "#f1a340", "#f7f7f7", "#998ec3", "#542788")
_MOST_SERIES = 6
_HEIGHT = 240
_CONFIG: dict[str, Any] = {
    "background": "transparent",
    "font": "system-ui, sans-serif",
    "axis": {"labelFontSize": 12, "titleFontSize": 12, "gridOpacity": 0.5},
    "legend": {
        "orient": "bottom",
        "labelFontSize": 12,
        "titleFontSize": 12,
        "columns": 2,
        "labelLimit": 260,
    },
    "view": {"stroke": None},
}

Rows = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Heading:
    """What is said of a chart.

    Attributes:
        name: of its element and file.
        caption: what is seen, in which units, and how to read it.
    """

    name: str
    title: str
    caption: str


@dataclass(frozen=True, slots=True)
class Figure(Heading):
    """A chart.

    Attributes:
        spec: Vega-Lite, as wide as what it is put into.
        columns, rows: its numbers.
    """

    spec: dict[str, Any]
    columns: tuple[str, ...]
    rows: tuple[tuple[object, ...], ...]


@dataclass(frozen=True, slots=True)
class _Series:
    """A line: a value of what a round's diagnostics hold, or the two that bound it."""

    name: str
    field: str
    low: str | None = None
    high: str | None = None

    def at(self, found: Diagnostics) -> dict[str, float] | None:
        """The value, and its bounds where it is their middle."""
        if (value := getattr(found, self.field)) is not None:
            return {"value": value, "low": value, "high": value}
        if self.low is None or self.high is None:
            return None
        low, high = getattr(found, self.low), getattr(found, self.high)
        if low is None or high is None:
            return None
        return {"value": (low + high) / 2, "low": low, "high": high}


H_Q = _Series("teacher, H(q)", "teacher_entropy")
H_P = _Series("student, H(p)", "student_entropy", "student_entropy_low", "student_entropy_high")
GAP = _Series("gap", "entropy_gap", "entropy_gap_low", "entropy_gap_high")
ADVANTAGE = _Series("advantage", "advantage")
OVERLAP_ADVANTAGE = _Series("overlap-token advantage", "overlap_advantage")
OVERLAP = (
    _Series("overlap", "overlap"),
    _Series("student's mass on it", "overlap_mass_student"),
    _Series("teacher's mass on it", "overlap_mass_teacher"),
)


def figures(
    audit: Audit, evaluations: Sequence[EvaluationRound], accuracies: Sequence[ModelAccuracy]
) -> dict[str, list[Figure]]:
    """Every figure that there are numbers for, by the section that it is in."""
    return {
        "rounds": [*_over_rounds(audit, evaluations), *_accuracy(accuracies)],
        "positions": list(_by_position(audit)),
        "masses": list(_by_k(audit)),
    }


def _over_rounds(audit: Audit, evaluations: Sequence[EvaluationRound]) -> Iterator[Figure]:
    """Those with lines over the rounds; without those that no round has a value of."""
    for heading, series, unit in _lines(audit):
        rows: Rows = [
            {"round": part.round, "series": one.name, **values}
            for part in audit.parts
            for one in series
            if (values := one.at(part.diagnostics)) is not None
        ]
        if rows:
            yield _with_lines(heading, "round", rows, unit)
    held_out: Rows = [
        {"round": e.round, "series": "reverse KL", **dict.fromkeys(_BOUNDED, e.reverse_kl)}
        for e in evaluations
    ]
    if held_out:
        yield _with_lines(_HELD_OUT, "round", held_out, "nats")


def _accuracy(accuracies: Sequence[ModelAccuracy]) -> Iterator[Figure]:
    """Mean scores of the students' answers; the teacher's is a line through all rounds."""
    by_round = {one.round: one.mean_score for one in accuracies}
    teacher = by_round.pop(None, None)
    lines = [("student", index, score) for index, score in by_round.items()]
    lines += [("teacher", index, teacher) for index in by_round if teacher is not None]
    rows: Rows = [
        {"round": index, "series": name, **score.model_dump()} for name, index, score in lines
    ]
    if rows:
        yield _with_lines(_ACCURACY, "round", rows, "mean score")


def _lines(audit: Audit) -> Iterator[tuple[Heading, tuple[_Series, ...], str]]:
    """What goes over the rounds, and its unit."""
    exact = all(_is_exact(part) for part in audit.parts)
    bounds = "" if exact else _OF_A_BAND
    overlap = Heading(
        "overlap",
        "Overlap and its masses",
        f"Share of the {audit.k} likeliest tokens that both models have in common, and how much of "
        "each model's probability is on these. Where distillation works the overlap climbs and the "
        "masses come near 1.",
    )
    entropy = Heading(
        "entropy",
        "Entropy",
        f"Mean entropy of both models' next-token distributions, nats.{bounds}",
    )
    gap = Heading(
        "entropy-gap",
        "Entropy gap",
        f"Mean of |H(q) - H(p)| of each token, nats. It should fall.{bounds}",
    )
    yield overlap, OVERLAP, "share"
    yield _ADVANTAGE, (ADVANTAGE,), "nats"
    yield _OVERLAP_ADVANTAGE, (OVERLAP_ADVANTAGE,), "nats"
    yield entropy, (H_Q, H_P), "nats"
    yield gap, (GAP,), "nats"


_OF_A_BAND = (
    " A band is between the least and the largest value that the recorded entries allow, its line "
    "is their middle."
)
_ADVANTAGE = Heading(
    "advantage",
    "Advantage of the sampled tokens",
    "Mean of log q - log p of the tokens that the student sampled, nats: minus the reverse KL. It "
    "should climb towards 0.",
)
_OVERLAP_ADVANTAGE = Heading(
    "overlap-advantage",
    "Overlap-token advantage",
    "The same on the shared tokens alone, renormalised on them, a token's share of it, nats. At "
    "most 0, and 0 is good; read it with the masses, since it says nothing of what is not shared.",
)
_HELD_OUT = Heading(
    "held-out",
    "Reverse KL on held-out prompts",
    "Mean of KL(student || teacher) over the tokens that each round's student, before its "
    "training, samples on prompts that it is never trained on, nats. This is the result: it should "
    "fall.",
)
_ACCURACY = Heading(
    "accuracy",
    "Accuracy on held-out prompts",
    "avg@n: mean score that the verifier gives each round's student, before its training, and the "
    "teacher. A band is the 95 % interval of a bootstrap over prompts.",
)
_BOUNDED = ("value", "low", "high")


def _with_lines(heading: Heading, x: str, rows: Rows, unit: str, *, log: bool = False) -> Figure:
    """A line a series, a band where values have bounds, and the numbers."""
    names = list(dict.fromkeys(row["series"] for row in rows))
    legend = None if len(names) == 1 else alt.Legend(title=None, symbolOpacity=1, symbolDash=[1, 0])
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=_axis(x, [row[x] for row in rows], log),
        color=alt.Color("series:N", sort=None, legend=legend, scale=_scale(names, COLOURS)),
        tooltip=[alt.Tooltip("series:N"), alt.Tooltip(f"{x}:Q"), _rounded("value", unit)],
    )
    y = alt.Y("value:Q", title=unit, scale=alt.Scale(zero=False))
    line = base.mark_line(strokeWidth=2).encode(
        y=y,
        strokeDash=alt.StrokeDash(
            "series:N", sort=None, legend=legend, scale=_scale(names, _DASHES)
        ),
    )
    point = base.mark_point(filled=True, size=60, opacity=1).encode(
        y=y,
        shape=alt.Shape("series:N", sort=None, legend=legend, scale=_scale(names, _SHAPES)),
    )
    layers: list[Any] = [line, point]
    if any(row["low"] != row["high"] for row in rows):
        band = base.mark_errorband(opacity=0.25) if _is_line(rows, x) else base.mark_rule(opacity=1)
        layers.insert(0, band.encode(y=alt.Y("low:Q", title=unit), y2="high:Q"))
    bounds = ("low", "high") if len(layers) == 3 else ()
    columns = (x, "series", "value", *bounds)
    return _drawn(heading, alt.layer(*layers), columns, rows)


def _is_line(rows: Rows, x: str) -> bool:
    return len({row[x] for row in rows}) > 1


def _scale(names: list[str], values: Sequence[Any]) -> alt.Scale:
    return alt.Scale(domain=names, range=list(values[: len(names)]))


def _axis(x: str, values: Sequence[int], log: bool) -> alt.X:
    """Of whole numbers: every one that is there, or as many as there is room for."""
    ticks = sorted(set(values))
    axis = alt.Axis(format="d", labelOverlap=True, tickMinStep=1)
    if len(ticks) <= 12:
        axis = alt.Axis(format="d", labelOverlap=True, values=ticks)
    scale = alt.Scale(type="log", base=2) if log else alt.Scale(nice=False, padding=12)
    return alt.X(f"{x}:Q", title=x, axis=axis, scale=scale)


def _rounded(field: str, unit: str) -> alt.Tooltip:
    return alt.Tooltip(f"{field}:Q", format=".4f", title=unit)


def _drawn(
    heading: Heading, chart: Any, columns: tuple[str, ...], rows: Rows, height: int = _HEIGHT
) -> Figure:
    spec = chart.properties(width="container", height=height).to_dict()
    spec = {name: value for name, value in spec.items() if name != "$schema"}
    spec |= {
        "config": _CONFIG,
        "description": f"{heading.title}. {heading.caption}",
        "autosize": {"type": "fit-x", "contains": "padding"},
    }
    listed = tuple(tuple(row[name] for name in columns) for row in rows)
    return Figure(heading.name, heading.title, heading.caption, spec, columns, listed)


def _by_position(audit: Audit) -> Iterator[Figure]:
    """Heatmaps of what is stored."""
    for heading, series in _cells(audit):
        rows: Rows = [
            {
                "from": at.first,
                "to": at.first + audit.chunk_tokens - 1,
                "round": part.round,
                "value": values["value"],
                "tokens": at.num_tokens,
            }
            for part in audit.parts
            for at in part.by_position
            if (values := series.at(at)) is not None
        ]
        if rows:
            yield _with_cells(heading, rows, series is ADVANTAGE)


def _cells(audit: Audit) -> Iterator[tuple[Heading, _Series]]:
    exact = all(_is_exact(part) for part in audit.parts)
    middle = "" if exact else " It is the middle of the bounds that the recorded entries give."
    said = f"Nats; a cell is {audit.chunk_tokens:,} positions of a round, darker is more."
    teacher = Heading(
        "positions-teacher-entropy",
        "Teacher's entropy H(q) by position",
        f"{said} Where it rises with depth the teacher is lost in what the student wrote.",
    )
    student = Heading(
        "positions-student-entropy", "Student's entropy H(p) by position", said + middle
    )
    advantage = Heading(
        "positions-advantage",
        "Advantage by position",
        "Mean of log q - log p of the sampled tokens, nats; orange is below 0, where the student "
        "is surer of them than the teacher. Trouble that starts at the end of completions shows "
        "here first.",
    )
    yield teacher, H_Q
    yield student, H_P
    yield advantage, ADVANTAGE


def _with_cells(heading: Heading, rows: Rows, diverging: bool) -> Figure:
    """A cell a round and position chunk, and the numbers."""
    furthest = max(abs(row["value"]) for row in rows) or 1.0
    scale = (
        alt.Scale(domain=[-furthest, furthest], range=list(_DIVERGING), interpolate="lab")
        if diverging
        else alt.Scale(scheme="viridis", reverse=True, zero=False)
    )
    legend = alt.Legend(title="nats", gradientLength=200)
    chart = (
        alt.Chart(alt.Data(values=rows))
        .mark_rect()
        .encode(
            x=alt.X(
                "from:O",
                title="position",
                axis=alt.Axis(labelAngle=0, labelOverlap="greedy", labelSeparation=8),
            ),
            y=alt.Y("round:O", title="round", axis=alt.Axis(labelOverlap=True)),
            color=alt.Color("value:Q", scale=scale, legend=legend),
            tooltip=[
                *(alt.Tooltip(f"{name}:Q") for name in ("round", "from", "to", "tokens")),
                _rounded("value", "nats"),
            ],
        )
    )
    num_rounds = len({row["round"] for row in rows})
    height = min(600, max(60, 28 * num_rounds))
    return _drawn(heading, chart, ("round", "from", "to", "value", "tokens"), rows, height)


def _by_k(audit: Audit) -> Iterator[Figure]:
    parts = [part for part in audit.parts if part.by_k]
    some = _spread(parts)
    said = "" if len(some) == len(parts) else f" {len(some)} of {len(parts)} rounds are shown."
    for field, title, caption in (
        (
            "teacher_mass",
            "Teacher's mass in its k likeliest",
            "What a smaller score.k would keep of the teacher's probability.",
        ),
        (
            "student_mass",
            "Student's mass in its k likeliest",
            "What a smaller rollout.student_topk would record of the student's probability.",
        ),
        ("overlap", "Overlap by k", "Share of both models' k likeliest tokens that is shared."),
    ):
        rows: Rows = [
            {"k": at.k, "series": part.name, **dict.fromkeys(_BOUNDED, value)}
            for part in some
            for at in part.by_k
            if (value := getattr(at, field)) is not None
        ]
        if rows:
            heading = Heading(f"k-{field.replace('_', '-')}", title, caption + said)
            yield _with_lines(heading, "k", rows, "share", log=True)


def _spread(parts: Sequence[PartAudit]) -> list[PartAudit]:
    """The first, the last and some between, no more than can be told apart."""
    if len(parts) <= _MOST_SERIES:
        return list(parts)
    step = (len(parts) - 1) / (_MOST_SERIES - 1)
    return [parts[round(i * step)] for i in range(_MOST_SERIES)]


def _is_exact(part: PartAudit) -> bool:
    return part.diagnostics.student_entropy is not None and part.num_own == part.num_shards
