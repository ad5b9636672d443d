"""Options and opening of a run, as the commands share them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .progress import make_progress

if TYPE_CHECKING:
    from ..rounds import Step
    from ..runfolder import RunContext
    from ..schemas.audit import AuditLimits
    from ..schemas.comparison import CompareLimits
    from ..stage import Worker

Command = TypeVar("Command", bound=Callable[..., Any])
Limits = TypeVar("Limits", "AuditLimits", "CompareLimits")

run_file = click.argument("run_file", metavar="RUN.yaml", type=click.Path(path_type=Path))


def stage_options(function: Command) -> Command:
    """RUN.yaml and --round."""
    option = click.option("--round", "round_index", type=click.IntRange(min=0), required=True)
    return run_file(option(function))


def worker_option(function: Command) -> Command:
    """--worker i/n."""
    option = click.option(
        "--worker",
        default="0/1",
        metavar="I/N",
        help="this worker's index and the number of workers, such as 2/8",
        show_default=True,
    )
    return option(function)


def cache_option(function: Command) -> Command:
    """--cache URL."""
    option = click.option("--cache", metavar="URL", help="where keys are looked up")
    return option(function)


def chosen_rounds(function: Command) -> Command:
    """--round R, many times."""
    option = click.option(
        "--round",
        "rounds",
        type=click.IntRange(min=0),
        multiple=True,
        metavar="R",
        help="of a run, may be given again; every scored one by default",
    )
    return option(function)


def reference_option(function: Command) -> Command:
    """--reference NAME."""
    option = click.option(
        "--reference", metavar="NAME", help="a reference's scores in the teacher's place"
    )
    return option(function)


def k_option(function: Command) -> Command:
    """-k K."""
    option = click.option(
        "-k",
        "k",
        type=click.IntRange(min=1),
        default=16,
        show_default=True,
        help="likeliest entries of each model that are compared",
    )
    return option(function)


def looking_options(function: Command) -> Command:
    """-k, --chunk and --limit."""
    for option in (
        click.option(
            "--limit",
            "limits",
            multiple=True,
            metavar="NAME=VALUE",
            help="another limit for the verdict; a wrong name lists them",
        ),
        click.option(
            "--chunk",
            "chunk_tokens",
            type=click.IntRange(min=1),
            default=1024,
            show_default=True,
            metavar="TOKENS",
            help="length of the position chunks",
        ),
        k_option,
    ):
        function = option(function)
    return function


def verifier_option(function: Command) -> Command:
    """--verifier NAME."""
    option = click.option(
        "--verifier",
        metavar="NAME",
        help="what labels completions: reasoning_gym, math, module:function or none; by default "
        "the verifier of the run's evaluation",
    )
    return option(function)


def changed_limits(own: "Limits", given: Sequence[str]) -> "Limits":
    """Limits, some of them replaced by ``NAME=VALUE``."""
    from pydantic import ValidationError

    changed = dict(item.partition("=")[::2] for item in given)
    try:
        return type(own).model_validate({**own.model_dump(), **changed})
    except ValidationError as error:
        first = error.errors()[0]
        known = ", ".join(type(own).model_fields)
        text = f"{first['loc'][0]}: {first['msg']} (known limits: {known})"
        raise click.BadParameter(text, param_hint="--limit") from error


def num_ranks_option(function: Command) -> Command:
    """--nproc N."""
    option = click.option(
        "--nproc",
        "num_ranks",
        type=click.IntRange(min=1),
        metavar="N",
        help="start N ranks of the learner on this machine",
    )
    return option(function)


def parse_worker(text: str) -> "Worker":
    """``i/n`` as a worker."""
    from ..stage import Worker

    try:
        index, count = (int(part) for part in text.split("/"))
    except ValueError:
        index, count = -1, 0
    if not 0 <= index < count:
        raise click.BadParameter("expected I/N with 0 <= I < N, such as 2/8", param_hint="--worker")
    return Worker(index, count)


def open_context(path: Path, worker: str = "0/1", step: "Step | None" = None) -> "RunContext":
    """The run of a run file, checked, resolved and opened; ``step`` must be one of its plan."""
    from ..errors import ConfigError
    from ..rounds import steps
    from ..runfile import load_run
    from ..runfolder import open_run

    parsed = parse_worker(worker)
    config = load_run(path)
    if step is not None and step not in steps(config):
        raise ConfigError(
            f"there is no {step.stage} stage of round {step.round} in this run",
            where=path,
            remedy=f"its rounds are 0 to {config.rounds - 1}",
        )
    return open_run(config, make_progress(parsed), parsed)
