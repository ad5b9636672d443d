"""``opdcache audit``."""

import click

from .common import audit_limits, cache_option, chosen_rounds


@click.command("audit")
@click.argument("named", metavar="RUN.yaml|KEY...", nargs=-1, required=True)
@cache_option
@chosen_rounds
@click.option("--reference", metavar="NAME", help="a reference's scores in the teacher's place")
@click.option(
    "-k",
    "k",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="entries that the overlap is taken of",
)
@click.option(
    "--chunk",
    "chunk_tokens",
    type=click.IntRange(min=1),
    default=1024,
    show_default=True,
    metavar="TOKENS",
    help="length of the position chunks",
)
@click.option(
    "--limit",
    "limits",
    multiple=True,
    metavar="NAME=VALUE",
    help="a limit of the verdict, in the place of the run file's (audit) or the default",
)
@click.option("--json", "as_json", is_flag=True, help="one JSON object: schemas/audit.json")
@click.pass_context
def command(
    context: click.Context,
    named: tuple[str, ...],
    cache: str | None,
    rounds: tuple[int, ...],
    reference: str | None,
    k: int,
    chunk_tokens: int,
    limits: tuple[str, ...],
    as_json: bool,
) -> None:
    """Say what stored distributions tell, and whether to go on: exits 3 on a no-go.

    Looks at a run's scored rounds, or at the shards of keys in --cache. Loads no model.
    """
    from ..audit.run import audit
    from ..audit.targets import target
    from .audit_text import audit_text

    looked_at = target(named, cache=cache, rounds=rounds, reference=reference)
    config = looked_at.config
    asked = audit_limits(None if config is None else config.audit, limits)
    found = audit(looked_at, k=k, chunk_tokens=chunk_tokens, limits=asked)
    click.echo(found.model_dump_json(indent=1) if as_json else audit_text(found))
    context.exit(0 if found.is_go else 3)
