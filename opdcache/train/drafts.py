"""Folders that appear whole or not at all, and a full disk as one error."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import StoreFull

_LEAST_FREE_BYTES = 2**24
"""A large write fails before the last byte is taken, and some file systems keep blocks back."""


def nearest(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(p for p in (path, *path.parents) if p.exists())


@contextmanager
def space(path: Path) -> Iterator[None]:
    """A full disk as one error: torch, DeepSpeed and safetensors each raise their own."""
    try:
        yield
    except Exception as error:
        full = shutil.disk_usage(nearest(path)).free < _LEAST_FREE_BYTES
        if full or "no space left" in str(error).lower():
            raise StoreFull(
                "no space left", where=path, remedy="free some, then run the same command again"
            ) from error
        raise


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A draft folder that takes the folder's place when the block ends well."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield draft
        draft.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
