"""Offline-cached batch engine for on-policy distillation of language models."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .data import OpenCache, Sample, Samples, open_cache

__all__ = ["OpenCache", "Sample", "Samples", "open_cache"]


def __getattr__(name: str) -> object:
    """The public reading API, imported when it is used: the command line starts without it."""
    if name in __all__:
        from . import data

        return getattr(data, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
