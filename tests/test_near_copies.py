"""Near copies: what counts as a word, and that the index decides as comparing all pairs would."""

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opdcache.errors import NotInstalled
from opdcache.near_copies import near_copies, shingles

SENTENCE = "one two three four five six seven eight nine ten"
LIKE = "one two three four five six seven eight nine zero"  # shares 7 shingles of 9


def similarity(one: str, other: str) -> float:
    """Jaccard similarity of texts of at least three plain words, spelled out."""
    runs = []
    for text in (one, other):
        words = text.split()
        runs.append([" ".join(words[i : i + 3]) for i in range(len(words) - 2)])
    both = {run for run in runs[0] if run in runs[1]}
    return len(both) / len({*runs[0], *runs[1]})


TEXTS = st.lists(st.sampled_from("abc"), min_size=3, max_size=12).map(" ".join)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(TEXTS, max_size=8), st.lists(TEXTS, max_size=8), st.sampled_from([0.2, 0.5, 0.8, 1.0])
)
def test_near_copies_are_those_that_comparing_every_pair_finds(
    texts: list[str], of: list[str], threshold: float
) -> None:
    expected = [any(similarity(text, other) >= threshold for other in of) for text in texts]

    assert near_copies(texts, of, threshold) == expected


@pytest.mark.parametrize(("threshold", "near"), [(0.77, True), (0.78, False)])
def test_a_pair_is_near_from_the_threshold_on(threshold: float, near: bool) -> None:
    assert near_copies([LIKE], [SENTENCE], threshold) == [near]


def test_a_similarity_that_is_the_threshold_is_near() -> None:
    assert near_copies([SENTENCE], [" ".join(SENTENCE.split()[:8])], 0.75) == [True]


def test_a_part_of_a_long_text_is_not_near() -> None:
    assert near_copies(["one two three"], [SENTENCE], 0.8) == [False]


def test_what_several_texts_hold_together_makes_no_near_copy() -> None:
    halves = ["one two three four five six", "five six seven eight nine ten"]

    assert near_copies([SENTENCE], halves, 0.6) == [False]


def test_case_and_spaces_make_no_difference() -> None:
    assert near_copies(["One  TWO\nthree Four"], ["one two three four"], 1.0) == [True]


def test_signs_make_a_difference() -> None:
    assert near_copies(["2 + 3", "2+3"], ["2 - 3"], 0.2) == [False, False]
    assert near_copies(["2+3"], ["2 + 3"], 1.0) == [True]


def test_a_language_without_spaces_is_compared_by_characters() -> None:
    one, other = "请问三加四等于多少呢?", "请问三加五等于多少呢?"

    assert len(shingles(one)) == 9
    assert near_copies([other], [one], 0.5) == [True]  # 6 of 12
    assert near_copies([other], [one], 0.51) == [False]


def test_texts_of_few_words_are_compared_whole() -> None:
    assert near_copies(["hi", "hi there", "", "?"], ["Hi there", "?"], 0.8) == [
        False,
        True,
        False,
        True,
    ]


def test_nothing_is_near_to_nothing() -> None:
    assert near_copies([SENTENCE], [], 0.8) == [False]


def test_a_missing_library_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasketch", None)

    with pytest.raises(NotInstalled, match=r"not installed; pip install 'opdcache\[dedup\]'"):
        near_copies([SENTENCE], [SENTENCE], 0.8)
