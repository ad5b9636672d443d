"""Job templates: plain files, in which ``@{name}`` stands for what a launcher fills in."""

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from string import Template

from ..errors import ConfigError
from ..schemas.launch import LaunchConfig

_NAMES = r"@(?:(?P<escaped>@)|\{(?P<braced>[a-z_]+)\}|(?P<named>(?!))|(?P<invalid>(?!)))"


class _Template(Template):
    """``@{name}`` alone is filled in, and ``@@`` is one @: shell and YAML keep their own signs."""

    delimiter = "@"
    pattern = _NAMES  # type: ignore[assignment]  # it is compiled when the class is made


def filled(launch: LaunchConfig, name: str, values: Mapping[str, object]) -> str:
    """A template with its names filled in.

    Args:
        name: such as ``slurm/train.sh``: in ``launch.templates``, or else in ``jobs/templates``.

    Raises:
        ConfigError: the user's template cannot be read, or asks for a name that there is not.
    """
    own = None if launch.templates is None else Path(launch.templates) / name
    if own is not None and not own.parent.is_dir():
        raise ConfigError(
            "launch.templates: there is no such folder",
            where=own.parent,
            remedy="copy the one of jobs/templates",
        )
    try:
        if own is not None and own.exists():
            text = own.read_text()
        else:
            text = files(__package__).joinpath("templates", *name.split("/")).read_text()
        return _Template(text).substitute(values)
    except OSError as error:
        raise ConfigError(f"template cannot be read: {error.strerror}", where=own) from error
    except KeyError as error:
        raise ConfigError(
            f"template: nothing is called @{{{error.args[0]}}}",
            where=own or name,
            remedy=f"known names: {', '.join(sorted(values))}",
        ) from error
