"""Storage: five operations alike on every store, and its faults as ours."""

from pathlib import Path

import obstore
import pytest
from obstore.exceptions import GenericError

from opdcache.errors import (
    NotAllowed,
    ObjectMissing,
    OpdcacheError,
    StoreError,
    StoreFull,
    StoreUnavailable,
)
from opdcache.store.objects import ObjectStore


@pytest.fixture
def objects(store_url: str) -> ObjectStore:
    return ObjectStore(store_url)


def test_create_writes_once(objects: ObjectStore) -> None:
    assert objects.create("a/b", b"first")
    assert not objects.create("a/b", b"second")
    assert objects.get("a/b") == b"first"


def test_put_replaces(objects: ObjectStore) -> None:
    objects.put("a", b"first")
    objects.put("a", b"second")

    assert objects.get("a") == b"second"
    info = objects.info("a")
    assert info is not None
    assert info.size_bytes == 6


def test_an_object_that_is_not_there_is_missing(objects: ObjectStore) -> None:
    with pytest.raises(ObjectMissing, match="a/b"):
        objects.get("a/b")
    assert objects.info("a/b") is None
    objects.delete("a/b")


def test_a_listing_has_what_is_below_a_folder_and_no_more(objects: ObjectStore) -> None:
    for path in ("a/b/1", "a/b/c/2", "a/bc/3", "a/b4"):
        objects.put(path, b"")

    assert sorted(info.path for info in objects.list("a/b")) == ["a/b/1", "a/b/c/2"]
    assert list(objects.list("nowhere")) == []


def refuse(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def put(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(obstore, "put", put)


@pytest.mark.parametrize(
    "text",
    [
        "Generic LocalFileSystem error: Unable to copy data to file: No space left on device "
        "(os error 28)\n\nDebug source:\nGeneric",
        "Generic LocalFileSystem error: Disk quota exceeded (os error 122)",
    ],
)
def test_a_full_disk_is_one_line_and_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, objects: ObjectStore, text: str
) -> None:
    refuse(monkeypatch, GenericError(text))

    for write in (objects.put, objects.create):
        with pytest.raises(StoreFull, match="no space left; free some") as caught:
            write("data/x", b"")
        assert "data/x" in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
        assert caught.value.exit_code == 1


def test_a_fault_that_may_pass_asks_to_try_again(
    monkeypatch: pytest.MonkeyPatch, objects: ObjectStore
) -> None:
    refuse(monkeypatch, GenericError("Generic S3 error: error sending request: timed out\nx"))

    with pytest.raises(StoreUnavailable) as caught:
        objects.put("x", b"")

    assert caught.value.exit_code == 75


def test_a_refusal_to_write_is_no_passing_fault(
    monkeypatch: pytest.MonkeyPatch, objects: ObjectStore
) -> None:
    refuse(monkeypatch, PermissionError("permission denied"))

    with pytest.raises(NotAllowed, match="not allowed; check the permissions") as caught:
        objects.put("x", b"")

    assert caught.value.exit_code == 1


@pytest.mark.parametrize("name", ["a500c", "e503", "retro", "reset", "connection", "quota"])
def test_a_fault_is_judged_by_what_happened_and_not_by_the_path(tmp_path: Path, name: str) -> None:
    objects = ObjectStore(str(tmp_path))
    objects.put(name, b"a file where a folder would have to be")

    with pytest.raises(StoreError) as caught:
        objects.put(f"{name}/x", b"")

    assert type(caught.value) is StoreError


def test_a_cache_where_a_file_is_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")

    with pytest.raises(StoreError, match="it is a file; give a folder or a URL"):
        ObjectStore(str(file))


def test_a_url_of_no_known_kind_is_refused() -> None:
    with pytest.raises(OpdcacheError, match="foo://x"):
        ObjectStore("foo://x")
