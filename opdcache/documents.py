"""JSON documents on a shared file system: read whole, written whole or not at all."""

import os
import secrets
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from .errors import InvalidShard
from .schemas.base import Model

AnyModel = TypeVar("AnyModel", bound=Model)


def read(kind: type[AnyModel], path: Path) -> AnyModel | None:
    """A document; None when there is none.

    Raises:
        InvalidShard: it is not of its kind.
    """
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise InvalidShard(
            f"not a {kind.__name__} file", where=path, remedy="delete it and run the stage again"
        ) from error


def create(path: Path, value: Model, *, anew: bool = False) -> bool:
    """Write a document, unless there is one; whether it did.

    Args:
        anew: replace what is there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    draft.write_text(value.model_dump_json(indent=1, by_alias=True) + "\n")
    if anew:
        draft.replace(path)
        return True
    try:
        os.link(draft, path)
    except FileExistsError:
        return False
    finally:
        draft.unlink()
    return True
