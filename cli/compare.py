"""``opdcache compare``."""

import click

from .common import cache_option, changed_limits, looking_options


@click.command("compare")
@click.argument("one", metavar="A")
@click.argument("other", metavar="B")
@cache_option
@looking_options
@click.option("--json", "as_json", is_flag=True, help="one JSON object: schemas/comparison.json")
@click.pass_context
def command(
    context: click.Context,
    one: str,
    other: str,
    cache: str | None,
    k: int,
    chunk_tokens: int,
    limits: tuple[str, ...],
    as_json: bool,
) -> None:
    """Hold two teachers, two scorings, two rounds or two runs against each other.

    A and B are each a RUN.yaml, one round of it (RUN.yaml@0), a reference's scores
    (RUN.yaml#NAME, RUN.yaml@0#NAME), or a KEY in --cache. Rollouts that both scored are compared
    token by token, the others by their audits. Exits 3 when a teacher is further from itself than
    the limit, or a shard cannot be read. Loads no model.
    """
    from ..audit.compare import compare
    from ..audit.operands import operand
    from ..schemas.comparison import CompareLimits
    from .compare_text import compare_text

    asked = changed_limits(CompareLimits(), limits)
    a, b = operand(one, cache), operand(other, cache)
    found = compare(a, b, k=k, chunk_tokens=chunk_tokens, limits=asked)
    click.echo(found.model_dump_json(indent=1) if as_json else compare_text(found))
    context.exit(0 if found.is_sound else 3)
