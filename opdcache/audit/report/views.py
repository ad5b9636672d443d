"""Completions token by token: which ones a report shows, and what of them.

A long completion is shown in part, around the token that it is shown for.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from ...errors import IntegrityError, ObjectMissing, UsageError
from ...schemas.inspection import Entry, Row, Token
from ...store.cache import Cache
from ..rows import Texts, read_row
from ..targets import Shard, Target
from ..worst import MEASURES, Measure, Place, Worst

MOST_TOKENS = 256
MOST_ENTRIES = 16
NUM_RANDOM = 2
WORST: dict[Measure, str] = {"advantage": "least", "disagreement": "largest"}
_STEPS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Advantages, nats, from which on a token's colour is stronger."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A completion to show.

    Attributes:
        focus: position of the token that it is shown for; None to show its start.
        why: in words.
    """

    part: str
    shard: Shard
    row: int
    focus: int | None
    why: str


@dataclass(frozen=True, slots=True)
class View:
    """A completion, or a part of it.

    Attributes:
        why: in words, all that it is shown for.
        num_tokens: of the completion.
        tokens: those that are shown.
        focus: place in ``tokens`` of the token that is looked at first.
    """

    part: str
    key: str
    row: Row
    why: list[str]
    num_tokens: int
    tokens: tuple[Token, ...]
    focus: int

    @property
    def name(self) -> str:
        """Of its element."""
        first = f"-{self.first}" if self.first else ""
        return f"view-{self.key[:12]}-{self.row.row}{first}"

    @property
    def first(self) -> int:
        """Position of the first shown token."""
        return self.tokens[0].position if self.tokens else 0

    def holds(self, wanted: Wanted) -> bool:
        """Whether it shows this too."""
        here = (self.key, self.row.row) == (wanted.shard.scored.rollouts.key, wanted.row)
        focus = wanted.focus if wanted.focus is not None else 0
        return here and (not self.tokens or 0 <= focus - self.first < len(self.tokens))


def worst_first(worst: Worst) -> Iterator[Wanted]:
    """The worst completions and tokens by each measure, then those at random."""
    for measure in MEASURES:
        for rank, found in enumerate(worst.completions(measure), 1):
            place = found.worst[measure]
            why = f"number {rank} by {WORST[measure]} mean {measure}"
            yield Wanted(found.part, found.shard, found.row, place.position, why)
    for measure in MEASURES:
        for rank, (found, place) in enumerate(worst.tokens(measure), 1):
            why = f"its token {place.position} is number {rank} by {WORST[measure]} {measure}"
            yield Wanted(found.part, found.shard, found.row, place.position, why)
    for found in worst.drawn():
        focus = _position(found.worst.get("advantage"))
        yield Wanted(found.part, found.shard, found.row, focus, "drawn at random")


def _position(place: Place | None) -> int | None:
    return None if place is None else place.position


def chosen(target: Target, names: Sequence[str]) -> Iterator[Wanted]:
    """Completions by ``SHARD:ROW``, a key being how the one of a rollout shard begins.

    Raises:
        UsageError: a name is none, or names no shard of what is looked at, or several.
    """
    for name in names:
        key, _, row = name.rpartition(":")
        if not key or not row.isdecimal():
            raise UsageError(
                "names no completion", where=name, expected="SHARD:ROW, such as 4f1a0c:12"
            )
        found = {
            shard.scored.rollouts.key: (part.name, shard)
            for part in target.parts
            for shard in part.shards
            if shard.scored.rollouts.key.startswith(key)
        }
        if len(found) != 1:
            raise UsageError(
                f"{len(found)} rollout shards of these rounds have a key that starts with {key!r}",
                where=name,
                remedy="'opdcache cache ls' shows the keys",
            )
        ((part, shard),) = found.values()
        num = shard.scored.rollouts.num_rows
        if int(row) >= num:
            raise UsageError("no such row", where=name, expected=f"0 to {num - 1}")
        yield Wanted(part, shard, int(row), None, "asked for")


def views(cache: Cache, wanted: Iterable[Wanted], texts: Texts, k: int) -> list[View]:
    """What is wanted, each part of a completion once; without shards that can be read no more."""
    shown = list[View]()
    for one in wanted:
        for view in shown:
            if view.holds(one):
                view.why.append(one.why)
                break
        else:
            with suppress(IntegrityError, ObjectMissing):  # a finding of the audit says so
                shown.append(_view(one, read_row(cache, one.shard, one.row, texts, k=k)))
    return shown


def _view(wanted: Wanted, row: Row) -> View:
    focus = wanted.focus if wanted.focus is not None else 0
    first = max(0, min(focus - MOST_TOKENS // 2, len(row.tokens) - MOST_TOKENS))
    tokens = row.tokens[first : first + MOST_TOKENS]
    kept = row.model_copy(update={"tokens": ()})
    key = wanted.shard.scored.rollouts.key
    return View(wanted.part, key, kept, [wanted.why], len(row.tokens), tokens, focus - first)


def found_in(shown: Sequence[View], wanted: Wanted) -> View | None:
    """The view that shows it."""
    return next((view for view in shown if view.holds(wanted)), None)


def visible(text: str) -> str:
    """A token's text with characters that cannot be seen, or that act on others, made visible."""
    return "".join(map(_visible, text)) or "\N{EMPTY SET}"


def _visible(character: str) -> str:
    if character == "\n":
        return "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}\n"
    if character == "\t":
        return "\N{RIGHTWARDS ARROW}\t"
    if character.isprintable():
        return character
    return f"\\u{{{ord(character):x}}}"


def step_of(token: Token) -> str:
    """Name of a token's colour: its sign and how strong; nothing of one without a value."""
    if token.advantage is None or not token.supervised:
        return "none"
    strength = sum(abs(token.advantage) >= step for step in _STEPS)
    return f"{'minus' if token.advantage < 0 else 'plus'}-{strength}" if strength else "near"


def packed(token: Token) -> list[object]:
    """What is shown of a token when it is looked at, as short as JSON allows; see ``report.js``."""
    return [
        token.position,
        token.id,
        token.supervised,
        *map(
            _short,
            (
                token.student_logprob,
                token.teacher_logprob,
                token.advantage,
                token.student_entropy,
                token.student_entropy_low,
                token.student_entropy_high,
                token.teacher_entropy,
                token.overlap,
                token.mass_student,
                token.mass_teacher,
            ),
        ),
        [_packed(entry, *ranks) for entry, *ranks in _merged(token)],
        len(token.student[:MOST_ENTRIES]),
        len(token.teacher[:MOST_ENTRIES]),
    ]


def _packed(entry: Entry, student_rank: int, teacher_rank: int) -> list[object]:
    values = map(_short, (entry.student_logprob, entry.teacher_logprob))
    return [visible(entry.text).replace("\n", ""), entry.id, *values, student_rank, teacher_rank]


def _merged(token: Token) -> Iterator[tuple[Entry, int, int]]:
    """Both lists as one, likeliest first by either model, with the ranks in each; 0 is none."""
    student, teacher = (
        {entry.id: rank for rank, entry in enumerate(entries[:MOST_ENTRIES], 1)}
        for entries in (token.student, token.teacher)
    )
    every = {e.id: e for e in (*token.teacher[:MOST_ENTRIES], *token.student[:MOST_ENTRIES])}
    worst = MOST_ENTRIES + 1
    order = sorted(every, key=lambda id: min(teacher.get(id, worst), student.get(id, worst)))
    for id in order:
        yield every[id], student.get(id, 0), teacher.get(id, 0)


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
