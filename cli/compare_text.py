"""``opdcache compare`` as text."""

from collections.abc import Iterator

from rich import box
from rich.table import Table

from ..schemas.audit import PartAudit
from ..schemas.comparison import Comparison, Estimate, SharedRollouts, SideBySide
from .tables import as_text

_MEANS = {
    "kl_ab": "local KL(A || B), at most the full one",
    "kl_ba": "local KL(B || A)",
    "mass_a": "mass of A on what both keep",
    "mass_b": "mass of B",
    "kept_by_both": "entries that both keep",
    "overlap": "overlap of the top {k}",
    "overlap_mass_a": "mass of A on it",
    "overlap_mass_b": "mass of B on it",
    "argmax_agreement": "likeliest entry the same",
    "topk_difference": "|log A - log B|, entries that both keep",
    "sampled_difference": "|log A - log B|, sampled token",
    "sampled_k3": "r - 1 - log r, sampled token",
    "entropy_difference": "|H(A) - H(B)|",
    "student_kl_a": "student's reverse KL from A",
    "student_kl_b": "student's reverse KL from B",
    "student_kl_change": "the second less the first",
}
_VERDICTS = {
    "the same within rounding": "what differs is below the limits of rounding",
    "indistinguishable": "distilling from A or from B should give the same curve on these rollouts",
    "different": "A and B do not teach the same",
    "undecided": "a mean is too near its limit, or too little is stored, to tell",
}
_DRIFT = "the teacher is not what it was: an engine, its settings or the weights' precision differ"


def compare_text(found: Comparison) -> str:
    """Rollouts that both scored, then the others, then what was not compared."""
    parts = [f"A: {found.a}", f"B: {found.b}"]
    parts += [_shared(each, found) for each in found.shared]
    parts += [_side_by_side(each) for each in found.side_by_side]
    return "\n".join([*parts, *_rest(found)])


def _shared(each: SharedRollouts, found: Comparison) -> str:
    tests = {test.name: test for test in each.tests}
    table = _table("token by token (nats)", "", "mean", "standard error", "largest", "limit", "")
    for name, words in _MEANS.items():
        value: Estimate | None = getattr(each.agreement, name)
        if value is not None:
            test = tests.get(name)
            table.add_row(
                words.format(k=found.k),
                _number(value.mean),
                _number(value.standard_error),
                _number(each.largest.get(name)),
                "" if test is None else f"{test.limit:g}",
                "" if test is None else test.outcome,
            )
    lines = [f"\n{_what(each)}", as_text(table)]
    if len(each.by_position) > 1:
        lines.append(_positions(each))
    return "\n".join([*lines, *_notes(each, found)])


def _what(each: SharedRollouts) -> str:
    one, other = each.teacher_a[:12], each.teacher_b[:12]
    if each.same_model:
        models = f"teacher {one}, scored twice"
    elif one == other:
        models = f"teacher {one}, under two prompt renderings"
    else:
        models = f"teachers {one} (A) and {other} (B)"
    return (
        f"{models}: the same {each.num_completions:,} completions, "
        f"{each.agreement.num_tokens:,} supervised tokens in {each.num_shards:,} shards"
    )


def _positions(each: SharedRollouts) -> str:
    columns = ("kl_ab", "kl_ba", "overlap", "argmax_agreement", "sampled_difference")
    table = _table("by position", "from token", "tokens", "KL(A || B)", "KL(B || A)", "overlap")
    for heading in ("likeliest the same", "sampled |log A - log B|"):
        table.add_column(heading, justify="right")
    for at in each.by_position:
        values = (_estimate(getattr(at, name)) for name in columns)
        table.add_row(f"{at.first:,}", f"{at.num_tokens:,}", *values)
    return as_text(table)


def _notes(each: SharedRollouts, found: Comparison) -> Iterator[str]:
    if each.agreement.num_narrow:
        yield f"  {each.agreement.num_narrow:,} tokens compared on fewer than {found.k} entries"
    for left in each.left_out:
        yield f"  {left.reason}: {left.num_tokens:,} tokens are without its rows"
    for line in each.made_otherwise:
        yield f"  made otherwise, A | B: {line}"
    drifted = each.same_model and each.verdict == "different"
    yield f"verdict: {each.verdict}; {_DRIFT if drifted else _VERDICTS[each.verdict]}"


def _side_by_side(each: SideBySide) -> str:
    a, b = each.a, each.b
    lines = [
        f"\nside by side: {a.name} of A, {b.name} of B; of {a.completions.num_prompts:,} and "
        f"{b.completions.num_prompts:,} prompts they share {each.num_shared_prompts:,}"
    ]
    table = _table("means over tokens (nats)", "", "A", "B", "B - A", "standard error")
    for row in each.differences:
        if row.a is not None or row.b is not None:
            change = row.change
            table.add_row(
                row.name.replace("_", " "),
                _number(None if row.a is None else row.a.mean),
                _number(None if row.b is None else row.b.mean),
                "-" if change is None else f"{change.mean:+.4f}",
                _number(None if change is None else change.standard_error),
            )
    lines += [as_text(table), _texts(a, b), *filter(None, [_by_k(a, b)])]
    if each.num_shared_shards:
        lines.append(
            f"  they share {each.num_shared_shards:,} shards, so that their tokens are not "
            "independent: the differences have no error"
        )
    return "\n".join(lines)


def _texts(a: PartAudit, b: PartAudit) -> str:
    table = _table("completions", "", "number", "tokens", "median", "longest", "truncated")
    for heading in ("repetitive", "copies", "reward"):
        table.add_column(heading, justify="right")
    for name, part in (("A", a), ("B", b)):
        texts = part.completions
        shares = (texts.truncated, texts.repetitive, texts.duplicates)
        table.add_row(
            name,
            f"{texts.num:,}",
            f"{texts.num_tokens:,}",
            f"{texts.median_tokens:,.0f}",
            f"{texts.longest_tokens:,}",
            *(f"{num / texts.num:.1%}" if texts.num else "-" for num in shares),
            _number(part.reward.mean),
        )
    return as_text(table)


def _by_k(a: PartAudit, b: PartAudit) -> str:
    ours, theirs = ({at.k: at for at in part.by_k} for part in (a, b))
    table = _table("by entries kept", "k", "mass q: A", "B", "mass p: A", "B", "overlap: A", "B")
    for k in sorted(ours.keys() & theirs.keys()):
        names = ("teacher_mass", "student_mass", "overlap")
        values = (_number(getattr(side[k], name)) for name in names for side in (ours, theirs))
        table.add_row(str(k), *values)
    return as_text(table) if table.row_count else ""


def _rest(found: Comparison) -> Iterator[str]:
    yield ""
    for left in found.left_out:
        yield (
            f"not compared token by token: {left.num_shards:,} shards, {left.num_tokens:,} tokens: "
            f"{left.reason}"
        )
    for name in found.unpaired:
        yield f"not compared: {name}, which has no counterpart; name it alone as RUN.yaml@ROUND"
    for reason in found.unreadable:
        yield f"unreadable: {reason}"
    if not found.shared and not found.side_by_side:
        yield "nothing was left to compare"
    yield f"read in {found.elapsed_s:.1f} s; errors take completions as the independent draws"


def _table(title: str, first: str, *rest: str) -> Table:
    table = Table(first, box=box.SIMPLE, title=title, title_justify="left")
    for heading in rest:
        table.add_column(heading, justify="right")
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if abs(value) >= 0.01 else f"{value:.2g}"


def _estimate(value: Estimate | None) -> str:
    return "-" if value is None else _number(value.mean)
