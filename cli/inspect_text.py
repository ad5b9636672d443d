"""``opdcache inspect`` on a terminal, or as plain text: nothing is told by colour alone."""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, zip_longest
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..schemas.inspection import Entry, Listed, Listing, Row, Token
from .screen import Scale, visible, visible_lines, visible_token

if TYPE_CHECKING:
    from ..audit.lookup import Place

_MARKED_NATS = 1.0
"""Without colours, tokens whose advantage is this far from 0 are marked in the text."""
_CONTEXT = 12
"""Tokens shown on either side of one."""
_GAP, _BETWEEN = 2, 4
"""Spaces between columns, and between tables side by side."""
_MASKED = "dim strike"
_SAMPLED = "bold reverse"
_HEADING = "bold"
Item = TypeVar("Item")


class Column(NamedTuple, Generic[Item]):
    """A heading, and the cell of an item below it."""

    heading: str
    cell: Callable[[Item], str | Text]
    is_text: bool = False


def row_view(row: Row, place: "Place", console: Console) -> Iterator[RenderableType]:
    """What the completion is, the prompt, the completion with its advantages, and every token."""
    scale = Scale(console)
    yield _header(row, place)
    yield from _titled("prompt", Text(visible_lines(row.prompt.rstrip("\n"))))
    yield from _titled("completion", _marked(row.tokens, scale))
    yield Padding.indent(_legend(row.tokens, scale), 2)
    if row.text not in "".join(token.text for token in row.tokens):
        yield from _titled("its text", Text(visible_lines(row.text)))
    if row.tokens:
        yield ""
        yield from _fitting(_token_columns(row.tokens, scale), row.tokens, console)
        yield f"'--at T' shows what both said at token T, 0 to {len(row.tokens) - 1}"


def token_view(row: Row, at: int, console: Console) -> Iterator[RenderableType]:
    """One token: what is around it, and the likeliest entries of both models side by side."""
    token = row.tokens[at]
    yield Text.assemble(
        (f"token {at} of {row.shard}:{row.row}", _HEADING),
        f"  {visible_token(token.text)}  (id {token.id}{'' if token.supervised else ', masked'})",
    )
    yield Padding.indent(_around(row.tokens, at), 2)
    yield (
        f"log p {_number(token.student_logprob)}   log q {_number(token.teacher_logprob)}   "
        f"advantage {_number(token.advantage)}"
    )
    yield (
        f"H(p) {_entropy(token)}   H(q) {_number(token.teacher_entropy)}   "
        f"overlap {_number(token.overlap)}   "
        f"shared mass: p {_number(token.mass_student)}, q {_number(token.mass_teacher)}"
    )
    yield ""
    ours = _entries("student", token.student, token.student_tail, token)
    theirs = _entries("teacher", token.teacher, token.teacher_tail, token)
    yield from _beside(ours, theirs, console)
    yield "* shared by both   > the token that was sampled   - not stored"


def list_view(listing: Listing, console: Console) -> Iterator[RenderableType]:
    """Completions, a line each, and how to look at the first."""
    if not listing.rows:
        yield "there are no completions"
        return
    several = len({row.part for row in listing.rows}) > 1
    yield from _fitting(_list_columns(Scale(console), several=several), listing.rows, console)
    first = listing.rows[0]
    at = first.worst and f", with '--at {first.worst.position}' its worst token"
    yield f"'--row {first.row}' shows the first{at or ''}"


def _list_columns(scale: Scale, *, several: bool) -> list[Column[Listed]]:
    """The most telling first."""
    part = Column[Listed]("of", lambda row: visible(row.part), is_text=True)
    return [
        Column("row", lambda row: row.row, is_text=True),
        *([part] if several else []),
        Column("tokens", lambda row: f"{row.num_tokens:,}"),
        Column("advantage", lambda row: _number(row.advantage)),
        Column("disagreement", lambda row: _number(row.disagreement)),
        Column(
            "worst token",
            lambda row: (
                Text(visible_token(row.worst.text), scale.style(row.worst.value))
                if row.worst
                else "-"
            ),
            is_text=True,
        ),
        Column("at", lambda row: str(row.worst.position) if row.worst else "-"),
        Column("its", lambda row: _number(row.worst.value if row.worst else None)),
        Column(
            "farthest",
            lambda row: visible_token(row.farthest.text) if row.farthest else "-",
            is_text=True,
        ),
        Column("at", lambda row: str(row.farthest.position) if row.farthest else "-"),
        Column("its", lambda row: _number(row.farthest.value if row.farthest else None)),
        Column("completion", lambda row: visible(row.rollout_id), is_text=True),
    ]


def _header(row: Row, place: "Place") -> Table:
    table = Table.grid(padding=(0, 2))
    models = f"student {place.shard.student[:12]}, teacher {place.shard.scored.teacher[:12]}"
    lines = [
        ("completion", row.rollout_id),
        ("row", f"{row.shard}:{row.row}, of {place.part}"),
        ("models", models),
        ("task", row.task),
        *([] if row.answer is None else [("answer", row.answer)]),
        ("finish", f"{row.finish_reason}, after {len(row.tokens):,} tokens"),
        ("reward", f"{_number(row.reward)} nats, the mean advantage"),
    ]
    for name, said in lines:
        table.add_row(Text(name, _HEADING), Text(visible(said)))
    return table


def _titled(title: str, text: Text) -> Iterator[RenderableType]:
    yield ""
    yield Text(title, _HEADING)
    yield Padding.indent(text, 2)


def _marked(tokens: Sequence[Token], scale: Scale) -> Text:
    """The completion; each token is coloured, or far ones are in brackets with their advantage."""
    text = Text()
    for token in tokens:
        far = token.advantage is not None and abs(token.advantage) >= _MARKED_NATS
        if scale.has_colours or (token.supervised and not far):
            text.append("↵\n".join(map(visible, token.text.split("\n"))), _style(token, scale))
            continue
        shown = visible_token(token.text)
        text.append(f"⟦{shown}|{token.advantage:+.1f}⟧" if token.supervised else f"⟨{shown}⟩")
        text.append("\n" if "\n" in token.text else "")
    return text


def _style(token: Token, scale: Scale) -> str:
    if token.supervised or not scale.has_colours:
        return scale.style(token.advantage)
    return _MASKED


def _legend(tokens: Sequence[Token], scale: Scale) -> Text:
    masked = not all(token.supervised for token in tokens)
    if not scale.has_colours:
        said = f"⟦token|advantage⟧ where it is {_MARKED_NATS:g} nat or more from 0"
        return Text(f"{said}; ⟨masked⟩" if masked else said)
    legend = scale.legend()
    return legend.append("masked", _MASKED) if masked else legend


def _around(tokens: Sequence[Token], at: int) -> Text:
    text = Text("" if at <= _CONTEXT else "… ")
    for token in tokens[max(0, at - _CONTEXT) : at + _CONTEXT + 1]:
        is_it = token.position == at
        shown = visible(token.text)
        text.append(f"[{shown}]" if is_it else shown, _SAMPLED if is_it else "")
    return text.append("" if at + _CONTEXT + 1 >= len(tokens) else " …")


def _token_columns(tokens: Sequence[Token], scale: Scale) -> list[Column[Token]]:
    """The most telling first."""
    loss = Column[Token]("loss", lambda t: "" if t.supervised else "masked", is_text=True)
    return [
        Column("#", lambda t: str(t.position)),
        Column("token", lambda t: Text(visible_token(t.text), _style(t, scale)), is_text=True),
        *([] if all(token.supervised for token in tokens) else [loss]),
        Column("log p", lambda t: _number(t.student_logprob)),
        Column("log q", lambda t: _number(t.teacher_logprob)),
        Column("advantage", lambda t: _number(t.advantage)),
        Column("H(p)", _entropy),
        Column("H(q)", lambda t: _number(t.teacher_entropy)),
        Column("overlap", lambda t: _number(t.overlap)),
        Column("mass p", lambda t: _number(t.mass_student)),
        Column("mass q", lambda t: _number(t.mass_teacher)),
    ]


def _fitting(
    columns: Sequence[Column[Item]], items: Sequence[Item], console: Console
) -> Iterator[RenderableType]:
    """A table, without its last columns where a terminal is too narrow, which is then said."""
    widths = [_width(column, items) + _GAP for column in columns]
    ends = [end - _GAP for end in accumulate(widths)]
    num = max(2, sum(end <= console.width for end in ends))
    yield from _lines(columns[:num], items)
    if num < len(columns):
        left = ", ".join(column.heading for column in columns[num:])
        yield f"too narrow for: {left}; all is in a pipe ('| less -S') and in --json"


def _lines(columns: Sequence[Column[Item]], items: Sequence[Item]) -> list[Text]:
    """A table's lines, all of one width. A ``rich.Table`` of 7,000 tokens would take 10 s."""
    widths = [_width(column, items) for column in columns]
    head = [Text(column.heading, _HEADING) for column in columns]
    rule = Text("─" * (sum(widths) + _GAP * (len(columns) - 1)))
    body = ([_cell(column, item) for column in columns] for item in items)
    lines = []
    for cells in (head, *body):
        line = Text()
        for column, cell, width in zip(columns, cells, widths, strict=True):
            fill = Text(" " * (width - cell.cell_len))
            line.append(" " * (_GAP if line else 0))
            line += cell + fill if column.is_text else fill + cell
        lines.append(line)
    return [lines[0], rule, *lines[1:]]


def _width(column: Column[Item], items: Sequence[Item]) -> int:
    return max([cell_len(column.heading), *(_cell(column, item).cell_len for item in items)])


def _cell(column: Column[Item], item: Item) -> Text:
    cell = column.cell(item)
    return Text(cell) if isinstance(cell, str) else cell


def _entries(title: str, entries: Sequence[Entry], tail: float | None, token: Token) -> list[Text]:
    """One model's list: rank, marks, token, its own log-prob and the other model's."""
    if not entries:
        return [Text(title, _HEADING), Text("no entries are stored")]
    logprobs: list[Column[tuple[int, Entry]]] = [
        Column("log p", lambda item: _number(item[1].student_logprob)),
        Column("log q", lambda item: _number(item[1].teacher_logprob)),
    ]
    columns: list[Column[tuple[int, Entry]]] = [
        Column("", lambda item: str(item[0])),
        Column("", lambda item: "*" if item[1].shared else " "),
        Column("", lambda item: ">" if item[1].id == token.id else " "),
        Column(
            "token",
            lambda item: Text(
                visible_token(item[1].text), _SAMPLED if item[1].id == token.id else ""
            ),
            is_text=True,
        ),
        *(logprobs if title == "student" else reversed(logprobs)),
    ]
    rest = Text(f"mass of all others: {'not stored' if tail is None else f'{tail:.3f}'}")
    return [Text(title, _HEADING), *_lines(columns, list(enumerate(entries, start=1))), rest]


def _beside(left: Sequence[Text], right: Sequence[Text], console: Console) -> Iterator[Text]:
    """Side by side, or one below the other on a terminal that is too narrow."""
    widths = [max(line.cell_len for line in lines) for lines in (left, right)]
    if sum(widths) + _BETWEEN > console.width:
        yield from (*left, Text(), *right)
        return
    for one, other in zip_longest(left, right, fillvalue=Text()):
        yield one + Text(" " * (widths[0] + _BETWEEN - one.cell_len)) + other


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _entropy(token: Token) -> str:
    """Exact, or the bounds."""
    if token.student_entropy is not None:
        return _number(token.student_entropy)
    low, high = token.student_entropy_low, token.student_entropy_high
    return "-" if low is None or high is None else f"{low:.2f}-{high:.2f}"
