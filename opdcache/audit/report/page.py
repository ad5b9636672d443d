"""A report's contents as one HTML file that opens offline, and its charts as PNG."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import vl_convert
from markupsafe import Markup

from ...schemas.audit import Audit, PartAudit
from ..worst import MEASURES, Found, Measure, Place, Worst
from .charts import Figure, figures
from .gather import Contents
from .sets import MOST_LISTED, Counts, Group, Sets
from .views import WORST, View, Wanted, found_in, packed, step_of, visible

_TEMPLATES = Path(__file__).parent / "templates"
_SECTIONS = {
    "verdict": "Verdict",
    "rounds": "Rounds over time",
    "positions": "By position",
    "masses": "Mass by k",
    "completions": "Completions",
    "worst": "Worst cases",
    "views": "Token by token",
    "provenance": "Provenance",
    "cost": "Cost",
}
_LEGEND = {
    "minus-5": "-4 and below",
    "minus-4": "-2",
    "minus-3": "-1",
    "minus-2": "-0.5",
    "minus-1": "-0.25",
    "near": "0",
    "plus-1": "0.25",
    "plus-2": "0.5",
    "plus-3": "1",
    "plus-4": "2",
    "plus-5": "4 and above",
    "none": "no value",
}
_EXPOSED = "window.vegaEmbed = vegaEmbed;"
_MOST_PROMPT = 4000
_PNG_WIDTH, _PNG_SCALE = 640, 2.0

Table = tuple[tuple[str, ...], list[tuple[object, ...]]]


@dataclass(frozen=True, slots=True)
class Link:
    """A table's cell that leads to a view."""

    text: str
    view: str


def page(contents: Contents) -> str:
    """The whole file. Texts of tokens, prompts and models are untrusted, and are escaped."""
    audit, sets = contents.audit, contents.sets
    listed = sets.num <= MOST_LISTED
    return _template().render(
        audit=audit,
        version=version("opdcache"),
        made_at=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        sections=_SECTIONS.items(),
        said=_said(audit),
        figured=figures(audit, contents.evaluations, contents.accuracies),
        completions=_completions(audit.parts),
        special=list(_special(audit.parts)),
        worst=list(_worst(contents.worst, contents.views)),
        views=contents.views,
        legend=_LEGEND.items(),
        sets=sets,
        listed=listed,
        provenance=_listed(sets) if listed else _grouped(sets),
        environments=list(_environments(sets)),
        costs=list(_costs(sets)),
        css=Markup((_TEMPLATES / "report.css").read_text(encoding="utf-8")),
        js=Markup((_TEMPLATES / "report.js").read_text(encoding="utf-8")),
        vega=_vega(),
    )


def pngs(contents: Contents) -> Iterator[tuple[str, bytes]]:
    """Each chart as a PNG, with its name."""
    for section in figures(contents.audit, contents.evaluations, contents.accuracies).values():
        for figure in section:
            yield figure.name, png(figure)


def png(figure: Figure) -> bytes:
    """A chart on white, with its title."""
    spec = figure.spec | {"width": _PNG_WIDTH, "title": figure.title}
    spec["config"] = spec["config"] | {"background": "white"}
    return vl_convert.vegalite_to_png(spec, scale=_PNG_SCALE)


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": _number,
        "visible": visible,
        "step": step_of,
        "packed": lambda tokens: [packed(token) for token in tokens],
        "cut": _cut,
    }
    environment.tests["link"] = lambda value: isinstance(value, Link)
    return environment.get_template("report.html")


@cache
def _vega() -> Markup:
    """Vega-Lite and all that it needs, for one script."""
    return Markup(vl_convert.javascript_bundle(_EXPOSED).replace("</script", "<\\/script"))


def _number(value: object) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return f"{value:,}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _cut(text: str) -> str:
    """A prompt, or its end, which the completion goes on from."""
    if len(text) <= _MOST_PROMPT:
        return text
    return f"(the last {_MOST_PROMPT:,} of {len(text):,} characters)\n{text[-_MOST_PROMPT:]}"


def _said(audit: Audit) -> str:
    if not audit.findings:
        return "no limit is passed."
    num = sum(finding.level == "no-go" for finding in audit.findings)
    return f"{num} of {len(audit.findings)} findings speak against going on."


def _completions(parts: Sequence[PartAudit]) -> Table:
    columns = (
        *("round", "completions", "prompts", "median tokens", "longest", "truncated"),
        *("repetitive", "copies", "reward", "its deviation", "AUROC", "judged"),
        *("on repeated tokens", "on others"),
    )
    return columns, [
        (
            part.name,
            part.completions.num,
            part.completions.num_prompts,
            int(part.completions.median_tokens),
            part.completions.longest_tokens,
            part.completions.truncated,
            part.completions.repetitive,
            part.completions.duplicates,
            part.reward.mean,
            part.reward.deviation,
            part.reward.auroc,
            part.reward.num_labelled,
            part.repetition.advantage,
            part.repetition.rest_advantage,
        )
        for part in parts
    ]


def _special(parts: Sequence[PartAudit]) -> Iterator[tuple[object, ...]]:
    for part in parts:
        for one in part.special:
            name = one.token or f"<{one.id}>"
            yield part.name, name, one.num, one.teacher_logprob, one.advantage, one.num_outliers


def _worst(worst: Worst, shown: Sequence[View]) -> Iterator[tuple[str, tuple[str, ...], Any]]:
    columns = ("completion", "round", "rollout", "tokens", "mean advantage", "mean disagreement")
    for measure in MEASURES:
        if found := worst.completions(measure):
            rows = [_completion(one, one.worst[measure], measure, shown) for one in found]
            yield (
                f"Completions by {WORST[measure]} mean {measure}",
                (*columns, "worst token at", f"its {measure}"),
                rows,
            )
    for measure in MEASURES:
        if tokens := worst.tokens(measure):
            rows = [_completion(one, place, measure, shown) for one, place in tokens]
            title = f"Tokens by {WORST[measure]} {measure}"
            yield title, (*columns, "token at", f"its {measure}"), rows


def _completion(
    found: Found, place: Place, measure: Measure, shown: Sequence[View]
) -> tuple[object, ...]:
    name = f"{found.shard.name}:{found.row}"
    wanted = Wanted(found.part, found.shard, found.row, place.position, "")
    view = found_in(shown, wanted)
    return (
        name if view is None else Link(name, view.name),
        found.part,
        found.rollout_id,
        found.num_tokens,
        found.advantage,
        found.disagreement,
        place.position,
        place.value,
    )


def _listed(sets: Sets) -> Table:
    columns = (
        *("round", "kind", "key", "model", "rows", "tokens", "bytes", "made at", "by run"),
        "environment",
    )
    return columns, [
        (
            group.round,
            group.kind,
            key[:12],
            group.model[:12],
            counts.num_rows,
            counts.num_tokens,
            counts.size_bytes,
            counts.first,
            group.run_id[:12],
            group.environment,
        )
        for key, group, counts in sets.listed
    ]


def _grouped(sets: Sets) -> Table:
    columns = (
        *("round", "kind", "sets", "model", "rows", "tokens", "bytes", "first made", "last made"),
        *("by run", "environment"),
    )
    return columns, [_group(group, counts) for group, counts in sets.groups.items()]


def _group(group: Group, counts: Counts) -> tuple[object, ...]:
    return (
        group.round,
        group.kind,
        counts.num,
        group.model[:12],
        counts.num_rows,
        counts.num_tokens,
        counts.size_bytes,
        counts.first,
        counts.last,
        group.run_id[:12],
        group.environment,
    )


def _environments(sets: Sets) -> Iterator[tuple[object, ...]]:
    for one, number in sets.environments.items():
        versions = ", ".join(f"{name} {version}" for name, version in one.versions)
        yield number, one.host, versions, one.details


def _costs(sets: Sets) -> Iterator[tuple[object, ...]]:
    for cost in sets.costs:
        trains = cost.compute_s is None
        yield (
            cost.round,
            cost.stage,
            cost.wall_s,
            cost.compute_s,
            cost.num_tokens,
            None if trains else cost.num_sets,
            None if trains else cost.num_found,
            None if trains else cost.size_bytes,
            cost.teacher_tokens,
        )
