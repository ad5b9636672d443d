"""A terminal to print on, and untrusted texts made safe for it."""

from collections.abc import Iterable

import click
from rich.console import Console, RenderableType
from rich.text import Text

_AS_WIDE_AS_NEEDED = 100_000
_SHOWN = {"\n": "↵", "\t": "⇥"}
_STEPS = (0.3, 1.0, 3.0)
_MANY = (
    ("#4d2c00 on #fee0b6", "#000000 on #f1a340", "#ffffff on #b35806"),
    ("#2b1a4d on #d8daeb", "#000000 on #998ec3", "#ffffff on #542788"),
)
"""Below and above 0, by size: orange and purple (ColorBrewer's PuOr), which people with any colour
vision tell apart."""
_FEW = (
    ("yellow", "black on yellow", "bold white on red"),
    ("cyan", "black on cyan", "bold white on blue"),
)
"""The same of a terminal's own sixteen."""


def screen() -> Console:
    """Standard output: as wide as its lines where it is no terminal; texts are printed as they are.

    NO_COLOR, FORCE_COLOR and COLUMNS mean what they do elsewhere.
    """
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = _AS_WIDE_AS_NEEDED
    return console


def show(lines: Iterable[RenderableType], console: Console) -> None:
    """Print them, without the spaces that fill lines up."""
    with console.capture() as capture:
        for line in lines:
            console.print(line)
    text = "\n".join(line.rstrip() for line in capture.get().rstrip().split("\n"))
    click.echo(text, color=console.is_terminal)


def visible(text: str) -> str:
    """The text on one line, with nothing in it that a terminal would act on."""
    return "".join(_SHOWN.get(c) or (c if c.isprintable() else _escaped(c)) for c in text)


def visible_token(text: str) -> str:
    """The same, with its spaces to be seen."""
    return visible(text).replace(" ", "␣")


def visible_lines(text: str) -> str:
    """The same, with its line breaks as they are."""
    return "\n".join(map(visible, text.split("\n")))


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


class Scale:
    """Colours of advantages, as a terminal can show them.

    Attributes:
        has_colours: whether it shows any; where it does not, nothing has a style.
    """

    def __init__(self, console: Console) -> None:
        self.has_colours = console.color_system is not None and not console.no_color
        self._below, self._above = _FEW if console.color_system == "standard" else _MANY

    def style(self, advantage: float | None) -> str:
        """Of a token; empty where the advantage is near 0 or not known."""
        if advantage is None or not self.has_colours:
            return ""
        steps = sum(abs(advantage) >= step for step in _STEPS)
        return (self._below if advantage < 0 else self._above)[steps - 1] if steps else ""

    def legend(self) -> Text:
        """Every colour with what it says, in nats, from the least advantage on."""
        text = Text("advantage, nats: ")
        for sign, steps, word in ((-1, reversed(_STEPS), "to"), (1, _STEPS, "from")):
            for step in steps:
                text.append(f" {word} {sign * step:g} ", self.style(sign * step)).append(" ")
        return text
