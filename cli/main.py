"""The console script: finds the command, and turns errors into one line and an exit code."""

import errno
import os
import sys
import traceback

import click

from ..errors import OpdcacheError, StoreError, StoreFull, UsageError
from . import (
    audit,
    cache,
    compare,
    demo,
    evaluate,
    inspect,
    plan,
    prompts,
    recipes,
    report,
    rollout,
    run,
    score,
    status,
    submit,
    train,
)

_EXTRAS = frozenset(
    {"torch", "transformers", "vllm", "deepspeed", "tensorboard", "matplotlib", "huggingface_hub"}
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="opdcache")
def cli() -> None:
    """Offline-cached, batch on-policy distillation of language models."""


_COMMANDS = (
    *(run, submit, plan, rollout, score, train, evaluate),
    *(audit, inspect, compare, report, prompts, status, cache, recipes, demo),
)
for module in _COMMANDS:
    cli.add_command(module.command)


def main() -> None:
    """Run the command line; exits 0, 1 failure, 2 usage, 3 verification, 75 try again."""
    try:
        code = _exit_code(sys.argv[1:])
    except Exception:
        traceback.print_exc()
        code = 1
    if "deepspeed" in sys.modules:
        from ..train.ranks import leave

        leave(code)
    sys.exit(code)


def _exit_code(arguments: list[str]) -> int:
    try:
        code = cli.main(arguments, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except OpdcacheError as error:
        return _report(error)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped", err=True)
        return 130
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in _EXTRAS:
            raise
        return _report(
            UsageError(
                f"{error.name} is not installed",
                remedy="pip install 'opdcache[cpu]', or 'opdcache[gpu]' where there is one",
            )
        )
    except OSError as error:
        where = error.filename or os.getcwd()
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _report(StoreFull("no space left", where=where, remedy="free some, run again"))
        if error.filename is None or error.strerror is None:
            raise
        return _report(StoreError(error.strerror, where=where))


def _report(error: OpdcacheError) -> int:
    click.echo(f"error: {error} [{error.code}]", err=True)
    return error.exit_code


if __name__ == "__main__":
    main()
