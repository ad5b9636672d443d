"""Near copies of given texts: MinHash finds candidates, the exact Jaccard similarity decides."""

import re
from collections.abc import Sequence
from typing import Any

from .errors import NotInstalled

SHINGLE_WORDS = 3
NUM_PERM = 128
_SEED = 1
_MISSED = 1e-6
"""Chance at most of not looking at a pair that is at the threshold."""

_WITHOUT_SPACES = "\u3040-\u30ff\u3400-\u9fff"  # kana and ideographs: a character is a word
_WORD = re.compile(rf"[{_WITHOUT_SPACES}]|[^\W{_WITHOUT_SPACES}]+|[^\w\s]")

Shingles = frozenset[tuple[str, ...]]


def near_copies(texts: Sequence[str], of: Sequence[str], threshold: float) -> list[bool]:
    """Whether each text's similarity to any of the others is at least the threshold, in (0, 1].

    Raises:
        NotInstalled: datasketch is not there.
    """
    index = _Index([shingles(text) for text in of], threshold)
    return [index.has_near(shingles(text)) for text in texts]


def shingles(text: str) -> Shingles:
    """Every run of ``SHINGLE_WORDS`` words, in lower case; of a shorter text, all its words.

    Signs are words too: '2 + 3' and '2 - 3' are not alike.
    """
    words = _WORD.findall(text.casefold())
    starts = range(max(1, len(words) - SHINGLE_WORDS + 1))
    return frozenset(tuple(words[i : i + SHINGLE_WORDS]) for i in starts)


def jaccard(one: Shingles, other: Shingles) -> float:
    """Share of what either has that both have."""
    return len(one & other) / len(one | other)


class _Index:
    """Texts by their shingles, to be searched for one that is like another text."""

    def __init__(self, listed: Sequence[Shingles], threshold: float) -> None:
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError as error:
            raise NotInstalled(
                "datasketch is not installed", remedy="pip install 'opdcache[dedup]'"
            ) from error
        self._listed, self._threshold = listed, threshold
        self._known = Shingles().union(*listed)
        self._empty = MinHash(num_perm=NUM_PERM, seed=_SEED)
        self._lsh = MinHashLSH(num_perm=NUM_PERM, params=_bands(threshold))
        for number, one in enumerate(listed):
            self._lsh.insert(number, self._sketch(one))

    def has_near(self, one: Shingles) -> bool:
        if len(one & self._known) / len(one) < self._threshold:  # all of them together have less
            return False
        found = self._lsh.query(self._sketch(one))
        return any(jaccard(one, self._listed[number]) >= self._threshold for number in found)

    def _sketch(self, one: Shingles) -> Any:
        sketch = self._empty.copy()
        sketch.update_batch(" ".join(words).encode() for words in one)
        return sketch


def _bands(threshold: float) -> tuple[int, int]:
    """Bands and rows of the index: the longest rows that miss next to nothing.

    A pair of similarity s shares no band with probability (1 - s^rows)^bands.
    """
    rows = max(
        rows
        for rows in range(1, NUM_PERM // 2 + 1)  # the library wants two bands
        if rows == 1 or (1 - threshold**rows) ** (NUM_PERM // rows) <= _MISSED
    )
    return NUM_PERM // rows, rows
