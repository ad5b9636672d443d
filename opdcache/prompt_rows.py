"""Rows of files and of prompt sources, each with its place for people.

What a row means is left to ``opdcache.prompts`` and ``opdcache.importing``.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .errors import NotInstalled, PromptError
from .schemas.prompts import HuggingFaceSource, JsonlSource, ParquetSource, RowSource

_TEXTS = frozenset({"prompt", "messages"})
_LABELS = ("id", "task", "answer")


def rows(
    source: JsonlSource | ParquetSource | HuggingFaceSource,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row's place and what it holds of prompt, messages, id, task and answer.

    Raises:
        PromptError: the source cannot be read, or a row has no column of the text or one that
            ``columns`` names; tells which there are.
        NotInstalled: the source's library is not there.
    """
    match source:
        case JsonlSource():
            return _jsonl(source)
        case ParquetSource():
            return _parquet(source)
        case HuggingFaceSource():
            return _huggingface(source)


def file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows of a Parquet file (by its suffix) or of JSON Lines as they are, each with its place.

    Raises:
        PromptError: the file cannot be read, or is malformed.
    """
    if path.suffix != ".parquet":
        yield from _json_lines(path)
        return
    for number, row in enumerate(_table(path).to_pylist()):
        yield f"{path} row {number}", row


def _jsonl(source: JsonlSource) -> Iterator[tuple[str, dict[str, Any]]]:
    for place, row in _json_lines(Path(source.path)):
        if not isinstance(row, dict):
            raise PromptError("a row is an object", where=place, got=type(row).__name__)
        yield place, {name: row[column] for name, column in _columns(source, row, place).items()}


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise PromptError(f"file cannot be read: {reason}", where=path) from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield f"{path}:{number}", json.loads(line)
        except ValueError as error:
            raise PromptError(
                f"not JSON: {error}", where=f"{path}:{number}", remedy="one JSON object a line"
            ) from error


def _parquet(source: ParquetSource) -> Iterator[tuple[str, dict[str, Any]]]:
    table = _table(Path(source.path))
    columns = _columns(source, table.column_names, source.path)
    ours = table.select(list(columns.values())).rename_columns(list(columns))
    for number, row in enumerate(ours.to_pylist()):
        yield f"{source.path} row {number}", row


def _table(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise PromptError(f"not a readable Parquet file: {error}", where=path) from error


def _huggingface(source: HuggingFaceSource) -> Iterator[tuple[str, dict[str, Any]]]:
    dataset = _dataset(source)
    columns = _columns(source, dataset.column_names, source.dataset)
    ours = dataset.select_columns(list(dict.fromkeys(columns.values())))
    for number, row in enumerate(ours):
        place = f"{source.dataset} row {number}"
        yield place, {name: row[column] for name, column in columns.items()}


def _dataset(source: HuggingFaceSource) -> Any:
    """One split of a saved or a hub's dataset."""
    try:
        import datasets
    except ImportError as error:
        raise NotInstalled("datasets is not installed", remedy="pip install datasets") from error
    try:
        if Path(source.dataset).is_absolute():
            return _split(datasets.load_from_disk(source.dataset), source)
        split = source.split or "train"
        return datasets.load_dataset(
            source.dataset, source.name, split=split, revision=source.revision
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise PromptError(
            f"not a dataset that can be loaded: {error}",
            where=source.dataset,
            remedy="give a hub id, or a folder that save_to_disk wrote, relative to the run file",
        ) from error


def _split(saved: Any, source: HuggingFaceSource) -> Any:
    """The split of what a folder holds: a dataset, or a mapping of splits to datasets."""
    if not isinstance(saved, dict):
        if source.split in (None, saved.split):
            return saved
        raise PromptError(
            f"no split {source.split!r}: the folder holds one dataset",
            where=source.dataset,
            remedy="take the source's split out",
        )
    wanted = source.split or "train"
    if wanted not in saved:
        raise PromptError(
            f"no split {wanted!r}",
            where=source.dataset,
            expected=f"one of {', '.join(map(str, saved))}",
            remedy="set the source's split",
        )
    return saved[wanted]


def _columns(source: RowSource, present: Iterable[str], place: str) -> dict[str, str]:
    """Our names of the columns that are there, and theirs.

    A text that is named leaves out the other kind of text, which may hold the completion too.
    """
    there = list(present)
    named = {name: column for name, column in source.columns if column is not None}
    texts = _TEXTS & named.keys() or _TEXTS
    ours = {name: named.get(name, name) for name in (*sorted(texts), *_LABELS)}
    found = {name: column for name, column in ours.items() if column in there}
    missing = [repr(column) for column in named.values() if column not in there]
    if not missing and not texts & found.keys():
        missing = ["'prompt' or 'messages'"]
    if missing:
        raise PromptError(
            f"no column {missing[0]}",
            where=place,
            got=f"columns {', '.join(map(str, there))}",
            remedy="name the source's own in 'columns'",
        )
    return found
