"""What is wrong with a completion as a text: counted in manifests, and dropped where a run says so.

Nothing here is applied by itself: rollouts stay what the policy sampled.
"""

import zlib
from collections import Counter
from collections.abc import Iterable, Sequence

from .schemas.manifests import Quality

_LAST_CHARACTERS, _MOST_COMPRESSED = 10_000, 10
_LINE_CHARACTERS, _MOST_LINES = 20, 5
_GRAM_CHARACTERS, _MOST_GRAMS = 100, 3


def faults(finish_reason: str, text: str) -> tuple[Quality, ...]:
    """Everything that is wrong with a completion."""
    found: tuple[Quality, ...] = ("truncated",) if truncated(finish_reason) else ()
    return (*found, "repetitive") if repetitive(text) else found


def counted(completions: Iterable[tuple[str, str]]) -> dict[Quality, int]:
    """How many completions, given as finish reason and text, have each fault; 0 is said too."""
    counts: dict[Quality, int] = {"truncated": 0, "repetitive": 0}
    for finish_reason, text in completions:
        for fault in faults(finish_reason, text):
            counts[fault] += 1
    return counts


def truncated(finish_reason: str) -> bool:
    """Whether a completion was cut off at its longest."""
    return finish_reason == "length"


def repetitive(text: str) -> bool:
    """Whether a text repeats itself, by any of three signs.

    zlib makes less than a tenth of its last 10,000 characters; a line of 20 characters or more
    stands there 5 times; any 100 characters in a row stand there 3 times, at any offsets.
    """
    last = text[-_LAST_CHARACTERS:].encode(errors="replace")
    if len(last) > _MOST_COMPRESSED * len(zlib.compress(last)):
        return True
    lines = [line for line in text.splitlines() if len(line.strip()) >= _LINE_CHARACTERS]
    if _any_stands(lines, _MOST_LINES):
        return True
    starts = range(len(text) - _GRAM_CHARACTERS + 1)
    return _any_stands([text[i : i + _GRAM_CHARACTERS] for i in starts], _MOST_GRAMS)


def _any_stands(pieces: Sequence[str], times: int) -> bool:
    """Whether a piece stands among the pieces so many times."""
    return max(Counter(pieces).values(), default=0) >= times
