"""``opdcache audit``."""

import click

from .common import (
    cache_option,
    changed_limits,
    chosen_rounds,
    looking_options,
    reference_option,
    verifier_option,
)


@click.command("audit")
@click.argument("named", metavar="RUN.yaml|KEY...", nargs=-1, required=True)
@cache_option
@chosen_rounds
@reference_option
@verifier_option
@looking_options
@click.option("--json", "as_json", is_flag=True, help="one JSON object: schemas/audit.json")
@click.pass_context
def command(
    context: click.Context,
    named: tuple[str, ...],
    cache: str | None,
    rounds: tuple[int, ...],
    reference: str | None,
    verifier: str | None,
    k: int,
    chunk_tokens: int,
    limits: tuple[str, ...],
    as_json: bool,
) -> None:
    """Say what stored distributions tell, and whether to go on: exits 3 on a no-go.

    Looks at a run's scored rounds, or at the shards of keys in --cache. Loads no model.
    """
    from ..audit.labels import judge_of
    from ..audit.run import audit
    from ..audit.targets import target
    from ..schemas.audit import AuditLimits
    from .audit_text import audit_text

    looked_at = target(named, cache=cache, rounds=rounds, reference=reference)
    config = looked_at.config
    asked = changed_limits(AuditLimits() if config is None else config.audit, limits)
    judge = judge_of(looked_at, verifier)
    found = audit(looked_at, k=k, chunk_tokens=chunk_tokens, limits=asked, judge=judge)
    click.echo(found.model_dump_json(indent=1) if as_json else audit_text(found))
    context.exit(0 if found.is_go else 3)
