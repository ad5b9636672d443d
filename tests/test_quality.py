"""What is wrong with a completion as a text, at the edges of each sign."""

import random
import string
import time
import zlib

import pytest

from opdcache.quality import counted, faults, repetitive, truncated


def noise(seed: int, length: int) -> str:
    """Text that repeats nothing."""
    return "".join(random.Random(seed).choices(string.ascii_letters + string.digits, k=length))


def test_a_completion_that_was_cut_off_is_truncated() -> None:
    assert truncated("length")
    assert not any(map(truncated, ("stop", "unknown")))


@pytest.mark.parametrize(("times", "expected"), [(4, False), (5, True)])
def test_a_line_of_20_characters_may_stand_four_times(times: int, expected: bool) -> None:
    line = noise(0, 20)
    text = "\n".join(f"{line}\n{noise(i, 300)}" for i in range(1, times + 1))
    assert repetitive(text) is expected
    assert not repetitive(text.replace(line, line[:19]))


@pytest.mark.parametrize(("times", "expected"), [(2, False), (3, True)])
def test_a_hundred_characters_in_a_row_may_stand_twice(times: int, expected: bool) -> None:
    gram = noise(0, 100)
    text = "".join(f"{noise(i, 211 + i)}{gram}" for i in range(1, times + 1))
    assert repetitive(text) is expected
    assert not repetitive(text.replace(gram, gram[:99]))


DENSE = "".join(f"{'ab' * 45}{number}" for number in range(10, 99))
"""Compresses well, and has neither a second line nor 100 characters that stand in it twice."""


def test_a_text_may_be_ten_times_as_long_as_compressed() -> None:
    def ratio(text: str) -> float:
        return len(text) / len(zlib.compress(text.encode()))

    texts = [DENSE + noise(3, length) for length in range(0, 2000, 100)]
    assert [repetitive(text) for text in texts] == [ratio(text) > 10 for text in texts]
    assert ratio(texts[0]) > 10 > ratio(texts[-1])


def test_what_lies_before_the_last_ten_thousand_characters_is_not_compressed() -> None:
    long = "".join(f"{'ab' * 45}{number}" for number in range(100, 230))
    before = noise(3, 5_000)
    assert len(before + long) < 10 * len(zlib.compress((before + long).encode()))
    assert repetitive(before + long)
    assert not repetitive(long + before)


def test_texts_without_repetition_are_not_repetitive() -> None:
    assert not any(map(repetitive, ("", "a", "\n" * 3, noise(4, 50_000), "größe " + noise(5, 99))))


def test_half_a_character_is_no_error() -> None:
    assert not repetitive("\ud800" + noise(6, 200))


def test_every_fault_is_counted_and_none_is_said_as_zero() -> None:
    loop = noise(7, 100) * 3
    assert faults("length", loop) == ("truncated", "repetitive")
    assert counted([("length", "fine"), ("length", loop), ("stop", loop), ("stop", "")]) == {
        "truncated": 2,
        "repetitive": 2,
    }
    assert counted([]) == {"truncated": 0, "repetitive": 0}


def test_a_long_text_is_judged_quickly() -> None:
    began = time.monotonic()
    repetitive(noise(8, 100_000))
    assert time.monotonic() - began < 5  # some 0.1 s, on a machine that does nothing else
