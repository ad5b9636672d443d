"""Functions of the user's that a run file names as ``module:function``: found, and called."""

import importlib
import math
from collections.abc import Callable
from typing import Any

from .errors import ConfigError, OpdcacheError


def find_function(name: str, place: str) -> Callable[..., Any]:
    """The function behind ``module:function``.

    Args:
        place: key of the run file that names it.

    Raises:
        ConfigError: there is none.
    """
    module, _, attribute = name.partition(":")
    try:
        found: object = getattr(importlib.import_module(module), attribute, None)
    except Exception as error:  # it is the user's code
        raise ConfigError(
            f"{place}: {module!r} cannot be imported: {type(error).__name__}: {error}",
            remedy="install the module, or put its folder into PYTHONPATH",
        ) from error
    if not callable(found):
        raise ConfigError(f"{place}: {module!r} has no function {attribute!r}")
    return found


def finite(call: Callable[[], Any], place: str, where: str) -> float:
    """What a call of such a function gives, as a finite number.

    Args:
        place: key of the run file that names it.
        where: what it was called on.

    Raises:
        ConfigError: it fails, or gives something else; names both places.
        OpdcacheError: one that the function itself raised.
    """
    try:
        value = float(call())
    except OpdcacheError:
        raise
    except Exception as error:  # it is the user's code
        raise ConfigError(
            f"{place}: the function failed: {type(error).__name__}: {error}", where=where
        ) from error
    if not math.isfinite(value):
        raise ConfigError(f"{place}: the function gave {value}", where=where)
    return value
