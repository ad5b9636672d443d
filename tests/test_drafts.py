"""A full disk as one error."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from opdcache.errors import StoreFull
from opdcache.train.drafts import space

Usage = namedtuple("Usage", ["total", "used", "free"])


@pytest.mark.parametrize(
    ("error", "free"),
    [
        # What torch said of a disk that had some blocks left, of an archive of a gigabyte.
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64"), 1_300_000),
        (OSError(28, "No space left on device"), 2**40),
    ],
)
def test_a_save_that_the_disk_has_no_room_for_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, free: int
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**40, 2**40 - free, free))
    with (
        pytest.raises(StoreFull, match="no space left; free some") as caught,
        space(tmp_path / "a"),
    ):
        raise error
    assert len(str(caught.value).splitlines()) == 1
    assert caught.value.__cause__ is error


def test_another_fault_of_a_save_stays_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**40, 0, 2**40))
    with pytest.raises(RuntimeError, match="unexpected pos"), space(tmp_path):
        raise RuntimeError("unexpected pos 64 vs 32")
