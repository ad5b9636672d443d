"""``opdcache plan``."""

from pathlib import Path

import click

from .common import run_file


@click.command("plan")
@run_file
@click.option("--round", "round_index", type=click.IntRange(min=0), help="plan this round alone")
@click.option(
    "--workers",
    "num_workers",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="workers that share the rollout stage, and then the score stage",
)
@click.option(
    "--rates",
    "rates_file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="YAML of completion tokens a second: rollout, score (a worker), train (the learner)",
)
@click.option("--json", "as_json", is_flag=True, help="one JSON object, as schemas/plan.json says")
def command(
    run_file: Path,
    round_index: int | None,
    num_workers: int,
    rates_file: Path | None,
    as_json: bool,
) -> None:
    """Say what a run will take before it runs: shards, tokens, bytes, time, teacher hours.

    Reads the prompts and the tokenizer, loads no model, writes nothing.
    """
    from ..planner import plan
    from ..runfile import load_rates, load_run
    from ..schemas.plan import Rates
    from .plan_text import plan_lines

    rates = Rates() if rates_file is None else load_rates(rates_file)
    made = plan(load_run(run_file), rates, num_workers=num_workers, round_index=round_index)
    click.echo(made.model_dump_json(indent=1) if as_json else "\n".join(plan_lines(made)))
