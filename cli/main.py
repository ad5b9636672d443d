"""The console script: finds the command, and turns errors into one line and an exit code."""

import errno
import os
import sys

import click

from ..errors import OpdcacheError, StoreFull
from . import demo, evaluate, rollout, run, score, status, train


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="opdcache")
def cli() -> None:
    """Offline-cached, batch on-policy distillation of language models."""


for module in (run, rollout, score, train, evaluate, status, demo):
    cli.add_command(module.command)


def main() -> None:
    """Run the command line; exits 0, 1 failure, 2 usage, 3 verification, 75 try again."""
    sys.exit(_exit_code(sys.argv[1:]))


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
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = error.filename or os.getcwd()
        return _report(StoreFull("no space left", where=where, remedy="free some, then run again"))


def _report(error: OpdcacheError) -> int:
    click.echo(f"error: {error} [{error.code}]", err=True)
    return error.exit_code


if __name__ == "__main__":
    main()
