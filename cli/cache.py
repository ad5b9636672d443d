"""``opdcache cache``: look at a cache, check it, clean it, copy it, fill it, export it."""

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ..export import Format
    from ..store.cache import Cache

cache_url = click.argument("cache", metavar="CACHE")


def opened(url: str) -> "Cache":
    """A cache by URL or folder; it must be there."""
    from pathlib import Path

    from ..errors import UsageError
    from ..store.cache import Cache

    if "://" not in url and not any((Path(url) / part).is_dir() for part in ("commits", "runs")):
        raise UsageError("not a cache", where=url, remedy="give the folder that run files name")
    return Cache(url)


@click.group("cache")
def command() -> None:
    """List, verify, clean, copy, import into and export a cache."""


@command.command("ls")
@cache_url
def ls(cache: str) -> None:
    """Rollout and score sets: how large, how old, which runs use them.

    Rollouts are made by a student, of prompts; scores are made by a teacher, of rollouts.
    """
    import gc

    from ..store.upkeep import listed
    from .tables import cache_lines

    gc.disable()  # very many small objects, which are all kept
    click.echo("\n".join(cache_lines(listed(opened(cache)))))


@command.command("show")
@cache_url
@click.argument("key")
def show(cache: str, key: str) -> None:
    """What a shard's KEY (or its first characters) was made of, and who made it."""
    from ..errors import UsageError
    from ..store.upkeep import preimage, with_key

    found = with_key(opened(cache), key)
    if len(found) != 1:
        raise UsageError(
            f"{len(found)} shards have a key that starts with {key!r}",
            where=cache,
            remedy="'opdcache cache ls' shows the keys",
        )
    click.echo(preimage(found[0]))


@command.command("verify")
@cache_url
@click.option("--deep", is_flag=True, help="decode every shard and hold it against its rollouts")
@click.option("--dry-run", is_flag=True, help="only say what is wrong, put nothing aside")
@click.pass_context
def verify(context: click.Context, cache: str, deep: bool, dry_run: bool) -> None:
    """Check every object against its manifest; exits 3 when something is wrong.

    A wrong shard is put aside in quarantine/ with the reason; its stage makes it anew.
    """
    from ..store.upkeep import verify as check

    checked = 0

    def advance() -> None:
        nonlocal checked
        checked += 1

    problems = check(opened(cache), deep=deep, quarantine=not dry_run, advance=advance)
    for problem in problems:
        click.echo(f"{problem.path}: {problem.reason}", err=True)
    wrong = sum(problem.is_wrong for problem in problems)
    click.echo(f"{checked:,} shards checked, {wrong} wrong")
    context.exit(3 if wrong else 0)


@command.command("gc")
@cache_url
@click.option("--dry-run", is_flag=True, help="only say what would go")
@click.option(
    "--grace-hours",
    type=click.FloatRange(0, 24 * 365),
    default=24,
    show_default=True,
    help="what is younger stays",
)
def gc(cache: str, dry_run: bool, grace_hours: float) -> None:
    """Delete what no run uses and nobody is making; a shard that is taken up meanwhile stays."""
    from datetime import timedelta

    from ..store.upkeep import collect, garbage

    store = opened(cache)
    found = garbage(store, grace=timedelta(hours=grace_hours))
    for item in found:
        place = item.commit or item.objects[0]
        click.echo(f"{place}: {item.reason}, {item.size_bytes:,} bytes")
    if not dry_run:
        found = collect(store, found)
    total = sum(item.size_bytes for item in found)
    click.echo(f"{'would free' if dry_run else 'freed'} {total:,} bytes of {len(found)} shards")


@command.command("copy")
@cache_url
@click.argument("destination", metavar="DESTINATION")
@click.pass_context
def copy(context: click.Context, cache: str, destination: str) -> None:
    """Copy every shard and pin to another cache, checked; what is there stays as it is.

    Exits 3 when a shard is damaged; the others are copied.
    """
    from ..store.cache import Cache
    from ..store.upkeep import copy as copy_shards

    done = copy_shards(opened(cache), Cache(destination), lambda text: click.echo(text, err=True))
    click.echo(f"copied {done.shards:,} shards, {done.size_bytes:,} bytes; {done.present:,} there")
    for reason, count in done.left_behind.items():
        click.echo(f"left behind {count:,}: {reason}")
    for problem in done.damaged:
        click.echo(f"not copied: {problem.path}: {problem.reason}", err=True)
    context.exit(3 if done.damaged else 0)


@command.command("import")
@cache_url
@click.argument("file", metavar="FILE")
@click.option("--student", required=True, metavar="MODEL", help="the policy that sampled")
@click.option(
    "--out", required=True, metavar="FOLDER", help="for 'rollouts: {from: FOLDER}' of a run file"
)
@click.option("--task", default="default", show_default=True, help="of the rows that name none")
@click.option("--shard-samples", type=click.IntRange(1), default=256, show_default=True)
def import_(cache: str, file: str, student: str, out: str, task: str, shard_samples: int) -> None:
    """Take rollouts from elsewhere: a JSONL or Parquet FILE of token ids, a row a completion.

    Rows have prompt_token_ids and completion_token_ids, and may have behavior_logprobs,
    sampling_logprobs, loss_mask, id, sample_index, task, answer, messages, finish_reason and text.
    """
    from pathlib import Path

    from ..importing import import_rollouts
    from ..resolve import model_folder
    from ..runfile import local_model
    from ..schemas.teachers import ModelRef
    from ..store.cache import Cache
    from .progress import make_progress

    done = import_rollouts(
        Cache(cache),
        Path(file),
        model_folder(ModelRef(model=local_model(student, Path.cwd()))),
        Path(out),
        make_progress(),
        task=task,
        shard_samples=shard_samples,
    )
    click.echo(
        f"{done.num_rows:,} rollouts in {done.num_shards:,} shards, {done.num_tokens:,} tokens, "
        f"{done.num_supervised:,} of them supervised; "
        + ", ".join(f"{count:,} {fault}" for fault, count in done.quality.items())
    )
    made = f"{done.num_made:,} shards made" if done.num_made else "all there already, nothing made"
    click.echo(f"{made}; a run takes them with 'rollouts: {{from: {out}}}'")


@command.command("export")
@cache_url
@click.option(
    "--out",
    required=True,
    metavar="FOLDER",
    type=click.Path(file_okay=False),
    help="where the part files go; refused when it has some",
)
@click.option(
    "--format",
    "file_format",
    type=click.Choice(["parquet", "arrow"]),
    default="parquet",
    show_default=True,
    help="Parquet, or Arrow IPC files that readers can map into memory",
)
@click.option("--run", metavar="DIR", help="what the rounds of the run in this folder pinned")
@click.option(
    "--teacher",
    metavar="FINGERPRINT",
    default="",
    help="every score set of one teacher; the fingerprint's first characters are enough",
)
def export(cache: str, out: str, file_format: "Format", run: str | None, teacher: str) -> None:
    """Write tables that DuckDB, Polars and Hugging Face datasets open: a row a completion.

    One part file a rollout shard and score set, of the whole cache unless --run or --teacher says
    otherwise. All parts have the same columns: those that any of them has, null in the others.
    """
    from pathlib import Path

    from .. import export as tables
    from ..data import of_run
    from ..errors import UsageError

    if run is not None and teacher:
        raise UsageError("--run and --teacher do not go together", remedy="leave one out")
    store = opened(cache)
    if run is not None:
        shards, left_out = of_run(run), 0
    else:
        shards, left_out = tables.of_cache(store, teacher)
    done = tables.export(store, shards, Path(out), file_format)
    if left_out:
        click.echo(f"left out {left_out:,} score sets whose rollouts are gone")
    click.echo(
        f"wrote {done.num_parts:,} parts, {done.num_rows:,} rows, {done.num_tokens:,} tokens, "
        f"{done.size_bytes:,} bytes"
    )
